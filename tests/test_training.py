"""Whole runs: they learn, repeat themselves to the byte, and leave what they should."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess

import numpy as np
import pytest
from running import REPEATED, SHORT, assert_same_bytes, rows_of, run_directory

import dst_td3
from dst_td3 import Arguments


@pytest.mark.parametrize("method", ["ds-td3", "static-td3", "td3"])
def test_it_learns_to_balance_a_pole(command_line, tmp_path, method):
    """Balancing for a whole episode returns 1000; an untrained agent reaches about 10."""
    arguments = (
        "--env InvertedPendulum-v4 --hidden 64 64 --learning-rate 0.005 --tau 0.02 --total-timesteps 10000 "
        f"--learning-starts 1000 --eval-interval 1000 --eval-episodes 5 --adapt-interval 200 --method {method}"
    )
    code, output, error = command_line(*arguments.split(), "--results-dir", tmp_path)
    assert code == 0, error
    returns = [float(row["return_mean"]) for row in rows_of(run_directory(tmp_path) / "evaluations.csv")]
    assert returns[0] < 100 and max(returns) > 900, output


def test_ds_td3_changes_its_topology_and_keeps_its_size(unbroken):
    rows = rows_of(unbroken / "topology.csv")
    assert {(row["network"], row["layer"]) for row in rows} == {(n, i) for n in ("actor", "critic") for i in "12"}
    for network in ("actor", "critic"):
        alive = [
            float(row["initial_connections_alive"]) for row in rows if (row["network"], row["layer"]) == (network, "2")
        ]
        assert alive[0] == 1 and alive[-1] < 0.75 and alive[-1] < alive[2]
        sizes = {
            sum(map(int, row["connections_per_input"].split()))
            for row in rows
            if (row["network"], row["layer"]) == (network, "1")
        }
        assert len(sizes) == 1


def test_a_row_of_topology_counts_the_first_connections_that_are_left(tmp_path):
    args = Arguments(env="Hopper-v4", engine="masked", sparsity=0.8, hidden=(16, 12), results_dir=tmp_path)
    run = dst_td3.Run(dataclasses.replace(args, learning_starts=10, adapt_interval=5, drop_fraction=0.3))
    first = {name: network.layer_arrays() for name, network in run.agent.networks.items()}
    for _ in range(40):
        run.advance()
    run.directory.mkdir(parents=True)
    run.evaluate()
    rows = run.tables["topology"]
    assert [(row["network"], row["layer"]) for row in rows] == [(n, i) for n in ("actor", "critic") for i in (1, 2)]
    for row in rows:
        now = run.agent.networks[row["network"]].layer_arrays()
        mask, initial = (layers[row["layer"] - 1].mask for layers in (now, first[row["network"]]))
        mask, initial = (m if m.ndim == 2 else m[0] for m in (mask, initial))  # of the first critic
        assert 0 < row["initial_connections_alive"] < 1
        assert row["initial_connections_alive"] == pytest.approx(mask[initial == 1].mean())
        counts = [str(int(count)) for count in mask.sum(1)]
        assert row["connections_per_input"].split() == (counts if row["layer"] == 1 else [])


def test_a_run_directory_holds_what_it_should(unbroken):
    assert unbroken.parts[-3] == "Hopper-v4" and unbroken.name == "seed0"
    files = {path.name for path in unbroken.iterdir()}
    assert files == {"config.json", "summary.json", "timing.csv", *REPEATED}
    config, summary = (json.loads((unbroken / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["arguments"]["adapt_interval"] == 100
    packages = ("torch", "gymnasium", "mujoco", "numpy", "numba", "llvmlite", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    assert config["versions"] == versions | {"python": platform.python_version()}
    rows = rows_of(unbroken / "evaluations.csv")
    assert [int(row["step"]) for row in rows] == list(range(0, 2401, 400))
    returns = [float(row["return_mean"]) for row in rows]
    assert summary["lca"] == pytest.approx(sum(returns) * 400 / 5000 / 2400)
    assert summary["final_return"] == pytest.approx(np.mean(returns[1:]))  # of seven, the untrained policy's left out
    assert summary["peak_memory_bytes"] > 50e6


def test_the_same_command_makes_the_same_bytes_and_another_seed_others(command_line, unbroken, tmp_path):
    for seed in (0, 1):
        assert command_line(*SHORT, "--seed", seed, "--results-dir", tmp_path / str(seed))[0] == 0
    assert_same_bytes(run_directory(tmp_path / "0"), unbroken)
    evaluations = run_directory(tmp_path / "1") / "evaluations.csv"
    assert evaluations.read_bytes() != (unbroken / "evaluations.csv").read_bytes()


def test_a_commit_is_dirty_where_code_was_edited_and_not_where_figures_were(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("")
    (tmp_path / "figure.png").write_text("")
    monkeypatch.setattr(dst_td3, "__file__", str(tmp_path / "code.py"))
    assert dst_td3.provenance()["commit"] is None
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "a commit")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "figure.png").write_text("drawn again")
    clean = dst_td3.provenance()["commit"]
    (tmp_path / "code.py").write_text("edited")
    assert len(clean) == 40 and dst_td3.provenance()["commit"] == clean + "-dirty"


def test_a_diverged_policy_stops_the_run():
    run = dst_td3.Run(Arguments(env="Hopper-v4", learning_starts=2, hidden=(8, 8), sparsity=0.5, engine="masked"))
    run.advance()
    run.advance()
    run.agent.engine.actor.layers[0].bias.data.fill_(np.nan)
    with pytest.raises(dst_td3.RunError, match="the policy's action is not finite"):
        run.advance()
