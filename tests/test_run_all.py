"""run_all.sh: the grid, the quick pipeline stopped, failing and resumed, and Slurm."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ADAPTING_RECIPE, FIGURES, FOUR, RECIPE
from gymnasium.wrappers import TimeLimit

import dst_sac
import dst_td3
import high_sparsity
from dst_td3 import run_directory

REPOSITORY = Path(dst_td3.__file__).parent
SCRIPT = REPOSITORY / "run_all.sh"
TABLES = (
    *("coverage", "table1_lca", "table2_return", "compute", "steps_to_dense", "aggregate", "provenance"),
    *("appendix_lca", "appendix_return", "verdicts"),
)
PROGRAMS = {
    "dst_td3.py": dst_td3.Arguments,
    "dst_sac.py": dst_sac.SACArguments,
    "high_sparsity.py": high_sparsity.HighSparsityArguments,
}


def environment(*folders: Path) -> dict[str, str]:
    """Return an environment in which commands come from ``folders``, then from beside this interpreter."""
    path = os.pathsep.join(map(str, (*folders, Path(sys.executable).parent, os.environ["PATH"])))
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix}


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [str(SCRIPT), *map(str, arguments)]
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, **options)


def run_all(*arguments: object, **options) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def parsed(command: str) -> dst_td3.Arguments:
    """Return the arguments of a command of the list as its program resolves them, which also checks every option."""
    python, program, *words = command.split()
    assert python == "python"
    return dst_td3.resolve(dst_td3.tyro.cli(PROGRAMS[program], args=words))


def commands(*options: object) -> list[dst_td3.Arguments]:
    """Return the arguments of every command of the list."""
    return [parsed(line) for line in lines(*options)]


def lines(*options: object, **further) -> list[str]:
    """Return the list."""
    code, out, err = run_all("--list", *options, **further)
    assert code == 0, err
    return out.splitlines()


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put a command of this name into a folder for the PATH: a script of the shell."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# ----------------------------------------------------------------------------------------------------------------------
# The script and its list
# ----------------------------------------------------------------------------------------------------------------------


def test_is_valid_bash():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=environment()["PATH"])
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_list_covers_the_papers_grid_once():
    listed = commands()
    cheetah, papers = "HalfCheetah-v4", dst_td3.Arguments.PAPER_LAMBDA
    expected = {(env, method, "") for env in papers for method in ("td3", "static-td3", "ds-td3")}
    expected |= {(cheetah, "ds-td3", f"_adapt-interval={e}") for e in (200, 500, 2000)}
    expected |= {(cheetah, "ds-td3", f"_sparsity={s}") for s in (0.25, 0.5, 0.8)}
    for method in ("td3", "ds-td3"):
        expected |= {(cheetah, method, f"_initial-policy=policy-{step}") for step in (500_000, 700_000)}
    expected |= {(env, method, "") for env in papers for method in ("ds-sac", "sac")}
    recipe, recipes = f"_{RECIPE}", ("", f"_{ADAPTING_RECIPE}")
    expected |= {(env, "ds-td3", f"_sparsity={s}{r}") for env in FOUR for s in (0.9, 0.95) for r in recipes}
    expected |= {(env, method, f"_sparsity=0.9{recipe}") for env in FOUR for method in ("ds-td3", "static-td3")}
    expected |= {(env, "td3", recipe) for env in (cheetah, "Walker2d-v4")}
    expected |= {(cheetah, "td3", f"_hidden=77,77{recipe}")}
    found = [(a.env, a.method, dst_td3.run_name(a).removeprefix(a.method), a.seed) for a in listed]
    assert sorted(found) == sorted((*setting, seed) for setting in expected for seed in range(5))
    assert all(a.total_timesteps == 1_000_000 and a.threads == 1 for a in listed)
    # Every setting has one seed before any has two.
    assert [a.seed for a in listed] == sorted(a.seed for a in listed)
    # Figure 4's policies come from runs further up, which keep them.
    for place, args in enumerate(listed):
        if args.initial_policy is not None:
            (source,) = [a for a in listed[:place] if run_directory(a) == args.initial_policy.parent]
            assert int(args.initial_policy.stem.split("-")[1]) in source.snapshot_at
            assert (source.env, source.method, source.seed) == (args.env, args.method, args.seed)


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (["fig1"], 15),
        (["tables"], 15),
        (["fig2"], 5),
        (["fig3"], 4),
        (["fig4"], 6),
        (["fig5"], 35),
        (["fig5", "static-td3"], 4),
        (["appendix"], 10),
        (["Hopper-v4"], 11),
        (["static-td3"], 9),
        (["fig1", "Hopper-v4"], 3),
        (["fig4", "td3"], 3),
        (["appendix", "Ant-v4"], 2),
        (["sac"], 5),
    ],
)
def test_only_narrows_to_what_a_figure_needs(tmp_path, only, count):
    # It narrows the rows of the grid; this python says which ones it is to make commands of.
    stand_in(tmp_path, "python", 'printf %s "$2"')
    rows = [row.split() for row in lines(*(f"--only={name}" for name in only), env=environment(tmp_path))]
    assert len(rows) == count
    for env, method, *further in rows:
        if "--initial-policy" in further:
            (kept,) = [row for row in rows if row[:2] == [env, method] and "--snapshot-at" in row]
            assert further[further.index("--initial-policy") + 1] in kept


def test_shorter_runs_scale_what_figure_4_begins_with():
    listed = commands("--only", "fig4", "--seeds", 1, "--steps", 300_000)
    assert {a.total_timesteps for a in listed} == {300_000}
    assert {a.initial_policy.stem for a in listed if a.initial_policy} == {"policy-150000", "policy-210000"}
    assert {a.snapshot_at for a in listed if not a.initial_policy} == {(150_000, 210_000)}


def test_quick_results_stay_apart():
    assert {a.results_dir for a in commands("--quick", "--results-dir", "somewhere")} == {Path("somewhere/quick")}


def test_list_estimates_the_time_from_finished_runs(tmp_path):
    _, _, unknown = run_all("--list", "--results-dir", tmp_path)
    assert "310 runs of 1000000 steps, 310 of them not finished" in unknown and unknown.count("unknown") == 2
    run = tmp_path / "Hopper-v4" / "td3" / "seed0"
    run.mkdir(parents=True)
    summary = {"steps": 1_000_000, "training_seconds": 3000.0, "evaluation_seconds": 600.0}
    (run / "summary.json").write_text(json.dumps(summary, indent=2))
    _, _, estimate = run_all("--list", "--results-dir", tmp_path)
    assert "309 of them not finished" in estimate
    assert "TD3: about 260.0 core-hours for all 260, 259.0 for the 259 missing ones (by 1 finished run" in estimate
    assert "SAC: no run is finished yet" in estimate
    # SAC's runs have costs of their own.
    run = tmp_path / "Hopper-v4" / "ds-sac_sparsity=0.5" / "seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(summary | {"training_seconds": 6600.0}, indent=2))
    _, _, estimate = run_all("--list", "--results-dir", tmp_path)
    assert "TD3: about 260.0 core-hours for all 260, 259.0 for" in estimate
    assert "SAC: about 100.0 core-hours for all 50, 100.0 for the 50 missing ones (by 1 finished run" in estimate
    # Where a setting has finished runs, they tell of it, and all together of the others.
    run = tmp_path / "Humanoid-v4" / "td3" / "seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(summary | {"training_seconds": 10200.0}, indent=2))
    _, _, estimate = run_all("--list", "--results-dir", tmp_path)
    hours = {"Hopper-v4 td3": 5 * 1, "Humanoid-v4 td3": 5 * 3, "all others": 250 * 2}
    assert f"TD3: about {sum(hours.values()):.1f} core-hours for all 260, {sum(hours.values()) - 4:.1f} for" in estimate


def test_list_knows_where_each_run_is(tmp_path):
    options = ("--list", "--seeds", 1, "--results-dir", tmp_path)
    for args in commands(*options):
        run_directory(args).mkdir(parents=True)
        (run_directory(args) / "summary.json").write_text("{}")
    assert "62 runs of 1000000 steps, 0 of them not finished" in run_all(*options)[2]
    # A run of another length has a directory of its own.
    assert "62 runs of 300000 steps, 62 of them not finished" in run_all(*options, "--steps", 300_000)[2]


def test_list_comes_even_where_a_run_is_damaged(tmp_path):
    options = ("--list", "--seeds", 1, "--results-dir", tmp_path)
    listed = run_all(*options)
    damaged = run_directory(parsed(listed[1].splitlines()[0]))
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{")
    assert run_all(*options) == listed


def test_a_row_takes_any_options(tmp_path):
    rows = (
        "fig1  Hopper-v4  ds-td3  --hidden 32 32 --snapshot-at 50% 70% --sparsity 0.8",
        "fig4  Hopper-v4  ds-td3  high_sparsity.py --drop-by magnitude --initial-policy 70% --hidden 32 32",
        "fig4  Hopper-v4  ds-td3  --sparsity 0.8 --initial-policy 70% --hidden 32 32",
    )
    script, edited = SCRIPT.read_text(), tmp_path / "run_all.sh"
    edited.write_text(re.sub('(?s)(?<=grid="\n).*?(?=")', "\n".join(rows), script))
    for program in PROGRAMS:
        (tmp_path / program).symlink_to(REPOSITORY / program)
    said = subprocess.run(["bash", edited, "--list", "--seeds", "1"], env=environment(), capture_output=True, text=True)
    first, other, last = (parsed(line) for line in said.stdout.splitlines())
    assert (first.sparsity, first.hidden, first.snapshot_at) == (0.8, (32, 32), (500_000, 700_000))
    assert last.initial_policy == run_directory(first) / "policy-700000.npz"
    # A policy is that of the run which is otherwise the same.
    assert other.initial_policy == run_directory(dataclasses.replace(other, initial_policy=None)) / "policy-700000.npz"
    assert (other.drop_by, other.recycle_dormant, other.hidden) == ("magnitude", True, (32, 32))


def test_list_names_what_the_environment_lacks(tmp_path):
    stand_in(tmp_path, "python", f'exec {sys.executable} -I -S "$@"')
    code, out, err = run_all("--list", env=environment(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No module named" in err and "activate the environment of requirements.txt" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "fig9"], "no run matches --only fig9:"),
        (["--only", "Ant-v4", "--only", "fig2"], "no run matches --only Ant-v4 fig2:"),
        (["--seeds", "0"], "--seeds must be a positive whole number, not 0"),
        (["--steps", "1e6"], "--steps must be a positive whole number, not 1e6"),
        (["--steps", "25000"], "--steps must be at least 25001"),
        (["--jobs", "many"], "--jobs must be a positive whole number"),
        (["--jobs"], "--jobs needs a value"),
        (["--results-dir", "my results"], "--results-dir must be a path without spaces"),
        (["--results-dir", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--line", "311"], "--line must be at most 310"),
        (["--fast"], "there is no option --fast"),
        (["fig1"], "there is no option fig1"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, said):
    code, out, err = run_all(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("run_all.sh: error: ") and err.count("\n") == 1 and said in err


def test_line_runs_one_line_of_the_list(tmp_path):
    options = ("--quick", "--steps", 20, "--only", "Hopper-v4", "--results-dir", tmp_path)
    code, out, err = run_all(*options, "--line", 2)
    assert code == 0, err
    (summary,) = tmp_path.rglob("summary.json")
    assert summary.parent == run_directory(commands(*options)[1])
    assert out.startswith("python dst_td3.py --env Hopper-v4 --method td3")


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline
# ----------------------------------------------------------------------------------------------------------------------


def made_at(results: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in results.rglob("summary.json")}


def test_quick_pipeline_stopped_then_failing_then_whole(command_line, tmp_path, monkeypatch):
    """One pass through the whole grid, from an empty folder to every figure, with everything that can come between."""
    options = ("--quick", "--seeds", 1, "--steps", 40, "--jobs", 2, "--results-dir", tmp_path)
    listed = {parsed(line): line for line in lines(*options)}
    # Measuring speed takes a minute of its own; what is there already is not measured again.
    (tmp_path / "quick" / "benchmarks").mkdir(parents=True)
    (tmp_path / "quick" / "benchmarks" / "updates.csv").write_text(
        "implementation,width,sparsity,microseconds,state_bytes\nsparse engine,256,0.5,1700,5e6\n"
    )

    # Stopped in the middle, it leaves nothing running and says how to go on.
    process = start(*options)
    while len(made_at(tmp_path)) < 2 and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"to go on: ./run_all.sh {' '.join(map(str, options))}" in out
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    before = made_at(tmp_path)
    assert 2 <= len(before) < len(listed)

    # Left to the script are the runs that it has begun, those that begin with another's policy, and one of dst_sac.py.
    # The others are made here, which takes no start of python for each, and in short episodes.
    evaluate = dst_td3.evaluate
    monkeypatch.setattr(dst_td3, "evaluate", lambda act, env, *rest: evaluate(act, TimeLimit(env, 50), *rest))
    for args, line in listed.items():
        last = (args.env, args.method) == ("Humanoid-v4", "ds-sac")
        if not (run_directory(args).exists() or args.initial_policy or last):
            _, program, *words = line.split()
            code, _, error = command_line(*words, kind=PROGRAMS[program])
            assert code == 0, error
    before |= made_at(tmp_path)

    # A run that cannot be made stops no other; those that begin with its policy are named too.
    blocked = run_directory(next(a for a in listed if (a.env, a.method) == ("HalfCheetah-v4", "td3")))
    set_aside = tmp_path / "set-aside"
    if blocked.exists():
        blocked.rename(set_aside)
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("no folder")
    code, _, err = run_all(*options)
    assert code == 1
    failed = [line for line in err.splitlines() if line.startswith("  ")]
    assert err.startswith("3 failed") and len(failed) == 3
    assert sum("td3_total-timesteps=40" in line and "cannot use" in line for line in failed) == 1
    assert sum("policy-20.npz, which the run in that folder did not leave" in line for line in failed) == 1
    assert sum("policy-28.npz, which the run in that folder did not leave" in line for line in failed) == 1
    assert all(Path(line.split(":")[0].strip()).is_file() for line in failed)
    partial = made_at(tmp_path)
    assert len(partial) >= len(listed) - 4
    assert partial.items() >= {p: t for p, t in before.items() if blocked not in p.parents}.items()
    assert (tmp_path / "quick" / "figures" / "fig1_learning_curves.png").stat().st_size > 10_000

    # Again, it makes what is missing and nothing else.
    blocked.unlink()
    if set_aside.exists():
        set_aside.rename(blocked)
    code, out, err = run_all(*options)
    assert (code, err) == (0, ""), out
    whole = made_at(tmp_path)
    assert {path.parent for path in whole} == {run_directory(a) for a in listed}
    assert whole.items() >= {p: t for p, t in partial.items() if p.is_relative_to(tmp_path / "quick")}.items()
    for kind, suffix, names in (("figures", "png", FIGURES), ("figures", "pdf", FIGURES), ("tables", "md", TABLES)):
        for name in names:
            assert (tmp_path / "quick" / kind / f"{name}.{suffix}").stat().st_size > 0
    assert "missing" not in (tmp_path / "quick" / "tables" / "coverage.md").read_text().replace("seeds missing", "")
    assert json.loads((tmp_path / "quick" / "analysis.ipynb").read_text())["cells"]


# ----------------------------------------------------------------------------------------------------------------------
# Slurm
# ----------------------------------------------------------------------------------------------------------------------


def test_slurm_submits_what_is_missing(tmp_path):
    """What sbatch is asked to do, by a stand-in that writes it down."""
    tools, results = tmp_path / "bin", tmp_path / "results"
    stand_in(tools, "sbatch", f'printf "%s\\n" "$@" --- >>{tmp_path}/asked\necho 7')
    options = ("--quick", "--seeds", 1, "--only", "fig4", "--results-dir", results)
    listed = commands(*options)
    finished = run_directory(listed[0])
    finished.mkdir(parents=True)
    (finished / "summary.json").write_text("{}")
    (finished / f"{listed[2].initial_policy.stem}.npz").write_text("")

    code, out, err = run_all(*options, "--slurm", "--slurm-options", "--time=1:00 -p x", env=environment(tools))
    assert code == 0, err
    first, second = (tmp_path / "asked").read_text().split("---\n")[:-1]
    # Line 2 trains the other policy, line 3 has its policy already; the others wait for theirs.
    assert "--array=2,3\n" in first and "--dependency" not in first
    assert "--array=4,5,6\n" in second and "--dependency=afterany:7\n" in second
    for asked in (first, second):
        assert "--requeue\n" in asked and "--time=1:00\n-p\nx\n" in asked
    # The task's list must be the very same list.
    (wrapped,) = {re.search(r"exec \./run_all\.sh (.*) --line \$SLURM_ARRAY_TASK_ID", x)[1] for x in (first, second)}
    assert commands(*wrapped.split()) == listed
    assert "without --slurm" in out


def test_slurm_is_refused_where_there_is_none(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "nproc", "mkdir", "cat", "env"):
        (tools / name).symlink_to(shutil.which(name))
    stand_in(tools, "python", 'printf %s "$2"')
    env = {**environment(), "PATH": str(tools)}
    code, _, err = run_all("--slurm", "--results-dir", tmp_path / "results", env=env)
    assert code == 2 and "--slurm needs sbatch" in err


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no Slurm on this machine",
)
def test_slurm_task_requeued_in_the_middle_ends_with_the_same_bytes(tmp_path):
    one_run = (f"--only={name}" for name in ("fig1", "Hopper-v4", "ds-td3"))
    options = ("--quick", "--seeds", 1, "--steps", 3000, *one_run)
    here, there = tmp_path / "here", tmp_path / "there"
    code, _, err = run_all(*options, "--results-dir", here, "--line", 1)
    assert code == 0, err

    code, out, err = run_all(*options, "--results-dir", there, "--slurm")
    assert code == 0, err
    job = re.search(r"submitted job array (\d+)", out)[1]
    _, command, _ = run_all(*options, "--results-dir", there, "--list")
    run = run_directory(commands(*options, "--results-dir", there)[0])

    def wait_until(condition) -> None:
        deadline = time.time() + 300
        while not condition():
            assert time.time() < deadline, slurm("scontrol", "show", "job", job)
            time.sleep(0.3)

    # Past the first evaluations of a learning agent, but well before the end.
    evaluations = run / "evaluations.csv"
    wait_until(lambda: evaluations.exists() and len(evaluations.read_text().splitlines()) > 5)
    slurm("scontrol", "requeue", f"{job}_1")
    wait_until(lambda: (run / "checkpoint.npz").exists())
    assert not (run / "summary.json").exists()
    # Slurm holds a requeued task back for two minutes unless it is asked to go on.
    wait_until(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", f"{job}_1"))
    slurm("scontrol", "update", f"jobid={job}_1", "starttime=now")
    wait_until(lambda: (run / "summary.json").exists())
    log = next((there / "quick" / "logs").glob("slurm-*.log")).read_text()
    assert "stopped by SIGTERM" in log and log.splitlines().count(command.strip()) == 2
    (unbroken,) = here.rglob("evaluations.csv")
    assert evaluations.read_bytes() == unbroken.read_bytes()
