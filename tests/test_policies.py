"""Policy files: they act as the agent that was trained, in other runs too, and execute nothing."""

from pathlib import Path

import numpy as np
import pytest
from engines import OBSERVATIONS, case, sac_case
from point import TRAINING
from running import SHORT, run_directory

import dst_td3
from dst_td3 import Arguments


def test_snapshots_are_kept_and_an_initial_policy_acts_first(command_line, tmp_path):
    snapshots = [*SHORT, "--snapshot-at", 800, 1600]
    command_line(*snapshots, "--results-dir", tmp_path / "first")
    first = run_directory(tmp_path / "first")
    assert {path.name for path in first.glob("policy*")} == {"policy.npz", "policy-800.npz", "policy-1600.npz"}
    initial = ["--initial-policy", first / "policy-1600.npz"]
    assert command_line(*SHORT, *initial, "--results-dir", tmp_path / "second")[0] == 0
    second = run_directory(tmp_path / "second")
    assert "initial-policy=policy-1600" in second.parent.name
    assert (second / "evaluations.csv").read_bytes() != (first / "evaluations.csv").read_bytes()


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("kind", [case, sac_case])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_a_policy_file_acts_as_the_agent(tmp_path, kind, engine, sparsity):
    """As its mean, where it is stochastic."""
    this, path = kind(sparsity=sparsity, dtype=np.float32), tmp_path / "policy.npz"
    agent, rng = this.agent(engine)
    this.train(agent, rng, range(1, 12))
    dst_td3.save_policy(path, agent.policy_layers(), this.bounds, "Some-v0")
    act, observation = dst_td3.load_policy(path, "Some-v0"), np.random.default_rng(0).standard_normal(OBSERVATIONS)
    exactly = engine == "masked" and kind is case
    np.testing.assert_allclose(act(observation), agent.act(observation), rtol=0, atol=0 if exactly else 1e-6)
    stored = dst_td3.read_arrays(path)
    assert len(stored["1.weight"]) == agent.policy_layers()[1].mask.sum(), "connections alone are stored"
    assert {array.dtype.name for name, array in stored.items() if "weight" in name or "bias" in name} == {"float32"}
    with pytest.raises(dst_td3.InputError, match="not for Other-v0"):
        dst_td3.load_policy(path, "Other-v0")


def test_a_policy_takes_any_array_and_refuses_another_size(plain):
    act = dst_td3.load_policy(plain[0] / "policy.npz", "Point-v0")
    expected = act(np.array([0.25, -0.5], np.float32))
    for given in ([0.25, -0.5], (0.25, -0.5), np.array([0.25, -0.5]), np.array([-0.5, 0.25])[::-1]):
        np.testing.assert_array_equal(act(given), expected)
    for other in ([0.25], [0, 0, 0], 1.0, np.zeros((1, 2))):
        with pytest.raises(dst_td3.InputError, match="takes 2 observations, not"):
            act(other)


def test_a_policy_of_another_environment_does_not_act_first(command_line, tmp_path):
    layers = dst_td3.initial_layers([2, 4, 1], [8, 4], np.random.default_rng(0))  # one action would be broadcast to two
    dst_td3.save_policy(tmp_path / "one.npz", layers, (-np.ones(1, np.float32), np.ones(1, np.float32)), "Point-v0")
    layers = dst_td3.initial_layers([3, 4, 2], [12, 8], np.random.default_rng(0))
    dst_td3.save_policy(tmp_path / "three.npz", layers, (-np.ones(2, np.float32), np.ones(2, np.float32)), "Point-v0")
    for name, expected in (("one", "does not have the 2 actions of Point-v0"), ("three", "takes 3 observations")):
        given = ("--initial-policy", tmp_path / f"{name}.npz", "--results-dir", tmp_path / "results")
        code, _, error = command_line(*TRAINING, *given)
        assert code == 2 and expected in error and error.count("\n") == 1
        assert not (tmp_path / "results").exists()


def test_loading_executes_nothing(tmp_path, command_line):
    """An array of Python objects is how a numpy file would carry code."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    objects = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "policy.npz", **{"0.shape": objects, "env": objects})
    with pytest.raises(dst_td3.InputError, match="no policy"):
        dst_td3.load_policy(tmp_path / "policy.npz", "Hopper-v4")
    run = dst_td3.Run(Arguments(env="Hopper-v4", results_dir=tmp_path, engine="masked", sparsity=0.5))
    run.directory.mkdir(parents=True)
    np.savez(run.directory / "checkpoint.npz", state=objects)
    with pytest.raises(dst_td3.InputError, match="cannot be resumed"):
        run.load()
    assert not (tmp_path / "executed").exists()
