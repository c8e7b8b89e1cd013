"""Steps a library's TD3 or SAC on demand: for each number of steps read from standard input, prints their seconds.

usage: peer.py rltools|stable-baselines3|sbx td3|sac, in the environment of requirements-peers.txt
       peer.py sparseprop INPUTS OUTPUTS DENSITY BATCH forward|backward, there too: a layer instead of a step
       peer.py dst_td3|dst_sac|high_sparsity [ARGUMENT ...], in that of dst_td3.py, with arguments of the program

The seconds of the warm-up come first, unasked. All libraries train in one thread, on Gymnasium's HalfCheetah-v4, with
the paper's settings and without evaluations. RLtools' Python interface does not let us set all of them: it has no
weight decay, and its updates begin at step 100, within the warm-up. SBX's SAC moves its targets at every step, not to
the critics at every 1,000th. None of this makes their later steps much slower.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable
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


RLTOOLS = {
    "td3": {
        "ACTOR_BATCH_SIZE": 100,
        "CRITIC_BATCH_SIZE": 100,
        "ACTOR_TRAINING_INTERVAL": 2,
        "CRITIC_TARGET_UPDATE_INTERVAL": 2,
        "ACTOR_TARGET_UPDATE_INTERVAL": 2,
        "ACTOR_POLYAK": 1 - 0.005,
        "CRITIC_POLYAK": 1 - 0.005,
        "TARGET_NEXT_ACTION_NOISE_STD": 0.2,
        "TARGET_NEXT_ACTION_NOISE_CLIP": 0.5,
        "EXPLORATION_NOISE": 0.1,
        "OPTIMIZER_ALPHA": 1e-3,
    },
    "sac": {
        "ACTOR_BATCH_SIZE": 256,
        "CRITIC_BATCH_SIZE": 256,
        "ACTOR_TRAINING_INTERVAL": 1,
        "CRITIC_TARGET_UPDATE_INTERVAL": 1000,
        "CRITIC_POLYAK": 0.0,
        "ALPHA": 0.2,
        "ADAPTIVE_ALPHA": False,
        "OPTIMIZER_ALPHA": 3e-4,
    },
}


def train_rltools(another: Callable[[], bool], algorithm: str) -> None:
    """Train RLtools' agent, which is compiled first where this machine has not done so yet (about a minute).

    It multiplies with Intel's MKL, or with OpenBLAS where the environment has RL_TOOLS_DISABLE_MKL.
    """
    os.environ["MKL_NUM_THREADS"] = "1"
    import rltools

    module = getattr(rltools, algorithm.upper())(
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
        CRITIC_TRAINING_INTERVAL=1,
        GAMMA=0.99,
        OPTIMIZER_EPSILON=1e-8,
        OPTIMIZER_EPSILON_SQRT=0.0,
        **RLTOOLS[algorithm],
    )
    state = module.State(0)
    blas = "openblas" if "RL_TOOLS_DISABLE_MKL" in os.environ else "mkl"
    if not re.search(f"/(lib)?{blas}", Path("/proc/self/maps").read_text()):  # numpy's own is libscipy_openblas
        raise RuntimeError(f"RLtools found no {blas}: it would multiply with another BLAS, or with its own slow loops")
    state.step()
    while another():
        state.step()


def train_stable_baselines(another: Callable[[], bool], library: str, algorithm: str) -> None:
    """Train an agent of Stable-Baselines3 or of SBX, which take the same arguments."""
    import numpy as np
    import torch
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(1)
    if library == "sbx":
        import optax
        import sbx as module

        def adam(learning_rate: float) -> optax.GradientTransformation:
            return optax.chain(optax.add_decayed_weights(2e-4), optax.adam(learning_rate))

        optimizer = {"optimizer_class": adam}
    else:
        import stable_baselines3 as module

        optimizer = {"optimizer_kwargs": {"weight_decay": 2e-4}}
    env = make_environment()
    actions = env.action_space.shape[0]
    if algorithm == "td3":
        settings = {"learning_rate": 1e-3, "batch_size": 100, "tau": 0.005, "policy_delay": 2}
        settings |= {"target_policy_noise": 0.2, "target_noise_clip": 0.5}
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions))
    else:
        settings = {"learning_rate": 3e-4, "batch_size": 256, "ent_coef": 0.2}
        settings |= {"tau": 0.005} if library == "sbx" else {"tau": 1.0, "target_update_interval": 1000}
    model = getattr(module, algorithm.upper())(
        "MlpPolicy",
        env,
        learning_starts=LEARNING_STARTS,
        gamma=0.99,
        train_freq=(1, "step"),
        gradient_steps=1,
        policy_kwargs={"net_arch": [256, 256], **optimizer},
        seed=0,
        **settings,
    )
    model.learn(1_000_000_000, callback=lambda *_: another())


def repeat_sparseprop(
    another: Callable[[], bool], inputs: str, outputs: str, density: str, batch: str, way: str
) -> None:
    """Apply SparseProp's kernels to a random layer; activations are [units, batch], as they want them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    from scipy.sparse import random_array
    from sparseprop import backend

    rng = np.random.default_rng(0)
    options = {"density": float(density), "format": "csr", "dtype": np.float32, "rng": rng}
    weight = random_array((int(outputs), int(inputs)), **options)
    rows, columns, values = weight.indptr.astype(np.int32), weight.indices.astype(np.int32), weight.data
    x = rng.standard_normal((int(inputs), int(batch)), dtype=np.float32)
    y = rng.standard_normal((int(outputs), int(batch)), dtype=np.float32)
    to_x, to_values = np.zeros_like(x), np.zeros_like(values)

    def apply() -> None:  # both add to what is there already, for which zeros are needed
        if way == "forward":
            y[:] = 0
            backend.sparse_linear_vectorized_forward(x, rows, columns, values, y)
        else:
            to_x[:] = 0
            backend.sparse_linear_vectorized_backward(x, rows, columns, values, y, to_x, to_values)

    apply()
    while another():
        apply()


def train_ours(another: Callable[[], bool], program: str, arguments: list[str]) -> None:
    """Train as one of our programs does with these arguments, but write nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    import tyro

    import dst_sac
    import dst_td3
    import high_sparsity

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    programs = {
        "dst_td3": dst_td3.Arguments,
        "dst_sac": dst_sac.SACArguments,
        "high_sparsity": high_sparsity.HighSparsityArguments,
    }
    args = tyro.cli(programs[program], args=["--learning-starts", str(LEARNING_STARTS), *arguments])
    run = dst_td3.Run(dst_td3.resolve(args))
    run.advance()
    while another():
        run.advance()


def main() -> None:
    """Train the library named on the command line for as long as more steps are asked for."""
    warnings.filterwarnings("ignore")
    another = StepsOnDemand()
    library, *arguments = sys.argv[1:]
    if library == "rltools":
        train_rltools(another, *arguments)
    elif library == "sparseprop":
        repeat_sparseprop(another, *arguments)
    elif library in ("stable-baselines3", "sbx"):
        train_stable_baselines(another, library, *arguments)
    else:
        train_ours(another, library, arguments)


main()
