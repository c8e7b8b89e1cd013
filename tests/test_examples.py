"""The examples: policies as C files, compiled and run, and the paper's pieces in other people's agents."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import PROGRAM
from torch import nn

import dst_td3

sys.path.insert(0, str(PROGRAM.parent / "examples"))  # as Python does for what is started there
import export_c
import measure_c

README = (PROGRAM.parent / "examples" / "README.md").read_text()
README_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# A policy of a million steps, whose hidden layers are half empty.
TRAINED = PROGRAM.parent / "results/HalfCheetah-v4/ds-td3/seed0"


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip a test where a tool is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is missing")


needs_gcc = needs("gcc")
needs_board = needs(*measure_c.TOOLS)


# --- Policies as C files ----------------------------------------------------------------------------------------------
def untrained_run(folder: Path, env: str = "HalfCheetah-v4", widths=(17, 256, 256, 6), sparsity: float = 0.9) -> Path:
    """Make what the example reads of a finished run, with a policy of random weights."""
    folder.mkdir()
    widths = list(widths)
    connections = dst_td3.count_connections(widths, sparsity)
    layers = dst_td3.initial_layers(widths, connections, np.random.default_rng(0))
    bounds = (np.full(widths[-1], -1, dtype=np.float32), np.full(widths[-1], 1, dtype=np.float32))
    (folder / "config.json").write_text(json.dumps({"arguments": {"env": env, "seed": 0, "threads": 1}}))
    dst_td3.save_policy(folder / "policy.npz", layers, bounds, env)
    return folder


@pytest.fixture(scope="module")
def trained() -> export_c.Policy:
    """The policy of a million steps."""
    return export_c.read_run(TRAINED)


@pytest.fixture(scope="module")
def observations(trained) -> np.ndarray:
    """The thousand observations of an episode."""
    return export_c.observe(trained, 1000)


@pytest.mark.parametrize("compiler", [pytest.param(name, marks=needs(name)) for name in ("gcc", "clang")])
def test_float32_is_as_near_to_the_exact_action_as_torch_is(trained, observations, tmp_path, compiler):
    measure_c.write_ours(tmp_path, trained, "float32")
    act = measure_c.compiled_act(tmp_path, 6, compiler)
    load = dst_td3.load_policy(TRAINED / "policy.npz", "HalfCheetah-v4")
    ours, torchs = (np.array([function(o) for o in observations]) for function in (act, load))
    exact = export_c.exact_policy(trained, "float32")(observations)
    assert np.abs(ours - torchs).max() < 1e-4
    assert np.abs(exact).max() > 0.9 and np.abs(exact).min() < 0.1, "the policy does something"
    our_error, torchs_error = (np.sqrt(np.square(actions - exact).mean()) for actions in (ours, torchs))
    assert 0 < our_error <= torchs_error


@pytest.mark.parametrize("compiler", [pytest.param(name, marks=needs(name)) for name in ("gcc", "clang")])
def test_int8_is_what_its_rounded_weights_say(trained, observations, tmp_path, compiler):
    measure_c.write_ours(tmp_path, trained, "int8")
    act = measure_c.compiled_act(tmp_path, 6, compiler)
    exact = export_c.exact_policy(trained, "int8")(observations)
    assert np.abs(np.array([act(o) for o in observations]) - exact).max() < 1e-4
    assert np.abs(exact - export_c.exact_policy(trained, "float32")(observations)).max() > 1e-3


def test_int8_is_symmetric_with_a_scale_for_each_output_unit():
    weight = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32) * [[1, 100, 0]]
    rounded, scale = export_c.quantize(weight.astype(np.float32))
    assert rounded.dtype == np.int8 and scale.shape == (3,)
    assert np.abs(rounded).max(axis=0).tolist() == [127, 127, 0]
    assert (np.abs(rounded * scale - weight) <= scale * 0.501).all()


@needs_gcc
def test_int8_keeps_the_return_over_ten_episodes(trained, tmp_path):
    means = []
    for weights in ("float32", "int8"):
        folder = tmp_path / weights
        folder.mkdir()
        measure_c.write_ours(folder, trained, weights)
        act = measure_c.compiled_act(folder, 6)
        episodes = dst_td3.evaluate(act, dst_td3.make_environment(trained.env), 10, trained.seed)
        means.append(np.mean([total for total, _ in episodes]))
    assert means[0] > 10_000
    assert means[1] == pytest.approx(means[0], rel=0.05)


@needs_gcc
def test_wide_layers_take_two_bytes_an_index_and_full_layers_none(tmp_path):
    run = untrained_run(tmp_path / "run", widths=(17, 300, 40, 6), sparsity=0.5)
    policy = export_c.read_run(run)
    header = export_c.c_header(policy, "float32")
    types = re.findall(r"const (\w+) policy_from_(\d)", header)
    assert types == [("uint8_t", "1"), ("uint16_t", "2")]
    assert policy.layers[2].mask.all()
    measure_c.write_ours(tmp_path, policy, "float32")
    act, observation = measure_c.compiled_act(tmp_path, 6), np.random.default_rng(0).normal(size=17)
    exact = export_c.exact_policy(policy, "float32")(observation.astype(np.float32)[None])[0]
    assert act(observation) == pytest.approx(exact, abs=1e-6)


@needs_gcc
def test_bounds_and_any_number_of_layers(tmp_path):
    run = untrained_run(tmp_path / "run", "Pendulum-v1", (3, 20, 20, 20, 1), 0.5)
    policy = export_c.read_run(run)._replace(low=np.float32([-3]), high=np.float32([1]))
    measure_c.write_ours(tmp_path, policy, "float32")
    act, observation = measure_c.compiled_act(tmp_path, 1), np.float32([1, -1, 5])
    exact = export_c.exact_policy(policy, "float32")(observation[None])[0]
    assert act(observation) == pytest.approx(exact, abs=1e-6)
    assert -3 < exact[0] < 1


@needs_gcc
def test_actions_are_clipped_as_python_clips_them(tmp_path, monkeypatch):
    """To the last bit, where the tanh is 1 or -1; rounding alone would leave a third of these bounds."""
    rng, actions = np.random.default_rng(0), 400
    run = untrained_run(tmp_path / "run", "Pendulum-v1", (3, 4, actions), 0.5)
    low = rng.uniform(-1, 1, actions).astype(np.float32)
    high = (low + rng.uniform(0.1, 2, actions)).astype(np.float32)
    policy = export_c.read_run(run)._replace(low=low, high=high)
    signs = rng.choice([-1, 1], actions).astype(np.float32)
    monkeypatch.setattr(export_c, "c_check", lambda *_: "")  # which plays the environment
    policy.layers[-1] = policy.layers[-1]._replace(bias=50 * signs[None])
    measure_c.write_ours(tmp_path, policy, "float32")
    observation = np.float32([0.5, -0.5, 1])
    layers = [dst_td3.Layer(*map(torch.from_numpy, layer)) for layer in policy.layers]
    expected = dst_td3.policy(layers, *map(torch.from_numpy, (observation[None], low, high)))[0].numpy()
    given = np.array(measure_c.compiled_act(tmp_path, actions)(observation), np.float32)
    np.testing.assert_array_equal(given, expected)
    unclipped = signs * (high - low) / 2 + (high + low) / 2
    assert ((unclipped < low) | (unclipped > high)).sum() > 20


def test_a_run_is_exported_in_its_own_environment(tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "run", "Hopper-v4", (12, 8, 3), 0.5)  # with its position along the way
    arguments = {"env": "Hopper-v4", "seed": 0, "threads": 1}
    monkeypatch.setattr(sys, "argv", ["export_c.py", str(run), "--output", str(tmp_path / "policy.h")])
    for kwargs, code in (({}, 2), ({"env_kwargs": '{"exclude_current_positions_from_observation": false}'}, 0)):
        (run / "config.json").write_text(json.dumps({"arguments": arguments | kwargs}))
        assert export_c.main() == code, capsys.readouterr().err
    for damage in ({"threads": 0}, {"threads": "x"}, {"seed": -1}, {"env_kwargs": "{"}, {"env_kwargs": [1]}):
        (run / "config.json").write_text(json.dumps({"arguments": arguments | damage}))
        capsys.readouterr()
        assert export_c.main() == 2 and capsys.readouterr().err.count("\n") == 1


@needs_gcc
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_check_finds_a_wrong_weight(tmp_path, capsys, monkeypatch, weights):
    run, header = untrained_run(tmp_path / "run"), tmp_path / "policy.h"
    arguments = ["export_c.py", str(run), "--weights", weights, "--output", str(header)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert export_c.main() == 0
    assert "8,525 connections" in capsys.readouterr().out
    main = tmp_path / "main.c"
    main.write_text('#define POLICY_CHECK\n#include "policy.h"\nint main(void) { return policy_check(); }\n')

    def wrong() -> int:
        measure_c.run("gcc", *measure_c.STANDARD, main, "-o", tmp_path / "check", "-lm")
        return subprocess.run([tmp_path / "check"]).returncode

    assert wrong() == 0
    right = header.read_text()
    first = re.search(r"policy_bias_3\[6\] = \{\s+(\S+),", right)
    header.write_text(right[: first.start(1)] + "0.5f" + right[first.end(1) :])
    assert wrong() == 16
    header.write_text(right.replace(first[1], "(0.0f / 0.0f)"))
    assert wrong() == 16


@needs_board
def test_the_board_acts_alike_and_sparse_is_small_and_fast(tmp_path):
    results = {}
    for sparsity, weights in itertools.product((0, 0.9), ("float32", "int8")):
        folder = tmp_path / f"{sparsity}-{weights}"
        policy = export_c.read_run(untrained_run(folder, sparsity=sparsity))
        seen = export_c.observe(policy, 16)
        measure_c.write_ours(folder, policy, weights)
        measured = results[sparsity, weights] = measure_c.measure(folder, seen, 6)
        act = measure_c.compiled_act(folder, 6)
        assert measured.wrong == 0
        assert measured.actions == pytest.approx(np.array([act(o) for o in seen]), abs=1e-6)
    assert results[0.9, "float32"].flash_bytes < 47_000
    assert results[0.9, "int8"].flash_bytes < 23_000
    assert 285_000 < results[0, "float32"].flash_bytes < 295_000
    for weights in ("float32", "int8"):
        assert results[0.9, weights].instructions < results[0, weights].instructions / 4
        assert 2048 < results[0.9, weights].ram_bytes < 2500  # the two hidden layers, and what is on the stack besides


@needs_board
def test_instructions_stack_and_flash_are_counted_right(tmp_path):
    """A loop of known instructions, an array of known size, and a stack of known depth."""
    code = """
    static const unsigned char flash[5000] = {1};
    static unsigned char ram[700];
    void act(const float *observation, float *action)
    {
        volatile unsigned char stack[3000];
        stack[0] = stack[2999] = flash[(int)observation[0]];
        ram[(int)observation[1]]++;
        action[0] = (float)(stack[0] + ram[(int)observation[0]]);
        __asm__ volatile("mov r0, %0; 1: subs r0, #1; bne 1b" : : "r"(COUNT) : "r0", "cc");
    }
    int check(void) { return 0; }
    """
    seen, measured = np.zeros((3, 2), dtype=np.float32), []
    for count in (1000, 51_000):
        (tmp_path / "act.c").write_text(measure_c.PROTOTYPES + code.replace("COUNT", str(count)))
        measured.append(measure_c.measure(tmp_path, seen, 1))
    assert measured[1].instructions - measured[0].instructions == pytest.approx(100_000, abs=3)
    assert measured[0].instructions == pytest.approx(2030, abs=30)
    assert 5000 <= measured[0].flash_bytes < 5200
    assert 3700 <= measured[0].ram_bytes < 3800
    assert measured[0].actions.ravel().tolist() == [2, 3, 4]


@needs_board
def test_the_table_has_a_row_for_each_policy(tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "run", "Pendulum-v1", (3, 8, 8, 1), 0.5)
    monkeypatch.setattr(sys, "argv", ["measure_c.py", str(run), "--episodes", "1"])
    assert measure_c.main() == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["weights", "---", "float32", "int8"]
    assert len({len(row) for row in rows}) == 1


def test_a_missing_toolchain_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_c.py", str(TRAINED)])
    monkeypatch.setenv("PATH", "")
    assert measure_c.main() == 2
    error = capsys.readouterr().err
    assert "arm-none-eabi-gcc" in error and error.count("\n") == 1


def broken_run(kind: str, folder: Path) -> Path:
    """Make a run that cannot be exported."""
    if kind == "no run":
        return folder
    if kind == "does not fit":
        return untrained_run(folder, "Hopper-v4")
    run = untrained_run(folder, "Nothing-v0" if kind == "no environment" else "HalfCheetah-v4")
    policy, arrays = run / "policy.npz", dict(np.load(run / "policy.npz"))
    if kind == "unfinished":
        policy.unlink()
    if kind == "damaged":
        policy.write_bytes(policy.read_bytes()[:1000])
    if kind == "another environment":
        np.savez(policy, **arrays | {"env": np.array("Hopper-v4")})
    if kind == "diverged":
        np.savez(policy, **arrays | {"1.bias": arrays["1.bias"] * np.nan})
    return run


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no run", "is not the directory of a run"),
        ("unfinished", "when it is finished"),
        ("damaged", "is no policy that can be read"),
        ("another environment", "holds a policy for Hopper-v4, not for HalfCheetah-v4"),
        ("no environment", "environment Nothing-v0 cannot be made"),
        ("does not fit", "does not fit Hopper-v4"),
        ("diverged", "not finite"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, monkeypatch, capsys, kind, expected):
    output = tmp_path / "policy.h"
    run = broken_run(kind, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["export_c.py", str(run), "--output", str(output)])
    assert export_c.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("export_c.py: error: ") and error.count("\n") == 1
    assert expected in error
    assert not output.exists()


def test_an_impossible_output_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["export_c.py", str(run), "--output", str(tmp_path / "missing" / "policy.h")])
    assert export_c.main() == 2
    assert "cannot write" in capsys.readouterr().err


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------
@pytest.fixture
def sb3():
    """The example for Stable-Baselines3."""
    pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is missing (examples/requirements.txt)")
    import sb3

    return sb3


def make_model(sb3, algorithm: str, **policy_options):
    """Make a small model of SB3 with a sparse policy."""
    policies = {"td3": (sb3.TD3, sb3.SparseTD3Policy), "sac": (sb3.SAC, sb3.SparseSACPolicy)}
    model, policy = policies[algorithm]
    options = {"net_arch": [32, 32], **policy_options}
    return model(policy, "Pendulum-v1", policy_kwargs=options, learning_starts=100, batch_size=32, seed=0, device="cpu")


def sparse_layers(model) -> list[tuple]:
    """List each sparse layer of a model of SB3 with its optimizer's state and its target."""
    return [
        (layer, optimizer.state[layer.weight], target)
        for optimizer, layers, targets in model.policy.networks()
        for layer, target in zip(layers, targets, strict=True)
    ]


@pytest.mark.parametrize("algorithm", ["td3", "sac"])
def test_masks_counts_and_moments_hold_at_every_step(sb3, monkeypatch, algorithm):
    """Set SB3_STEPS for a longer run than this one of 1,700 updates, whose topology adapts once."""
    steps, looked_at, first_and_last = int(os.environ.get("SB3_STEPS", 11_700)), [], {}

    class Checked(sb3.DynamicSparseTraining):
        def _on_rollout_start(self):
            before = [layer.mask.clone() for layer, _, _ in sparse_layers(self.model)]
            super()._on_rollout_start()
            for (layer, state, target), mask in zip(sparse_layers(self.model), before, strict=True):
                # Adam makes its state at its first step, and the actor is updated at every second one.
                assert state or self.num_timesteps <= self.model.learning_starts + 1
                # Nothing is stored outside the topology, and connections that have just grown start at zero.
                empty = 1 - layer.mask * mask
                for tensor in (layer.weight, *(state[name] for name in ("exp_avg", "exp_avg_sq") if state)):
                    assert not (tensor * empty).any()
                first, count, _ = first_and_last.setdefault(layer, (mask, int(mask.sum()), mask))
                first_and_last[layer] = first, count, layer.mask.clone()
                assert layer.mask.sum() == count
                assert target.weight.count_nonzero() <= count
            looked_at.append(self.num_timesteps)

    monkeypatch.setattr(sb3, "DynamicSparseTraining", Checked)
    sb3.train(algorithm, total_timesteps=steps)
    assert looked_at == [*range(steps + 1)]
    assert len(first_and_last) == 6
    positions, connections = (
        sum(sizes) for sizes in zip(*((m.numel(), n) for m, n, _ in first_and_last.values()), strict=True)
    )
    assert connections == pytest.approx(positions / 2, abs=3)
    # The first layers are so small that half of all connections fills them.
    assert [(first * last).sum() < count for first, count, last in first_and_last.values()] == [False, True] * 3


@pytest.mark.parametrize("algorithm", ["td3", "sac"])
def test_sb3_saves_and_loads_topologies_and_trains_on(sb3, tmp_path, algorithm):
    model = make_model(sb3, algorithm, sparsity=0.8)
    model.learn(500, callback=sb3.DynamicSparseTraining(adapt_interval=100))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env(), device="cpu")
    pairs = list(zip(sparse_layers(model), sparse_layers(loaded), strict=True))
    for (layer, adam, target), (same_layer, same_adam, same_target) in pairs:
        tensors = (layer.mask, layer.weight, adam["exp_avg"], target.weight)
        same = (same_layer.mask, same_layer.weight, same_adam["exp_avg"], same_target.weight)
        assert all(map(torch.equal, tensors, same))
    observation = np.float32([1, 0, 0.5])
    assert (
        model.predict(observation, deterministic=True)[0] == loaded.predict(observation, deterministic=True)[0]
    ).all()
    before = [layer.mask.clone() for layer, _, _ in sparse_layers(loaded)]
    callback = sb3.DynamicSparseTraining(adapt_interval=100)
    loaded.learn(500, callback=callback, reset_num_timesteps=False)
    assert loaded.num_timesteps == callback.args.total_timesteps == 1000
    for mask, (layer, adam, target) in zip(before, sparse_layers(loaded), strict=True):
        assert layer.mask.sum() == mask.sum() >= target.weight.count_nonzero()
        assert not torch.equal(layer.mask, mask)
        for tensor in (layer.weight, adam["exp_avg"], adam["exp_avg_sq"]):
            assert not tensor[layer.mask == 0].any()
    loaded.policy.save(tmp_path / "policy")
    alone = type(loaded.policy).load(tmp_path / "policy", device="cpu")
    assert (
        alone.predict(observation, deterministic=True)[0] == loaded.predict(observation, deterministic=True)[0]
    ).all()


@pytest.mark.parametrize("algorithm", ["td3", "sac"])
def test_without_the_callback_topologies_stay_and_at_sparsity_0_the_agent_is_sb3s_own(sb3, algorithm):
    static = make_model(sb3, algorithm, sparsity=0.8)
    masks = [layer.mask.clone() for layer, _, _ in sparse_layers(static)]
    static.learn(300)
    for mask, (layer, _, target) in zip(masks, sparse_layers(static), strict=True):
        assert torch.equal(layer.mask, mask) and torch.equal(layer.weight != 0, mask == 1)
        assert torch.equal(target.weight != 0, mask == 1)
    full = make_model(sb3, algorithm, sparsity=0)
    full.learn(300, callback=sb3.DynamicSparseTraining(adapt_interval=100))
    options = {"policy_kwargs": {"net_arch": [32, 32]}, "learning_starts": 100, "batch_size": 32, "seed": 0}
    own = type(full)("MlpPolicy", "Pendulum-v1", **options, device="cpu").learn(300)
    ours = full.policy.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in own.policy.state_dict().items())


def test_the_readmes_lines_for_sb3_train_and_save(sb3, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(README_BLOCKS[0].replace("1_000_000", "300"), names)
    assert names["model"].num_timesteps == 300
    assert 0 < sb3.TD3.load("hopper").policy.actor.mu[2].mask.mean() < 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--sparsity 1", "--sparsity must be"),
        ("--sparsity 0.99999", "without a connection"),
        ("--total-timesteps 10000", "--total-timesteps must be"),
        ("--env Nothing-v0", "cannot be made"),
        ("--env CartPole-v1", "has actions in"),
    ],
)
def test_what_sb3_cannot_train_is_said_in_one_line(sb3, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["sb3.py", *arguments.split()])
    assert sb3.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("sb3.py: error: ") and error.count("\n") == 1
    assert expected in error


# --- A script in CleanRL's style --------------------------------------------------------------------------------------
class Network(nn.Module):
    """An actor or a critic with two hidden layers, as single-file scripts have it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def test_the_lines_for_a_single_file_script_make_its_agent_sparse(monkeypatch):
    """The readme's two blocks, run where it says in a script that learns TD3 on random transitions."""
    monkeypatch.chdir(PROGRAM.parent)
    _, beginning, each_step = README_BLOCKS
    args = SimpleNamespace(seed=0, total_timesteps=1200, learning_starts=25)
    torch.manual_seed(0)
    actor, target_actor = Network(11, 3), Network(11, 3)
    qf1, qf2, qf1_target, qf2_target = (Network(14, 1) for _ in range(4))
    pairs = [(actor, target_actor), (qf1, qf1_target), (qf2, qf2_target)]
    for network, target in pairs:
        target.load_state_dict(network.state_dict())
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-3)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    script = {**locals(), "device": torch.device("cpu")}
    exec(beginning, script)
    step = compile(each_step, "README.md", "exec")
    first = [layer.mask.clone() for layer, *_ in script["sparse"]]
    for global_step in range(args.total_timesteps):
        if global_step <= args.learning_starts:
            continue
        observation, action, reward = torch.randn(8, 11), torch.rand(8, 3) * 2 - 1, torch.randn(8, 1)
        with torch.no_grad():
            following = torch.cat([observation, target_actor(observation).tanh()], 1)
            value = reward + 0.9 * torch.minimum(qf1_target(following), qf2_target(following))
        values = (q(torch.cat([observation, action], 1)) for q in (qf1, qf2))
        q_optimizer.zero_grad()
        sum((q - value).square().mean() for q in values).backward()
        q_optimizer.step()
        if global_step % 2 == 0:
            actor_optimizer.zero_grad()
            (-qf1(torch.cat([observation, actor(observation).tanh()], 1))).mean().backward()
            actor_optimizer.step()
            for network, target in pairs:
                for p, t in zip(network.parameters(), target.parameters(), strict=True):
                    t.data.lerp_(p.data, 0.005)
        script["global_step"] = global_step
        exec(step, script)
        for layer, target, optimizer, count in script["sparse"]:
            assert layer.mask.sum() == count >= target.count_nonzero()
            for tensor in (layer.weight, *(v for v in optimizer.state[layer.weight].values() if v.ndim)):
                assert not (tensor * (1 - layer.mask)).any()
    kept = [
        float((layer.mask * mask).sum() / mask.sum()) for (layer, *_), mask in zip(script["sparse"], first, strict=True)
    ]
    numbers = [int(mask.sum()) for mask in first]
    assert len(kept) == 6 and sum(numbers) == pytest.approx((2 * 14 + 11 + 3 * 64) * 64 / 2, abs=3)
    assert all(share == 1 for share, mask in zip(kept, first, strict=True) if mask.all())
    assert all(share < 1 for share, mask in zip(kept, first, strict=True) if not mask.all())
