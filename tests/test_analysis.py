"""The figures and tables of analysis.ipynb on empty, partial and whole results, recomputed here from the files."""

import csv
import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from running import ADAPTING_RECIPE, AS_RLX2, FIGURES, FORMER, FOUR, RECIPE, read_table, run_here
from scipy import stats

import analysis
import dst_td3
import report

NOTEBOOK = Path(analysis.__file__).with_name("analysis.ipynb")
# What its cells make, in order: each a function from results to tables and plots.
BOUNDS = -np.ones(2, np.float32), np.ones(2, np.float32)  # of two actions
MAKERS = [
    getattr({"analysis": analysis, "report": report}[module], name)
    for module, name in re.findall(r"(analysis|report)\.(\w+)\(results\)", NOTEBOOK.read_text())
]
ENVIRONMENTS = ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4", "Humanoid-v4")
METHODS = {"td3": "TD3", "static-td3": "Static-TD3", "ds-td3": "DS-TD3"}
SAC_METHODS = {"sac": "SAC", "ds-sac": "DS-SAC"}
APPENDIX = ("appendix_lca", "appendix_return")
# The variants of Figure 5 that no other figure has, and where they are run.
HIGH_SPARSITY = {
    "ds-td3_sparsity=0.9": FOUR,
    "ds-td3_sparsity=0.95": FOUR,
    f"ds-td3_sparsity=0.9_{ADAPTING_RECIPE}": FOUR,
    f"ds-td3_sparsity=0.95_{ADAPTING_RECIPE}": FOUR,
    f"ds-td3_sparsity=0.9_{ADAPTING_RECIPE}_n-step=3": FOUR[1:2],
    f"ds-td3_sparsity=0.95_{ADAPTING_RECIPE}_n-step=3": FOUR[1:2],
    **{f"ds-td3_sparsity={a}_{ADAPTING_RECIPE}{n}_critic-sparsity={c}": [env] for env, a, c, n in AS_RLX2},
    f"ds-td3_sparsity=0.9_{RECIPE}": FOUR,
    f"static-td3_sparsity=0.9_{RECIPE}": FOUR,
    f"td3_{RECIPE}": FOUR[:2],
    f"td3_hidden=77,77_{RECIPE}": FOUR[:1],
}
CURVE = [3000 * (1 - math.exp(-index / 60)) for index in range(201)]  # of a million steps


def read_tables(results: Path) -> dict[str, list[dict[str, str]]]:
    """Return the tables that were written, row by row, by name."""
    return {path.stem: read_table(path.read_text()) for path in (results / "tables").glob("*.md")}


def assert_figures_written(results: Path) -> None:
    for name in FIGURES:
        for suffix in ("png", "pdf"):
            assert (results / "figures" / f"{name}.{suffix}").stat().st_size > 1000


def make_all(folder: Path, write: bool = True) -> dict[str, list[dict[str, str]]]:
    """Make what the notebook does of a results folder, here; return its tables. Figures are drawn, if not written."""
    results, figures = analysis.read_results(folder), []
    for maker in MAKERS:
        made = maker(results)
        for each in (made,) if isinstance(made, analysis.Table | analysis.Plot) else made:
            if isinstance(each, analysis.Plot):
                figures.append(each.name)
            if write or isinstance(each, analysis.Table):
                each.write(folder)
            else:
                assert len(each._repr_png_()) > 1000
    assert sorted(figures) == sorted(FIGURES)
    if write:
        assert_figures_written(folder)
    return read_tables(folder)


def written_files(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for kind in ("figures", "tables") for path in (results / kind).iterdir()}


def write_run(
    results: Path,
    env: str,
    variant: str,
    seed: int,
    returns: list[float],
    total: int = 1_000_000,
    interval: int = 5000,
    finished: bool = True,
    commit: str = "0" * 40,
) -> Path:
    """Write a run by hand: ``returns`` are its evaluations, the first at step 0."""
    folder = results / env / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    method, steps = variant.split("_")[0], [interval * index for index in range(len(returns))]
    arguments = {"env": env, "method": method, "seed": seed, "total_timesteps": total, "learning_starts": 25_000}
    arguments |= {"eval_interval": interval, "eval_episodes": 10, "engine": "masked"}
    versions = {"python": "3.11.2", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3.3.7"}
    config = {"arguments": arguments, "versions": versions, "commit": commit, "machine": {"processor": "a processor"}}
    (folder / "config.json").write_text(json.dumps(config))
    tables = {
        "evaluations": [{"step": s, "return_mean": r, "return_std": 1.0} for s, r in zip(steps, returns, strict=True)],
        "timing": [{"step": s, "training_seconds": s / 500, "evaluation_seconds": s / 9000} for s in steps],
    }
    if method == "ds-td3":
        tables["topology"] = [
            {
                "step": step,
                "network": network,
                "layer": layer,
                "initial_connections_alive": 1 - step / total / 2,
                "connections_per_input": "3 1 2" if layer == 1 else "",
            }
            for step in steps
            for network in ("actor", "critic")
            for layer in (1, 2)
        ]
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if finished:
        dense = 214_784
        connections = dense if method == "td3" else 105_250
        summary = {"connections": connections, "sparsity": 1 - connections / dense, "steps": total}
        summary |= {"evaluations": len(returns)}
        summary |= {
            "training_flops": connections * 5e8 * total / 1e6,
            "training_flops_of_dense": dense * 5e8 * total / 1e6,
        }
        summary |= {"training_seconds": total / 500, "evaluation_seconds": 100.0, "peak_memory_bytes": 600_000_000}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_policy(folder: Path, closed: tuple[list[int], list[int]]) -> None:
    """Write a full actor of 3, 4, 4 and 2 units whose hidden units ``closed`` have neither weights nor bias."""
    layers = []
    for inputs, outputs, units in ((3, 4, closed[0]), (4, 4, closed[1]), (4, 2, [])):
        weight, bias = np.ones((inputs, outputs), np.float32), np.ones((1, outputs), np.float32)
        weight[:, units] = bias[:, units] = 0
        layers.append(dst_td3.Layer(weight, np.ones_like(weight), bias))
    layers[0].weight[:, 2] = 0  # a unit that its bias keeps open
    dst_td3.save_policy(folder / "policy.npz", layers, BOUNDS, folder.parents[1].name)


def write_resumed_run(results: Path, seed: int, sessions: list[dict]) -> None:
    """Write a run of DS-TD3 whose first session and those that went on with it differ by ``sessions``."""
    path = write_run(results, "Hopper-v4", "ds-td3", seed, CURVE) / "config.json"
    config = json.loads(path.read_text())
    made_with = {name: config[name] for name in ("versions", "commit", "machine")}
    resumed = [{"step": 1000 * number, **made_with, **session} for number, session in enumerate(sessions)]
    path.write_text(json.dumps(config | sessions[0] | {"resumed": resumed[1:]}))


def learning(rng: random.Random, final: float, speed: float, evaluations: int = 201) -> list[float]:
    """Make up a noisy learning curve."""
    curve = (1 - math.exp(-speed * index / evaluations) for index in range(evaluations))
    return [final * (value + rng.gauss(0, 0.03)) for value in curve]


@pytest.fixture(scope="module")
def unlike_the_papers(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """Make all of a run that was evaluated half as often as another and of runs that were resumed."""
    results = tmp_path_factory.mktemp("unlike")
    write_run(results, "Hopper-v4", "static-td3", 0, CURVE)
    write_run(results, "Hopper-v4", "td3_eval-interval=10000", 0, CURVE[::2], interval=10_000)
    first, second, third = ({"commit": digit * 40} for digit in "012")
    write_resumed_run(results, 0, [first, second, second | {"machine": {"processor": "another processor"}}])
    write_resumed_run(results, 1, [first, second, third])
    return make_all(results, write=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Write the paper's whole grid by hand and make all of it; return the tables and the returns."""
    results, rng, written = tmp_path_factory.mktemp("whole"), random.Random(0), {}
    for env in ENVIRONMENTS:
        curves = ("td3", 3000, 3), ("static-td3", 2500, 3), ("ds-td3", 4000, 5), ("sac", 3500, 3), ("ds-sac", 4500, 4)
        for method, final, speed in curves:
            for seed in range(5):
                written[env, method, seed] = learning(rng, final * (0.9 + 0.05 * seed), speed)
                write_run(results, env, method, seed, written[env, method, seed])
    others = [f"ds-td3_adapt-interval={e}" for e in (200, 500, 2000)]
    others += [f"ds-td3_sparsity={s}" for s in (0.25, 0.5, 0.8)]
    others += [f"{m}_initial-policy=policy-{step}" for m in ("td3", "ds-td3") for step in (500_000, 700_000)]
    for variant in others:
        for seed in range(5):
            write_run(results, "HalfCheetah-v4", variant, seed, learning(rng, 3000, 4))
    for variant, environments in HIGH_SPARSITY.items():
        for env, seed in itertools.product(environments, range(5)):
            returns = written[env, variant, seed] = learning(rng, 2600 + 200 * seed, 6)
            write_run(results, env, variant, seed, returns)
    for seed, closed in enumerate((([1], [0]), ([0, 1, 3], [0]))):
        write_policy(results / "Hopper-v4" / "ds-td3" / f"seed{seed}", closed)
    (results / "benchmarks").mkdir()
    (results / "benchmarks" / "end_to_end.csv").write_text(
        "implementation,microseconds_per_step\nrltools,2000\n"
        '"ds-td3, sparsity 0.5",1500\n"ds-td3, sparsity 0.9, recipe",1000\n"ds-td3, sparsity 0.95, recipe",800\n'
    )
    (results / "benchmarks" / "frontier.csv").write_text(
        "environment,implementation,speedup_over_dense,state_bytes\n"
        'Hopper-v4,"td3, compiled",1.0,5870000\nHopper-v4,"ds-td3, recipe",5.54,281000\n'
    )
    (results / "benchmarks" / "updates.csv").write_text(
        "implementation,width,sparsity,microseconds,state_bytes\n"
        "torch dense,256,0.0,2400,6e6\nsparse engine,256,0.5,1700,5e6\nsparse engine,256,0.9,430,1e6\n"
    )
    return make_all(results, write=False), written


@pytest.fixture(scope="session")
def published() -> analysis.Results:
    """Read the published runs."""
    return analysis.read_results(NOTEBOOK.parent / "results")


def row_of(table: list[dict[str, str]], **cells: str) -> dict[str, str]:
    (row,) = [row for row in table if all(row[name] == value for name, value in cells.items())]
    return row


def final_returns(written: dict) -> dict[tuple[str, str, int], float]:
    return {key: statistics.mean(returns[-10:]) for key, returns in written.items()}


def learning_curve_areas(written: dict) -> dict[tuple[str, str, int], float]:
    return {key: sum(returns) / 1e6 for key, returns in written.items()}


def pair(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


def test_tables_hold_what_the_runs_say(whole):
    tables, written = whole
    for env, (method, name) in itertools.product(ENVIRONMENTS, (METHODS | SAC_METHODS).items()):
        lca_table, return_table = ("table1_lca", "table2_return") if method in METHODS else APPENDIX
        seeds = [written[env, method, seed] for seed in range(5)]
        lca = row_of(tables[lca_table], environment=env, method=name)
        assert lca["ours"] == pair([sum(returns) / 1e6 for returns in seeds], 4)
        final = row_of(tables[return_table], environment=env, method=name)
        assert final["ours"] == pair([statistics.mean(returns[-10:]) for returns in seeds], 1)
        for row in (lca, final):
            assert (row["seeds"], row["steps"], row["remark"]) == ("5", "1,000,000", "")


def test_tables_hold_the_papers_numbers_and_mark_what_is_only_the_papers(whole):
    tables, _ = whole
    for env, method, lca, final in (
        ("HalfCheetah-v4", "DS-TD3", "1.9560", "11,459.9 ± 482.6"),
        ("Walker2d-v4", "Static-TD3", "0.5167", "3,951.0 ± 443.8"),
        ("Hopper-v4", "TD3", "0.4788", "2,184.8 ± 1,224.1"),
        ("Ant-v4", "SAC", "0.7969", "5,848.6 ± 385.9"),
        ("Humanoid-v4", "SAC", "0.5639", "5,518.6 ± 97.0"),
    ):
        assert row_of(tables["table1_lca"], environment=env, method=method)["paper"] == lca
        assert row_of(tables["table2_return"], environment=env, method=method)["paper"] == final
    for env, method, lca, final in (
        ("HalfCheetah-v4", "DS-SAC", "1.7081", "11,084.4 ± 445.1"),
        ("Hopper-v4", "SAC", "0.4441", "3,100.4 ± 374.4"),
        ("Humanoid-v4", "DS-SAC", "0.6777", "5,584.6 ± 109.4"),
    ):
        assert row_of(tables["appendix_lca"], environment=env, method=method)["paper"] == lca
        assert row_of(tables["appendix_return"], environment=env, method=method)["paper"] == final
    for table in ("table1_lca", "table2_return"):
        sac = [row for row in tables[table] if row["method"] == "SAC"]
        assert len(sac) == 5
        remark = "the paper's number, of another SAC than the appendix's; not run here"
        assert all(row["ours"] == "-" and row["remark"] == remark for row in sac)


def test_compute_table_counts_as_the_paper_does(whole):
    row = row_of(whole[0]["compute"], environment="HalfCheetah-v4", method="DS-TD3")
    assert (row["connections"], row["sparsity"], row["of dense"]) == ("105,250", "0.51", "0.49")
    dense = row_of(whole[0]["compute"], environment="HalfCheetah-v4", method="TD3")
    assert dense["FLOPs of 1e6 steps"] == "1.07e+14"


def smoothed(written: dict, env: str, variant: str, seeds: Iterable[int] = range(5)) -> list[float]:
    mean = [statistics.mean(values) for values in zip(*(written[env, variant, s] for s in seeds), strict=True)]
    return [statistics.mean(mean[max(0, i - 9) : i + 1]) for i in range(len(mean))]


def steps_to_dense(
    written: dict, env: str, variant: str, seeds: Iterable[int] = range(5), dense_seeds: Iterable[int] = range(5)
) -> int | None:
    target = statistics.mean(statistics.mean(written[env, "td3", seed][-10:]) for seed in dense_seeds)
    curve = smoothed(written, env, variant, seeds)
    return next((5000 * i for i, value in enumerate(curve) if value >= target - 1e-6), None)


def test_steps_to_reach_dense_td3s_final_return(whole):
    tables, written = whole
    for env in ENVIRONMENTS:
        step, own = steps_to_dense(written, env, "ds-td3"), steps_to_dense(written, env, "td3")
        row = row_of(tables["steps_to_dense"], environment=env, method="DS-TD3")
        assert row["reached at step"] == f"{step:,}"
        assert row["fewer steps than TD3's whole run"] == f"{1 - step / 1e6:.0%}"
        assert row["than TD3's own first time there"] == f"{1 - step / own:.0%}"
        never = row_of(tables["steps_to_dense"], environment=env, method="Static-TD3")
        assert never["reached at step"] == "not reached"


@pytest.mark.parametrize(
    ("measure", "values_of", "digits", "papers"),
    [("return", final_returns, 0, 3951.01 - 4042.36), ("LCA", learning_curve_areas, 3, 0.5167 - 0.5264)],
)
def test_a_difference_is_that_of_welchs_test(whole, measure, values_of, digits, papers):
    tables, written = whole
    values = values_of(written)
    ours, theirs = ([values["Walker2d-v4", m, seed] for seed in range(5)] for m in ("static-td3", "td3"))
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    expected = (statistics.mean(ours) - statistics.mean(theirs), *test.confidence_interval(0.95), papers)
    cell = row_of(tables["differences"], environment="Walker2d-v4", of=measure)["Static-TD3 less TD3"]
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", cell.replace(",", ""))]
    assert numbers == pytest.approx(expected, abs=0.51 * 10**-digits)


def test_the_interval_of_a_quotient_is_that_of_the_delta_method(whole):
    tables, written = whole
    final = final_returns(written)
    ours, dense = ([final["Ant-v4", m, seed] for seed in range(5)] for m in ("ds-td3", "td3"))
    x, y = statistics.mean(ours), statistics.mean(dense)
    variances = statistics.variance(ours) / 5 / y**2, statistics.variance(dense) / 5 * x**2 / y**4
    freedom = sum(variances) ** 2 / sum(v**2 / 4 for v in variances)
    margin = stats.t(freedom).ppf(0.975) * math.sqrt(sum(variances))
    cell = row_of(tables["high_sparsity"], setting="DS-TD3, the paper's settings")["Ant-v4"]
    assert cell == f"{x / y:.2f} [{x / y - margin:.2f}, {x / y + margin:.2f}] (5)"


def test_high_sparsity_is_held_against_dense(whole):
    tables, written = whole
    final = final_returns(written)
    row = row_of(tables["high_sparsity"], setting="DS-TD3, 0.95, recipe")
    quotients = []
    for env in FOUR:
        variant = f"ds-td3_sparsity=0.95_{ADAPTING_RECIPE}" + "_n-step=3" * (env == "Walker2d-v4")
        ours, dense = (statistics.mean(final[env, v, seed] for seed in range(5)) for v in (variant, "td3"))
        quotients.append(ours / dense)
        value, low, high, seeds = row[env].translate(str.maketrans("[],()", "     ")).split()
        assert float(value) == pytest.approx(ours / dense, abs=0.0051)
        assert float(low) <= float(value) <= float(high) and seeds == "5"
    assert row["mean of the four"].startswith(f"{statistics.mean(quotients):.2f} [")
    assert row["mean of the four"].endswith("(5 + 5 + 5 + 5)")
    small = row_of(tables["high_sparsity"], setting="TD3, width 77, recipe")
    assert small["HalfCheetah-v4"] != "-" and small["Ant-v4"] == small["mean of the four"] == "-"
    one_step = row_of(tables["high_sparsity"], setting="DS-TD3, 0.95, recipe, but targets of one step")
    assert one_step["Walker2d-v4"] not in (row["Walker2d-v4"], "-") and one_step["Hopper-v4"] == row["Hopper-v4"]


def test_agents_with_as_many_connections_as_rlx2_stand_beside_it(whole):
    tables, _ = whole
    assert [row["task"] for row in tables["frontier"]] == list(FOUR)
    as_rlx2 = row_of(tables["high_sparsity"], setting="DS-TD3, as many connections as RLx2, recipe")
    for row in tables["frontier"]:
        assert row["our return over dense"] == as_rlx2[row["task"]]
    hopper, ant = (row_of(tables["frontier"], task=env) for env in ("Hopper-v4", "Ant-v4"))
    assert (hopper["RLx2's sparsities"], hopper["RLx2's return over dense"]) == ("0.98, 0.95", "0.97")
    assert hopper["our connections"] == "105,250 (49.0%)"  # as the made-up summaries have them
    assert (hopper["steps/s over dense"], hopper["MB, dense"]) == ("5.5x", "0.28, 5.87")
    assert ant["steps/s over dense"] == ant["MB, dense"] == "-"


def test_each_seed_of_high_sparsity_is_shown(whole):
    tables, written = whole
    env, variant = "Hopper-v4", f"static-td3_sparsity=0.9_{RECIPE}"
    expected, reached = [], []
    for seed in range(5):
        value = f"{statistics.mean(written[env, variant, seed][-10:]):,.0f}"
        step = steps_to_dense(written, env, variant, [seed])
        expected.append(value if step is None else f"{value} ({step // 1000}k)")
        reached.append(step is not None)
    assert any(reached) and not all(reached)
    assert row_of(tables["high_sparsity_seeds"], setting="Static-TD3, 0.9, recipe")[env] == ", ".join(expected)
    small = row_of(tables["high_sparsity_seeds"], setting="TD3, width 77, recipe")
    assert small["HalfCheetah-v4"] != "-" and small["Ant-v4"] == "-"


def test_time_to_dense_is_steps_at_the_speed_that_the_benchmark_measured(whole):
    tables, written = whole
    env, variant = "HalfCheetah-v4", f"ds-td3_sparsity=0.9_{ADAPTING_RECIPE}"
    step = steps_to_dense(written, env, variant)
    row = row_of(tables["seconds_to_dense"], **{env: "DS-TD3, 0.9, recipe"})
    assert (row["steps/s"], row["minutes"]) == ("1,000", f"{step * 1000 / 6e7:.1f}")
    assert row["of RLtools' whole run"] == f"{step * 1000 / 2e9:.0%}"
    at_a_third = smoothed(written, env, variant)[665_000 // 5000]  # a third of 2,000 s is 666,667 steps of 1,000 µs
    assert row["return after a third of that run's time"] == f"{at_a_third:,.0f}"


def test_dormant_units_are_counted_with_their_connections(whole):
    (row,) = whole[0]["dormant_units"]
    assert (row["environment"], row["method"], row["seeds"]) == ("Hopper-v4", "DS-TD3", "2")
    assert row["dormant units of each hidden layer"] == "2 and 1"
    # Of 12 + 16 + 8 connections: 3 + 7 + 2 with one closed unit in the first layer, 9 + 13 + 2 with three.
    assert row["the actor's connections into or out of them"] == "50%"


def test_whole_results_leave_no_remark(whole):
    coverage = whole[0]["coverage"]
    assert len(coverage) == 15 + 3 + 3 + 4 + 10 + 33
    assert {(row["seeds"], row["steps"], row["remark"]) for row in coverage} == {("5", "1,000,000", "")}
    assert "unfinished" not in whole[0]


def test_learning_curve_area_does_not_depend_on_the_eval_interval(unlike_the_papers):
    table = unlike_the_papers["table1_lca"]
    often, seldom = (row_of(table, environment="Hopper-v4", method=name) for name in ("Static-TD3", "TD3"))
    assert often["ours"] == f"{sum(CURVE) / 1e6:.4f}"
    assert seldom["ours"] == f"{sum(CURVE[::2]) * 2 / 1e6:.4f}"
    assert float(seldom["ours"]) == pytest.approx(float(often["ours"]), rel=0.01)
    assert seldom["remark"] == "4 of 5 seeds missing; evaluated every 10,000 steps"


def test_provenance_names_all_that_made_a_resumed_run(unlike_the_papers):
    first, second, third = (digit * 12 for digit in "012")
    rows = [(row["processor"], row["commit"], row["seeds"]) for row in unlike_the_papers["provenance"]]
    assert sorted(rows) == [
        ("a processor", first, "0"),
        ("a processor", first, "0"),
        ("a processor", f"{first}, then {second}, then {third}", "1"),
        ("a processor, then another processor", f"{first}, then {second}", "0"),
    ]
    assert {row["torch"] for row in unlike_the_papers["provenance"]} == {"2.13.0"}


def test_nothing_at_all(tmp_path):
    tables = make_all(tmp_path / "none", write=False)
    assert {row["remark"] for row in tables["coverage"]} == {"**missing**"}
    ours = [row for row in tables["table2_return"] if row["method"] != "SAC"]
    ours += tables["appendix_lca"] + tables["appendix_return"]
    assert len(ours) == 15 + 20 and all(row["ours"] == "-" and row["remark"] == "**missing**" for row in ours)
    assert tables["steps_to_dense"] == tables["compute"] == tables["provenance"] == []


def test_partial_results_are_used_and_named(tmp_path):
    rng = random.Random(1)
    one = learning(rng, 3000, 3)
    write_run(tmp_path, "Hopper-v4", "td3", 0, one)
    # Of two lengths the longer counts.
    write_run(tmp_path, "Hopper-v4", "td3_total-timesteps=100000", 1, learning(rng, 9000, 3, 21), total=100_000)
    short = [learning(rng, 1000, 3, 21) for _ in range(2)]
    for seed, returns in enumerate(short):
        write_run(tmp_path, "Hopper-v4", "ds-td3_total-timesteps=100000", seed, returns, total=100_000)
    # One that is still being made, one that has only begun, and some that are damaged.
    write_run(tmp_path, "Ant-v4", "td3", 0, learning(rng, 1000, 3, 50), finished=False)
    (write_run(tmp_path, "Ant-v4", "td3", 1, [0.0], finished=False) / "evaluations.csv").unlink()
    (write_run(tmp_path, "Ant-v4", "td3", 2, one) / "config.json").write_text("{")
    (write_run(tmp_path, "Ant-v4", "td3", 3, one) / "evaluations.csv").write_text("")
    (write_run(tmp_path, "Ant-v4", "td3", 4, one) / "summary.json").write_text("{}")
    # What is no part of the paper stays out of its figures.
    write_run(tmp_path, "Ant-v4", "ds-td3_dense-moments=True", 0, one)
    write_run(tmp_path / "quick", "Walker2d-v4", "td3", 0, one)
    # Dense moments are held against runs of their own length.
    write_run(tmp_path, "HalfCheetah-v4", "ds-td3", 0, one)
    for moments, returns in zip(("", "_dense-moments=True"), short, strict=True):
        name = f"ds-td3_total-timesteps=100000{moments}"
        write_run(tmp_path, "HalfCheetah-v4", name, 0, returns, total=100_000)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "updates.csv").write_text("other,columns\n1,2\n")

    tables = make_all(tmp_path)
    assert all(row["verdict"].startswith("open: ") for row in tables["verdicts"])
    assert {row["DS-TD3 less TD3"][:3] for row in tables["differences"]} == {"- ("}
    ratio = statistics.mean(statistics.mean(returns[-10:]) for returns in short) / statistics.mean(one[-10:])
    cells = row_of(tables["high_sparsity"], setting="DS-TD3, the paper's settings")
    assert cells["Hopper-v4"] == f"{ratio:.2f} (2)" and cells["mean of the four"] == "-"
    dense = row_of(tables["table2_return"], environment="Hopper-v4", method="TD3")
    assert dense["ours"] == f"{statistics.mean(one[-10:]):,.1f}"
    assert (dense["seeds"], dense["steps"], dense["remark"]) == ("1", "1,000,000", "4 of 5 seeds missing")
    sparse = row_of(tables["table1_lca"], environment="Hopper-v4", method="DS-TD3")
    assert sparse["ours"] == pair([sum(returns) / 100_000 for returns in short], 4)
    assert (sparse["seeds"], sparse["steps"]) == ("2", "100,000")
    assert sparse["remark"] == "**shorter than the paper's run**; 3 of 5 seeds missing"
    for env, method in (("Ant-v4", "TD3"), ("Ant-v4", "DS-TD3"), ("Walker2d-v4", "TD3")):
        assert row_of(tables["table2_return"], environment=env, method=method)["remark"] == "**missing**"
    assert [(row["seed"], row["evaluated up to step"]) for row in tables["unfinished"]] == [
        ("0", "245,000 of 1,000,000"),
        ("1", "-"),
    ]
    last_ten = [f"{statistics.mean(returns[-10:]):,.1f}" for returns in short]
    assert [row["return"] for row in tables["dense_moments"]] == last_ten
    results = analysis.read_results(tmp_path)
    text = results.describe()
    for seed in (2, 3, 4):
        assert f"{tmp_path}/Ant-v4/td3/seed{seed}` (" in text
    axes = report.seconds_and_bytes(results).figure.axes
    assert all("lacks the columns\nimplementation" in panel.texts[0].get_text() for panel in axes)

    # The same results give the same files, so that committing them shows what changed.
    before = written_files(tmp_path)
    make_all(tmp_path)
    assert written_files(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be read
# ----------------------------------------------------------------------------------------------------------------------


def cut_lines(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def cut_bytes(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: cut_lines(run / "evaluations.csv", 101), "evaluations.csv has 100 rows, the summary counts 201"),
        (lambda run: cut_bytes(run / "evaluations.csv", 5), "evaluations.csv lacks values"),
        (lambda run: cut_lines(run / "evaluations.csv", 1), "evaluations.csv has 0 rows"),
        (
            lambda run: cut_bytes(run / "evaluations.csv", 1) or append(run / "evaluations.csv", "x"),
            "could not convert",
        ),
        (lambda run: (run / "evaluations.csv").unlink(), "evaluations.csv has 0 rows"),
        (lambda run: cut_lines(run / "topology.csv", 401), "topology.csv has not all layers"),
        (lambda run: cut_lines(run / "topology.csv", 804), "topology.csv has not all layers"),
        (lambda run: (run / "topology.csv").write_text("step\n1\n"), "topology.csv lacks columns"),
        (lambda run: (run / "summary.json").write_text('{"steps": 1}'), "summary.json lacks connections, evaluations"),
        (lambda run: (run / "config.json").write_text("{}"), "arguments"),
    ],
)
def test_a_run_that_is_not_whole_is_left_out_and_named(tmp_path, damage, named):
    kept = [write_run(tmp_path, "Hopper-v4", "ds-td3", seed, CURVE) for seed in (0, 1)]
    damage(write_run(tmp_path, "Hopper-v4", "ds-td3", 2, CURVE))
    results = analysis.read_results(tmp_path)
    assert [run.folder for run in results.runs] == kept
    (line,) = results.left_out
    assert line.startswith(f"`{tmp_path}/Hopper-v4/ds-td3/seed2` (") and named in line
    row = row_of(read_table(str(report.table_2(results))), environment="Hopper-v4", method="DS-TD3")
    assert row["ours"] == f"{statistics.mean(CURVE[-10:]):,.1f} ± 0.0" and row["seeds"] == "2"


def test_a_policy_that_cannot_be_read_is_left_out_and_named_but_its_run_counts(tmp_path):
    folders = [write_run(tmp_path, "Hopper-v4", "ds-td3", seed, CURVE) for seed in range(5)]
    for folder in folders[:4]:
        write_policy(folder, ([1], [0]))
    cut_bytes(folders[1] / "policy.npz", 100)
    shutil.copy(folders[0] / "policy.npz", folders[4] / "policy.npz")
    (folders[2] / "policy.npz").write_text("")
    first, second = (np.ones((3, 4), np.float32), np.ones((1, 4), np.float32)), (np.ones((5, 2)), np.ones((1, 2)))
    layers = [dst_td3.Layer(weight, np.ones_like(weight), bias) for weight, bias in (first, second)]
    dst_td3.save_policy(folders[3] / "policy.npz", layers, BOUNDS, "Hopper-v4")
    results = analysis.read_results(tmp_path)
    assert [line.split("`")[1] for line in results.left_out] == [str(folder) for folder in folders[1:4]]
    assert all("left out is its policy alone" in line for line in results.left_out)
    assert all(f"`{folder}`" in results.describe() for folder in folders[1:4])
    row = row_of(read_table(str(report.table_2(results))), environment="Hopper-v4", method="DS-TD3")
    assert row["seeds"] == "5" and row["ours"] == f"{statistics.mean(CURVE[-10:]):,.1f} ± 0.0"
    (row,) = read_table(str(report.dormant_units(results)))
    assert row["seeds"] == "2"


def test_values_in_a_runs_name_may_have_underscores(tmp_path):
    variant = "ds-td3_sparsity=0.9_initial-policy=my_own_policy-5_hidden=77,77_total-timesteps=1000000"
    write_run(tmp_path, "Hopper-v4", variant, 0, CURVE)
    results = analysis.read_results(tmp_path)
    (run,) = results.runs
    assert run.options == {"sparsity": "0.9", "initial-policy": "my_own_policy-5", "hidden": "77,77"}
    assert not results.left_out and results.select("Hopper-v4", "ds-td3", run.options) == [run]


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts by results/rules.md
# ----------------------------------------------------------------------------------------------------------------------

RANDOM = analysis.read_random_policy(NOTEBOOK.parent / "results" / "random_policy.csv")
PAPERS_TD3 = {env: analysis.PAPER_RETURN[env][0][0] for env in ENVIRONMENTS}


def write_grid(results: Path, seeds: Iterable[int], commit: str, better: float = 1.5) -> None:
    """Write Figure 1's cells: returns rise to a seed's own share of the paper's TD3, DS-TD3 to ``better`` times it."""
    for env, (method, factor), seed in itertools.product(
        ENVIRONMENTS, (("td3", 1), ("static-td3", 1.01), ("ds-td3", better)), seeds
    ):
        final = PAPERS_TD3[env] * factor * (1 + 0.004 * seed)
        returns = [RANDOM[env] + (final - RANDOM[env]) * min(1, index / (100 / factor)) for index in range(201)]
        write_run(results, env, method, seed, returns, commit=commit)


def verdicts_of(results: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows of the verdicts by the claim's number and the seeds."""
    rows = read_table(str(analysis.verdicts(analysis.read_results(results))))
    return {(row["claim"].split(".")[0], row["seeds"]): row for row in rows}


def test_verdicts_are_open_until_every_cell_has_its_seeds(tmp_path):
    write_grid(tmp_path, range(3), "0" * 40)
    write_run(tmp_path, "HalfCheetah-v4", "ds-td3", 3, CURVE)
    write_run(tmp_path, "HalfCheetah-v4", "ds-td3", 4, CURVE)
    write_run(tmp_path, "Hopper-v4", "ds-td3", 3, CURVE[:50], finished=False)
    write_run(tmp_path, "Hopper-v4", "ds-td3", 4, CURVE)
    write_run(tmp_path, "Hopper-v4", "ds-td3", 5, CURVE)
    rows = verdicts_of(tmp_path)
    assert len(rows) == 9 + 5
    cells = {"12": "1 of 10", "34": "1 of 10", "5": "1 of 10", "6789": "1 of 15"}
    for numbers, share in cells.items():
        for number in numbers:
            assert rows[number, "0 to 4"]["verdict"].startswith(f"open: {share} cells ")
    for number in "12345":
        assert rows[number, "fresh"]["verdict"] == "open: 0 of 8 cells have their seeds"
    assert {row["statistic"] for row in rows.values()} == {row["beside"] for row in rows.values()} == {"-"}
    assert {row["p one-sided, two-sided, Holm's"] for row in rows.values()} == {"-, -, -"}

    # A run that diverged counts, with the random policy's returns for what it lacks.
    (tmp_path / "Hopper-v4" / "ds-td3" / "seed3" / "diverged").touch()
    assert verdicts_of(tmp_path)["1", "0 to 4"]["verdict"].startswith("open: 2 of 10 cells ")
    run = analysis.counted(analysis.read_results(tmp_path), "Hopper-v4", "ds-td3")[3]
    assert analysis.return_score(run, RANDOM["Hopper-v4"]) == pytest.approx(0)
    area = (sum(CURVE[:50]) + 151 * RANDOM["Hopper-v4"]) / 1e6
    base = 201 * RANDOM["Hopper-v4"] / 1e6
    assert analysis.lca_score(run, RANDOM["Hopper-v4"]) == pytest.approx((area - base) / (0.4788 - base))
    assert analysis.steps_to_score(run, RANDOM["Hopper-v4"]) == 1_000_000


def test_verdicts_are_open_without_the_random_policy(tmp_path, monkeypatch):
    write_grid(tmp_path, range(5), "0" * 40)
    monkeypatch.setattr(analysis, "ROOT", tmp_path)
    rows = verdicts_of(tmp_path)
    assert {rows[n, "0 to 4"]["verdict"] for n in "123456789"} == {"open: there is no random_policy.csv"}
    shutil.copy(NOTEBOOK.parent / "results" / "random_policy.csv", tmp_path)
    rows = verdicts_of(tmp_path)
    assert rows["1", "0 to 4"]["verdict"] == "**confirmed**"
    assert rows["6", "0 to 4"]["verdict"] == "open: a cell has no two seeds"


@pytest.mark.parametrize(("row", "claim"), [("return", analysis.ACROSS_TASKS[0]), ("LCA", analysis.ACROSS_TASKS[1])])
@pytest.mark.parametrize(
    ("column", "five"), [("seeds 0 to 2", ()), ("with DS-TD3's five on HalfCheetah", [("HalfCheetah-v4", "ds-td3")])]
)
def test_what_had_been_seen_before_the_rules_is_what_their_page_says(published, row, claim, column, five):
    page = (NOTEBOOK.parent / "results" / "rules.md").read_text()
    seen = read_table(page[page.index("| | seeds 0 to 2") : page.index("All of claims.md")])
    x, y = (
        [
            np.array([claim.measure(runs[seed], RANDOM[env]) for seed in range(5 if (env, method) in five else 3)])
            for env in ENVIRONMENTS
            for runs in [analysis.counted(published, env, method)]
        ]
        for method in ("ds-td3", "td3")
    )
    for (env, method), former in FORMER.items():
        random, paper = RANDOM[env], PAPERS_TD3[env]
        if row == "LCA":
            random, paper = random * 201 / 1e6, analysis.PAPER_LCA[env][0]
        (y if method == "td3" else x)[ENVIRONMENTS.index(env)][0] = analysis.normalise(former[row], random, paper)
    verdict = analysis.verdict_across_tasks(x, y)
    (cells,) = [cells for cells in seen if cells[""] == row]
    assert f"{verdict.statistic} ({verdict.one_sided:.3f}, {verdict.p:.3f})" == cells[column]


def test_verdicts_on_whole_results(whole):
    """Twenty-five pairs a task, all won or lost where the made-up methods are far apart."""
    tables, written = whole
    rows = {(row["claim"].split(".")[0], row["seeds"]): row for row in tables["verdicts"]}
    separate = 2 / math.comb(10, 5) ** 5
    for number in "1", "3":
        row = rows[number, "0 to 4"]
        assert (row["verdict"], row["statistic"]) == ("**confirmed**", "1.00 [1.00, 1.00]")
        one_sided, two_sided, corrected = map(float, row["p one-sided, two-sided, Holm's"].split(", "))
        assert (one_sided, two_sided) == pytest.approx((separate / 2, separate), rel=0.05)
        assert corrected > two_sided
    # Claim 5, from the files: at a score of 0.9, DS-TD3's steps against 0.6 of TD3's.
    shares = []
    for env in ENVIRONMENTS:
        level, steps = RANDOM[env] + 0.9 * (PAPERS_TD3[env] - RANDOM[env]), {}
        for method, seed in itertools.product(("ds-td3", "td3"), range(5)):
            returns = written[env, method, seed]
            reached = (5000 * i for i in range(9, 201) if statistics.mean(returns[i - 9 : i + 1]) >= level)
            steps[method, seed] = next(reached, 1_000_000)
        pairs = itertools.product(range(5), range(5))
        shares.append(statistics.mean(steps["ds-td3", x] < 0.6 * steps["td3", y] for x, y in pairs))
    assert rows["5", "0 to 4"]["statistic"].startswith(f"{statistics.mean(shares):.2f} [")
    saved = statistics.mean(steps["ds-td3", s] - steps["td3", s] for s in range(5)) / 1e6  # on Humanoid
    shown = re.search(r"mean steps in millions .*Humanoid-v4 (-?[\d.]+) \[", rows["5", "0 to 4"]["beside"])[1]
    assert float(shown) == pytest.approx(saved, abs=0.0051)
    assert "level 0.9, factor 0.5 " in rows["5", "0 to 4"]["beside"]
    # Interquartile mean of DS-TD3's scores, of 25 the middle 13.
    final = final_returns(written)
    scores = sorted(
        (final[env, "ds-td3", seed] - RANDOM[env]) / (PAPERS_TD3[env] - RANDOM[env])
        for env in ENVIRONMENTS
        for seed in range(5)
    )
    assert f"interquartile means {statistics.mean(scores[6:-6]):.2f} [" in rows["1", "0 to 4"]["beside"]
    shown = {(row["environment"], row["method"], row["seed"]): row for row in tables["scores"]}
    assert len(shown) == 75 and shown["Humanoid-v4", "DS-TD3", "4"]["steps to 0.9"] == f"{steps['ds-td3', 4]:,}"
    of_ds_td3 = sorted(float(row["return"]) for (_, method, _), row in shown.items() if method == "DS-TD3")
    assert of_ds_td3 == pytest.approx(scores, abs=0.0051)
    # HalfCheetah alone: the made-up rivals are all alike, and all score far below 0.9.
    assert rows["8", "0 to 4"]["verdict"] == "**confirmed**"
    assert rows["9", "0 to 4"]["beside"].startswith("after 500,000 steps ")
    for number in "6", "7":
        assert rows[number, "0 to 4"]["statistic"].count("[") == 3
    # None of these runs knows the rules.
    assert all(rows[number, "fresh"]["verdict"] == "open: 0 of 8 cells have their seeds" for number in "12345")


def test_nothing_published_is_left_out(published):
    assert not published.left_out


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", NOTEBOOK.parent, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_fresh_verdicts_take_the_runs_whose_code_held_the_rules(tmp_path):
    rules = git("log", "--diff-filter=A", "--format=%H", "--", "results/rules.md").split()[-1]
    before = git("rev-parse", f"{rules}^")
    write_grid(tmp_path, (0, 1, 2), before)
    write_grid(tmp_path, (3, 4), git("rev-parse", "HEAD") + "-dirty")
    rows = verdicts_of(tmp_path)
    expected = 2 / math.comb(4, 2) ** 4
    for number in "1234":
        assert (rows[number, "fresh"]["verdict"], rows[number, "fresh"]["statistic"]) == (
            ("**confirmed**", "1.00 [1.00, 1.00]")
        )
        p = [float(x) for x in rows[number, "fresh"]["p one-sided, two-sided, Holm's"].split(", ")]
        assert p[:2] == pytest.approx([expected / 2, expected], rel=0.05) and p[2] >= p[1]
        assert "HalfCheetah" not in rows[number, "fresh"]["beside"]
    # DS-TD3 reaches the level after 2/3 of a rise that ends 1/1.5 as late: less than 0.6 of TD3's steps.
    assert rows["5", "fresh"]["verdict"] == "**confirmed**"
    run = analysis.read_results(tmp_path).runs[0]
    made_by = {"0" * 40: False, before: False, rules: True, git("rev-parse", "HEAD"): True}
    for commit, fresh in made_by.items():
        assert analysis.is_fresh(run._replace(sessions=[{"commit": commit}, {"commit": "HEAD"}])) == fresh


def test_a_verdict_across_tasks_needs_the_interval_and_the_exact_test():
    low, high = [np.arange(5.0)] * 5, [np.arange(10.0, 15)] * 5
    assert analysis.verdict_across_tasks(high, low).words == "confirmed"
    refuted = analysis.verdict_across_tasks(low, high)
    assert refuted.words == "refuted" and refuted.one_sided == pytest.approx(1)
    assert analysis.verdict_across_tasks(low, low).words == "not shown"
    # Two seeds on one task: the interval lies above 0.5, but the exact p is 1/3.
    verdict = analysis.verdict_across_tasks([np.array([3.0, 4])], [np.array([1.0, 2])])
    assert (verdict.words, verdict.statistic, verdict.p) == ("not shown", "1.00 [1.00, 1.00]", pytest.approx(1 / 3))


def test_a_verdict_over_rivals_needs_all_to_confirm_and_one_to_refute():
    x = np.array([1.0, 1.1, 0.9])
    worse, equal, better = x - 1, x[::-1] + 0.01, x + 1
    confirmed = analysis.verdict_over_rivals(x, [worse, worse - 1, worse - 2])
    assert confirmed.words == "confirmed"
    assert confirmed.p == pytest.approx(stats.ttest_ind(x, worse, equal_var=False).pvalue)  # the largest
    not_shown = analysis.verdict_over_rivals(x, [worse, equal, worse])
    assert not_shown.words == "not shown" and not_shown.p == 1  # three times that of the only one that is not behind
    refuted = analysis.verdict_over_rivals(x, [worse, better, worse])
    assert refuted.words == "refuted"
    assert refuted.p == pytest.approx(3 * stats.ttest_ind(x, better, equal_var=False).pvalue)
    # An interval of 95 % below zero, but not one of 1 - 0.05/3.
    ahead = x + 0.25
    p = stats.ttest_ind(x, ahead, equal_var=False).pvalue
    assert 0.05 / 3 < p < 0.05
    assert analysis.verdict_over_rivals(x, [worse, ahead, worse]).words == "not shown"
    assert analysis.verdict_over_rivals(x, [ahead]).words == "refuted"


@pytest.mark.parametrize(("mean", "words"), [(0.5, "confirmed"), (0.9, "not shown"), (1.3, "refuted")])
def test_a_verdict_below_a_level_goes_by_students_interval(mean, words):
    verdict = analysis.verdict_below(mean + np.array([-0.1, 0, 0.1, 0.05]), 0.9)
    assert verdict.words == words


# ----------------------------------------------------------------------------------------------------------------------
# One's own runs beside the published
# ----------------------------------------------------------------------------------------------------------------------


def test_the_command_draws_ones_own_runs_beside_the_published_and_prints_the_differences(tmp_path):
    rng, own, published = random.Random(2), tmp_path / "own", tmp_path / "published"
    written = {}
    for method, final in (("td3", 2000), ("ds-td3", 3000)):
        for seed in range(3):
            written[method, seed] = learning(rng, final, 3)
            write_run(published, "Hopper-v4", method, seed, written[method, seed])
    for seed in range(3):
        written["own", seed] = learning(rng, 2500, 3)
        write_run(own, "Hopper-v4", "ds-td3", seed, written["own", seed])
    short = learning(rng, 1000, 3, 21)
    write_run(own, "Hopper-v4", "my-td3_my-option=0.1_total-timesteps=100000", 0, short, total=100_000)
    write_run(own, "Swimmer-v5", "td3", 0, CURVE)
    cut_lines(write_run(own, "Ant-v4", "td3", 0, CURVE) / "evaluations.csv", 50)

    code, output, error = run_here(analysis.main, "analysis.py", own, "--beside", published)
    assert code == 0, error
    assert error.startswith("analysis.py: left out: ") and f"{own}/Ant-v4/td3/seed0" in error
    rows = read_table(output)
    assert rows == read_table((own / "tables" / "beside.md").read_text())
    assert [(r["environment"], r["setting"], r["seeds"]) for r in rows[::2]] == [
        ("Hopper-v4", "DS-TD3", "3"),
        ("Hopper-v4", "my-td3 my-option 0.1, total-timesteps 100,000", "1"),
        ("Swimmer-v5", "TD3", "1"),
    ]
    ours, theirs = (final_returns({(m, s): written[m, s] for s in range(3)}) for m in ("own", "td3"))
    test = stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False)
    expected = statistics.mean(ours.values()) - statistics.mean(theirs.values()), *test.confidence_interval(0.95)
    assert rows[0]["less published TD3"] == "{:,.0f} [{:,.0f}, {:,.0f}]".format(*expected)
    assert rows[0]["less the same published"] == rows[0]["less published DS-TD3"] != "-"
    assert rows[0]["less published Static-TD3"] == "-"
    # A shorter run is held against as many steps of the published ones.
    until = statistics.mean(statistics.mean(written["td3", seed][11:21]) for seed in range(3))
    assert rows[2]["less published TD3"] == f"{statistics.mean(short[-10:]) - until:,.0f}"
    area = sum(short) / 1e5 - statistics.mean(sum(written["td3", seed][:21]) / 1e5 for seed in range(3))
    assert rows[3]["less published TD3"] == f"{area:,.3f}"
    assert rows[2]["less the same published"] == "-"
    assert {rows[4][name] for name in rows[4] if name.startswith("less")} == {"-"}
    for suffix in ("png", "pdf"):
        assert (own / "figures" / f"beside.{suffix}").stat().st_size > 1000
    panels = analysis.plot_beside(*map(analysis.read_results, (own, published))).figure.axes
    assert [axes.get_title() for axes in panels[:2]] == ["Hopper-v4 (3, 3, 3, 1 seeds)", "Swimmer-v5 (1 seed)"]
    drawn = [text.get_text().replace("\n", " ") for text in panels[2].get_legend().get_texts()]
    named = (
        "TD3, published",
        "DS-TD3, published",
        "DS-TD3, ours",
        "my-td3 my-option 0.1, total-timesteps 100,000, ours",
        "TD3, ours",
    )
    assert drawn == list(named)


def test_each_length_of_ones_own_runs_has_a_row_and_a_rule_of_ones_own_its_baseline(tmp_path):
    own, published = tmp_path / "own", tmp_path / "published"
    for final, folder in ((1000, "ds-td3"), (2000, "ds-td3_sparsity=0.9")):
        write_run(published, "Hopper-v4", folder, 0, [final] * 201)
    rule = "ds-td3_sparsity=0.9_rule=momentum"
    write_run(own, "Hopper-v4", rule, 0, [2500] * 201)
    write_run(own, "Hopper-v4", f"{rule}_total-timesteps=100000", 0, [2700] * 21, total=100_000)
    write_run(own, "Hopper-v4", "ds-td3_learning-rate=0.01", 0, [900] * 201)
    write_run(own, "Hopper-v4", "ds-td3_total-timesteps=3000", 0, [100] * 4, total=3000, interval=1000)
    own, published = map(analysis.read_results, (own, published))
    rows = read_table(str(analysis.table_beside(own, published)))[::2]
    columns = ("steps", "less the same published", "less published DS-TD3")
    assert {row["setting"]: tuple(row[name] for name in columns) for row in rows} == {
        "DS-TD3 sparsity 0.9, rule momentum": ("1,000,000", "500", "1,500"),
        "DS-TD3 sparsity 0.9, rule momentum, total-timesteps 100,000": ("100,000", "700", "1,700"),
        "DS-TD3 learning-rate 0.01": ("1,000,000", "-", "-100"),
        "DS-TD3 total-timesteps 3,000, eval-interval 1,000": ("3,000", "-", "-"),
    }
    legend = analysis.plot_beside(own, published).figure.axes[-1].get_legend()
    drawn = [text.get_text() for text in legend.get_texts()]
    assert "DS-TD3 sparsity 0.9, published" in drawn and len(drawn) == 6


@pytest.mark.parametrize("missing", ["own", "published"])
def test_the_command_refuses_a_folder_without_a_finished_run(tmp_path, missing):
    for name in {"own", "published"} - {missing}:
        write_run(tmp_path / name, "Hopper-v4", "td3", 0, CURVE)
    answer = run_here(analysis.main, "analysis.py", tmp_path / "own", "--beside", tmp_path / "published")
    said = f"analysis.py: error: {tmp_path / missing} has no finished run that can be read\n"
    assert answer == (2, "", said)
    assert not (tmp_path / "own" / "figures").exists()
