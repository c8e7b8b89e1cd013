"""Steps a library's TD3 on demand: for each number of steps read from standard input, prints the seconds they took.

usage: peer.py rltools|stable-baselines3|sbx, in the environment of requirements-peers.txt
       peer.py dst_td3 [ARGUMENT ...], in that of dst_td3.py, with arguments of it

The seconds of the warm-up come first, unasked. All libraries train in one thread, on Gymnasium's HalfCheetah-v4, with
the paper's settings and without evaluations. RLtools' Python interface does not let us set all of them: it has no
weight decay, and its updates begin at step 100, within the warm-up. Neither makes its later steps slower.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import gymnasium

LEARNING_STARTS = 1000


class StepsOnDemand:
    """Tells a library, after each step that it has taken, whether to take another one."""

    def __init__(self):
        # Libraries print to standard output too, RLtools from C++: that goes to standard error from now on.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.left, self.started = LEARNING_STARTS, time.perf_counter()

    def __call__(self) -> bool:
        """Answer, when as many steps are taken as were asked for, and wait for the next number."""
        self.left -= 1
        if self.left > 0:
            return True
        print(time.perf_counter() - self.started, file=self.answers, flush=True)
        line = sys.stdin.readline()
        self.left, self.started = int(line or 0), time.perf_counter()
        return bool(line)


def make_environment() -> gymnasium.Env:
    """Make the environment that all libraries train on."""
    env = gymnasium.make("HalfCheetah-v4")
    env.reset(seed=0)
    return env


def train_rltools(another: Callable[[], bool]) -> None:
    """Train RLtools' TD3, which is compiled first where this machine has not done so yet (about a minute)."""
    for package in ("mkl", "mkl-include"):
        version(package)  # fails where it is missing; RLtools would go on with another BLAS, or with none
    os.environ["MKL_NUM_THREADS"] = "1"
    from rltools import TD3

    module = TD3(
        make_environment,
        interface_name="benchmark",
        enable_evaluation=False,
        STEP_LIMIT=1_000_000_000,
        N_WARMUP_STEPS=LEARNING_STARTS,
        REPLAY_BUFFER_CAP=1_000_000,
        ACTOR_HIDDEN_DIM=256,
        CRITIC_HIDDEN_DIM=256,
        ACTOR_NUM_LAYERS=3,
        CRITIC_NUM_LAYERS=3,
        ACTOR_BATCH_SIZE=100,
        CRITIC_BATCH_SIZE=100,
        CRITIC_TRAINING_INTERVAL=1,
        ACTOR_TRAINING_INTERVAL=2,
        CRITIC_TARGET_UPDATE_INTERVAL=2,
        ACTOR_TARGET_UPDATE_INTERVAL=2,
        ACTOR_POLYAK=1 - 0.005,
        CRITIC_POLYAK=1 - 0.005,
        GAMMA=0.99,
        TARGET_NEXT_ACTION_NOISE_STD=0.2,
        TARGET_NEXT_ACTION_NOISE_CLIP=0.5,
        EXPLORATION_NOISE=0.1,
        OPTIMIZER_ALPHA=1e-3,
        OPTIMIZER_EPSILON=1e-8,
        OPTIMIZER_EPSILON_SQRT=0.0,
    )
    state = module.State(0)
    state.step()
    while another():
        state.step()


def train_stable_baselines(another: Callable[[], bool], library: str) -> None:
    """Train the TD3 of Stable-Baselines3 or of SBX, which take the same arguments."""
    import numpy as np
    import torch
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    if library == "sbx":
        import optax
        from sbx import TD3

        def adam(learning_rate: float) -> optax.GradientTransformation:
            return optax.chain(optax.add_decayed_weights(2e-4), optax.adam(learning_rate))

        optimizer = {"optimizer_class": adam}
    else:
        from stable_baselines3 import TD3

        optimizer = {"optimizer_kwargs": {"weight_decay": 2e-4}}
    env = make_environment()
    actions = env.action_space.shape[0]
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
        action_noise=NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions)),
        policy_kwargs={"net_arch": [256, 256], **optimizer},
        seed=0,
    )
    model.learn(1_000_000_000, callback=lambda *_: another())


def train_ours(another: Callable[[], bool], arguments: list[str]) -> None:
    """Train as ``dst_td3.py`` does with these arguments, but write nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    import tyro

    import dst_td3

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arguments = [*arguments, "--device", "cpu", "--learning-starts", str(LEARNING_STARTS)]
    args = dst_td3.resolve(tyro.cli(dst_td3.Arguments, args=arguments))
    run = dst_td3.Run(args, dst_td3.RunDirectory(args))
    run.advance()
    while another():
        run.advance()


def main() -> None:
    """Train the library named on the command line for as long as more steps are asked for."""
    warnings.filterwarnings("ignore")
    another = StepsOnDemand()
    if sys.argv[1] == "dst_td3":
        train_ours(another, sys.argv[2:])
    elif sys.argv[1] == "rltools":
        train_rltools(another)
    else:
        train_stable_baselines(another, sys.argv[1])


main()
