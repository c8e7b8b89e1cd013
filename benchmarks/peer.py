"""Steps a library's TD3 on demand: for each number of steps read from standard input, prints the seconds they took.

usage: peer.py stable-baselines3|sbx, in the environment of requirements-peers.txt
"""

import sys
import time
import warnings

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

LEARNING_STARTS = 1000


class StepsOnDemand(BaseCallback):
    """Lets training go on for as many steps as are asked for."""

    def __init__(self):
        super().__init__()
        self.left = None

    def _on_step(self) -> bool:
        if self.num_timesteps < LEARNING_STARTS:
            return True
        if self.left is not None:
            self.left -= 1
            if self.left > 0:
                return True
            print(time.perf_counter() - self.started, flush=True)
        line = sys.stdin.readline()
        self.left, self.started = int(line or 0), time.perf_counter()
        return bool(line)


def main() -> None:
    """Train with the paper's settings, which both libraries take under the same names."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    env = gymnasium.make("HalfCheetah-v4")
    actions = env.action_space.shape[0]
    if sys.argv[1] == "sbx":
        import optax
        from sbx import TD3

        def adam(learning_rate: float) -> optax.GradientTransformation:
            return optax.chain(optax.add_decayed_weights(2e-4), optax.adam(learning_rate))

        optimizer = {"optimizer_class": adam}
    else:
        from stable_baselines3 import TD3

        optimizer = {"optimizer_kwargs": {"weight_decay": 2e-4}}
    noise = NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions))
    policy = {"net_arch": [256, 256], **optimizer}
    model = TD3(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        learning_starts=LEARNING_STARTS,
        batch_size=100,
        tau=0.005,
        gamma=0.99,
        train_freq=(1, "step"),
        gradient_steps=1,
        policy_delay=2,
        target_policy_noise=0.2,
        target_noise_clip=0.5,
        action_noise=noise,
        policy_kwargs=policy,
        seed=0,
    )
    model.learn(1_000_000_000, callback=StepsOnDemand())


main()
