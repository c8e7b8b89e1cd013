"""Ant-v4 with the 84 zeros that the paper's Ant-v3 observed beside its 27 numbers.

Do these zeros explain the paper's higher return on Ant? Adaptation moves connections from them to the real inputs. The
first setting has the zeros. In the second, the actor's first layer is from the start about as dense as the first ends.
In the third, first layers have every connection:

    export PYTHONPATH=benchmarks
    python campaign.py --program dst_td3.py --seeds 3 --env padded_ant:PaddedAnt-v4 -- --er-lambda 40 64
    python campaign.py --program dst_td3.py --seeds 3 --env Ant-v4 -- --er-lambda 16.7 64
    python campaign.py --program dst_td3.py --seeds 3 --env Ant-v4 -- --er-lambda 31 64
"""

import gymnasium
import numpy as np

ZEROS = 84


def make(**options) -> gymnasium.Env:
    """Return Ant-v4 with zeros after what it observes; ``options`` are Ant's own."""
    ant = gymnasium.make("Ant-v4", disable_env_checker=True, **options)
    bounds = np.full(ant.observation_space.shape[0] + ZEROS, np.inf)
    space = gymnasium.spaces.Box(-bounds, bounds, dtype=np.float64)
    return gymnasium.wrappers.TransformObservation(ant, lambda numbers: np.pad(numbers, (0, ZEROS)), space)


gymnasium.register("PaddedAnt-v4", make, max_episode_steps=1000)
