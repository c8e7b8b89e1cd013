"""campaign.py and run_all.sh: the grid, runs that are stopped, fail and go on, another's program, and Slurm."""

import dataclasses
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gymnasium.wrappers import TimeLimit
from running import ADAPTING_RECIPE, AS_RLX2, FIGURES, FOUR, RECIPE, run_here

import campaign
import dst_sac
import dst_td3
import high_sparsity
import jobs
from dst_td3 import run_directory

REPOSITORY = Path(dst_td3.__file__).parent
SCRIPT = REPOSITORY / "run_all.sh"
TABLES = (
    *("coverage", "table1_lca", "table2_return", "compute", "steps_to_dense", "provenance"),
    *("appendix_lca", "appendix_return", "verdicts"),
)
PROGRAMS = {
    "dst_td3.py": dst_td3.Arguments,
    "dst_sac.py": dst_sac.SACArguments,
    "high_sparsity.py": high_sparsity.HighSparsityArguments,
}
# What follows --: networks so small that a run is little more than the start of its process.
TINY = ("--", "--engine", "masked", "--hidden", "8", "8", "--batch-size", "8")


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Stay in the repository, undo what a campaign sets in this process, and show times by no runs but a test's own."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("RESULTS_DIR", "")
    monkeypatch.setattr(campaign, "PUBLISHED", Path("nowhere"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def run_campaign(*arguments: object) -> tuple[int, str, str]:
    """Run a campaign from this process; return exit code, standard output and standard error."""
    return run_here(campaign.main, "campaign.py", *arguments)


def commands(*options: object) -> list[dst_td3.Arguments]:
    """Return the arguments of every command of the list."""
    code, out, err = run_campaign("--list", *options)
    assert code == 0, err
    return [parsed(line) for line in out.splitlines()]


def start(*arguments: object, **options) -> subprocess.Popen:
    """Start run_all.sh in a process of its own."""
    command = [str(SCRIPT), *map(str, arguments)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
    }
    options = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, **options)


def run_all(*arguments: object, **options) -> tuple[int, str, str]:
    """Run run_all.sh to its end."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def parsed(command: str) -> dst_td3.Arguments:
    """Return the arguments of a command of the list as its program resolves them, which also checks every option."""
    python, program, *words = shlex.split(command)
    assert python == "python"
    return dst_td3.resolve(dst_td3.tyro.cli(PROGRAMS.get(program, dst_td3.Arguments), args=words))


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for what other processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_script_finds_the_environment(tmp_path):
    """It takes the active one, else the one that `make` sets up beside it, else the python of the PATH."""
    tools, beside = tmp_path / "tools", tmp_path / "repository"
    tools.mkdir()
    (beside / ".venv" / "bin").mkdir(parents=True)
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    shutil.copy(SCRIPT, beside)
    # The program that is started in the place of campaign.py says in which python it is.
    (beside / "campaign.py").write_text("import sys; print(sys.orig_argv[0], *sys.argv[1:])")
    environment = {"PATH": str(tools)}

    def chosen(**further: str) -> list[str]:
        command = [beside / "run_all.sh", "--only", "a b"]
        ran = subprocess.run(command, env=environment | further, capture_output=True, text=True)
        return [str(ran.returncode), *(ran.stdout + ran.stderr).split(maxsplit=1)]

    assert chosen()[:2] == ["2", "run_all.sh:"] and "activate the environment of requirements.txt" in chosen()[2]
    (tools / "python").symlink_to(sys.executable)
    assert chosen() == ["0", str(tools / "python"), "--only a b\n"]
    (beside / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert chosen() == ["0", str(beside / ".venv" / "bin" / "python"), "--only a b\n"]
    assert chosen(VIRTUAL_ENV="active") == ["0", str(tools / "python"), "--only a b\n"]


def test_help_and_what_the_environment_lacks_take_no_package():
    """Both are said where no package is installed, the latter in one line."""
    bare = [sys.executable, "-E", "-S", "campaign.py"]
    helped = subprocess.run([*bare, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--slurm-options OPTIONS" in helped.stdout
    listed = subprocess.run([*bare, "--list"], capture_output=True, text=True)
    assert (listed.returncode, listed.stdout, listed.stderr.count("\n")) == (2, "", 1)
    assert "No module named" in listed.stderr and "activate the environment of requirements.txt" in listed.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The list
# ----------------------------------------------------------------------------------------------------------------------


def test_list_covers_the_papers_grid_once():
    listed = commands()
    cheetah, papers = "HalfCheetah-v4", [env for env in dst_td3.Arguments.PAPER_LAMBDA if env.endswith("-v4")]
    expected = {(env, method, "") for env in papers for method in ("td3", "static-td3", "ds-td3")}
    expected |= {(cheetah, "ds-td3", f"_adapt-interval={e}") for e in (200, 500, 2000)}
    expected |= {(cheetah, "ds-td3", f"_sparsity={s}") for s in (0.25, 0.5, 0.8)}
    for method in ("td3", "ds-td3"):
        expected |= {(cheetah, method, f"_initial-policy=policy-{step}") for step in (500_000, 700_000)}
    expected |= {(env, method, "") for env in papers for method in ("ds-sac", "sac")}
    recipe, recipes = f"_{RECIPE}", ("", f"_{ADAPTING_RECIPE}")
    expected |= {(env, "ds-td3", f"_sparsity={s}{r}") for env in FOUR for s in (0.9, 0.95) for r in recipes}
    expected |= {(env, method, f"_sparsity=0.9{recipe}") for env in FOUR for method in ("ds-td3", "static-td3")}
    three = f"_{ADAPTING_RECIPE}_n-step=3"
    expected |= {("Walker2d-v4", "ds-td3", f"_sparsity={s}{three}") for s in (0.9, 0.95)}
    as_rlx2 = {(env, f"_sparsity={a}_{ADAPTING_RECIPE}{n}_critic-sparsity={c}") for env, a, c, n in AS_RLX2}
    expected |= {(env, "ds-td3", name) for env, name in as_rlx2}
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
    ("env", "actor", "critics"),
    [
        ("HalfCheetah-v4", 0.9, 0.85),
        ("Walker2d-v4", 0.97, 0.95),
        ("Hopper-v4", 0.98, 0.95),
        ("Ant-v4", 0.96, 0.88),
    ],
)
def test_runs_as_sparse_as_rlx2_have_no_more_connections(env, actor, critics):
    """RLx2's sparsities count the output layers; its page and results/rules.md have these."""
    (args,) = [
        a for a in commands("--only", "fig5", "--only", env, "--seeds", 1) if getattr(a, "critic_sparsity", None)
    ]
    made = dst_td3.make_environment(env)
    sizes, kept = dst_td3.network_sizes(made, args), dst_td3.count_costs(made, args)["connections"]
    all_of_actor, all_of_critic = (sum(dst_td3.count_connections(widths)) for widths, _ in sizes)
    theirs = all_of_actor * (1 - actor) + 2 * all_of_critic * (1 - critics)
    assert 0.99 * theirs < kept <= theirs


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (["fig1"], 15),
        (["tables"], 15),
        (["fig2"], 5),
        (["fig3"], 4),
        (["fig4"], 6),
        (["fig5"], 41),
        (["fig5", "static-td3"], 4),
        (["appendix"], 10),
        (["Hopper-v4"], 12),
        (["static-td3"], 9),
        (["fig1", "Hopper-v4"], 3),
        (["fig4", "td3"], 3),
        (["appendix", "Ant-v4"], 2),
        (["sac"], 5),
    ],
)
def test_only_narrows_to_what_a_figure_needs(only, count):
    listed = commands("--seeds", 1, *(f"--only={name}" for name in only))
    assert len(listed) == count
    for args in listed:
        if args.initial_policy:
            (kept,) = [a for a in listed if run_directory(a) == args.initial_policy.parent]
            assert int(args.initial_policy.stem.split("-")[1]) in kept.snapshot_at


def test_shorter_runs_scale_what_figure_4_begins_with():
    listed = commands("--only", "fig4", "--seeds", 1, "--steps", 300_000)
    assert {a.total_timesteps for a in listed} == {300_000}
    assert {a.initial_policy.stem for a in listed if a.initial_policy} == {"policy-150000", "policy-210000"}
    assert {a.snapshot_at for a in listed if not a.initial_policy} == {(150_000, 210_000)}


def test_quick_results_stay_apart():
    assert {a.results_dir for a in commands("--quick", "--results-dir", "somewhere")} == {Path("somewhere/quick")}


def test_list_estimates_the_time_from_finished_runs(monkeypatch, tmp_path):
    _, _, unknown = run_campaign("--list", "--results-dir", tmp_path)
    assert "340 runs of 1000000 steps, 340 of them not finished" in unknown and unknown.count("unknown") == 2

    def finish(run: str, training_seconds: float) -> None:
        (tmp_path / run).mkdir(parents=True)
        summary = {"steps": 1_000_000, "training_seconds": training_seconds, "evaluation_seconds": 600.0}
        (tmp_path / run / "summary.json").write_text(json.dumps(summary, indent=2))

    finish("Hopper-v4/td3/seed0", 3000.0)
    _, _, estimate = run_campaign("--list", "--results-dir", tmp_path)
    assert "339 of them not finished" in estimate
    assert "TD3: about 290.0 core-hours for all 290, 289.0 for the 289 missing ones (by 1 finished run" in estimate
    assert "SAC: no run of half as many steps is finished" in estimate
    # SAC's runs have costs of their own.
    finish("Hopper-v4/ds-sac_sparsity=0.5/seed0", 6600.0)
    _, _, estimate = run_campaign("--list", "--results-dir", tmp_path)
    assert "TD3: about 290.0 core-hours for all 290, 289.0 for" in estimate
    assert "SAC: about 100.0 core-hours for all 50, 100.0 for the 50 missing ones (by 1 finished run" in estimate
    # Where a setting has finished runs, they tell of it, and all together of the others.
    finish("Humanoid-v4/td3/seed0", 10200.0)
    _, _, estimate = run_campaign("--list", "--results-dir", tmp_path)
    hours = {"Hopper-v4 td3": 5 * 1, "Humanoid-v4 td3": 5 * 3, "all others": 280 * 2}
    assert f"TD3: about {sum(hours.values()):.1f} core-hours for all 290, {sum(hours.values()) - 4:.1f} for" in estimate
    # A folder that knows nothing is told by the results that come with the repository, of runs of another length too.
    monkeypatch.setattr(campaign, "PUBLISHED", tmp_path)
    _, _, estimate = run_campaign("--list", "--steps", 500_000, "--results-dir", tmp_path / "empty")
    half = sum(hours.values()) / 2
    assert f"TD3: about {half:.1f} core-hours for all 290, {half:.1f} for the 290 missing ones (by 2 fini" in estimate
    assert f"runs in {tmp_path}, each" in estimate


def test_list_knows_where_each_run_is(tmp_path):
    options = ("--list", "--seeds", 1, "--results-dir", tmp_path)
    for args in commands(*options[1:]):
        run_directory(args).mkdir(parents=True)
        (run_directory(args) / "summary.json").write_text("{}")
    assert "68 runs of 1000000 steps, 0 of them not finished" in run_campaign(*options)[2]
    # A run of another length has a directory of its own.
    assert "68 runs of 300000 steps, 68 of them not finished" in run_campaign(*options, "--steps", 300_000)[2]


def test_list_comes_even_where_a_run_is_damaged(tmp_path):
    options = ("--list", "--seeds", 1, "--results-dir", tmp_path)
    listed = run_campaign(*options)
    damaged = run_directory(parsed(listed[1].splitlines()[0]))
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{")
    assert run_campaign(*options) == listed


def test_a_row_takes_any_options(monkeypatch):
    rows = (
        campaign.Row("fig1", "Hopper-v4", "ds-td3", ("--hidden 32 32 --snapshot-at 50% 70% --sparsity 0.8",)),
        campaign.Row(
            *("fig4", "Hopper-v4", "ds-td3", ("--drop-by magnitude --hidden 32 32",), "high_sparsity.py"),
            begins_with=70,
        ),
        campaign.Row("fig4", "Hopper-v4", "ds-td3", ("--sparsity 0.8 --hidden 32 32",), begins_with=70),
    )
    monkeypatch.setattr(campaign, "GRID", rows)
    first, other, last = commands("--seeds", 1)
    assert (first.sparsity, first.hidden, first.snapshot_at) == (0.8, (32, 32), (500_000, 700_000))
    assert last.initial_policy == run_directory(first) / "policy-700000.npz"
    # A policy is that of the run which is otherwise the same.
    assert other.initial_policy == run_directory(dataclasses.replace(other, initial_policy=None)) / "policy-700000.npz"
    assert (other.drop_by, other.recycle_dormant, other.hidden) == ("magnitude", True, (32, 32))


def test_results_may_lie_in_a_folder_with_spaces(tmp_path):
    folder = tmp_path / "my results"
    assert {args.results_dir for args in commands("--seeds", 1, "--results-dir", folder)} == {folder}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "fig9"], "no run matches --only fig9:"),
        (["--only", "Ant-v4", "--only", "fig2"], "no run matches --only Ant-v4 fig2:"),
        (["--seeds", "0"], "--seeds: must be a positive whole number, not 0"),
        (["--steps", "1e6"], "--steps: must be a positive whole number, not 1e6"),
        (["--steps", "25000"], "must be more than --learning-starts (25000), not 25000"),
        (["--quick", "--steps", "1"], "--snapshot-at must be steps of the run"),
        (["--jobs", "many"], "--jobs: must be a positive whole number"),
        (["--jobs"], "--jobs: expected one argument"),
        (["--results-dir", "--list"], "--results-dir: expected one argument"),
        (["--slurm-options"], "--slurm-options: expected one argument"),
        (["--slurm-options", "--time='1"], "--slurm-options: invalid split value"),
        (["--results-dir", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--line", "341"], "--line must be at most 340"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["fig1"], "unrecognized arguments: fig1"),
        (["--env", "Ant-v4"], "--env and arguments after -- are for a --program"),
        (["--", "--sparsity", "0.9"], "--env and arguments after -- are for a --program"),
        (["--program", "dst_sac.py", "--only", "sac"], "--only narrows the paper's runs"),
        (["--program", "mine.py"], "there is no file mine.py in"),
        (["--program", "watch.py"], "watch.py has no subclass of dst_td3.Arguments"),
        (["--program", "dst_sac.py", "--env", "Ant-v4", "--env", "Ant-v4"], "two runs would share a folder"),
        (["--program", "dst_sac.py", "--", "--seed", "7"], "--seed cannot stand after --"),
        (["--program", "dst_sac.py", "--", "--temperature", "0"], "--temperature must be a positive number, not 0"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, said):
    code, out, err = run_campaign(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("campaign.py: error: ") and err.count("\n") == 1 and said in err


def test_line_runs_one_line_of_the_list(tmp_path):
    options = ("--program", "dst_td3.py", "--quick", "--steps", 20, "--env", "Hopper-v4", "--results-dir", tmp_path)
    listed = run_campaign("--list", *options, *TINY)[1].splitlines()
    code, out, err = run_all(*options, "--line", 2, *TINY)
    assert code == 0, err
    (summary,) = tmp_path.rglob("summary.json")
    assert summary.parent == run_directory(parsed(listed[1])) and out.splitlines()[0] == listed[1]


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline
# ----------------------------------------------------------------------------------------------------------------------


# A program of one's own whose steps take longer, so that its runs can be stopped in the middle.
SLOW = f"""
import sys
import time

sys.path.append("{REPOSITORY}")
from dst_td3 import Arguments, Run, main

advance = Run.advance


def slow(run):
    time.sleep(0.002)
    advance(run)


if __name__ == "__main__":
    Run.advance = slow
    sys.exit(main())
"""


def made_at(results: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in results.rglob("summary.json")}


def test_a_campaign_is_stopped_goes_on_and_ends(tmp_path):
    """Ctrl-C on a terminal, then SIGTERM; the printed command goes on each time, and no step is made twice."""
    (tmp_path / "slow.py").write_text(SLOW)
    options = ("--program", tmp_path / "slow.py", "--env", "Hopper-v4", "--steps", 1500, "--seeds", 3, "--jobs", 2)
    tiny = (*TINY, "--learning-starts", "1400", "--eval-interval", "100", "--eval-episodes", "1")
    tiny = (*tiny, "--checkpoint-interval", "500", "--results-dir", "overridden")
    options = (*options, "--results-dir", tmp_path, *tiny)
    first, second, third = (run_directory(parsed(line)) for line in run_campaign("--list", *options)[1].splitlines())
    logs = [tmp_path / "logs" / f"Hopper-v4_{run.parent.name}_{run.name}.log" for run in (first, second)]

    def evaluations(run: Path) -> int:
        file = run / "evaluations.csv"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def leaves_nothing_running() -> bool:
        return str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout

    def to_go_on(out: str) -> list[str]:
        assert "stopping: each run first writes its checkpoint" in out
        return shlex.split(re.search(r"stopped with 0 of 3 runs done; to go on: (.*)", out)[1])

    # A terminal of its own, on which Ctrl-C is typed.
    controller, terminal = pty.openpty()

    def log_in() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has ignored where the tests run in its background
        os.login_tty(terminal)

    process = start(*options, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=log_in)
    os.close(terminal)
    wait_until(lambda: min(map(evaluations, (first, second))) > 2)
    os.write(controller, b"\x03")
    shown = b""
    while True:
        try:
            shown += os.read(controller, 4096)
        except OSError:  # the last process has closed it
            break
    os.close(controller)
    assert process.wait(timeout=60) == 128 + signal.SIGINT and leaves_nothing_running()
    assert "\r\033[K0 done, 2 running, 0 failed of 3 runs" in shown.decode()
    assert not third.exists() and all("stopped by SIGTERM at step" in log.read_text() for log in logs)

    before = {run: evaluations(run) for run in (first, second)}
    process = subprocess.Popen(to_go_on(shown.decode()), stdout=subprocess.PIPE, text=True)
    wait_until(lambda: all(evaluations(run) > before[run] for run in before))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and leaves_nothing_running()
    assert re.search(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  0 done, 2 running, 0 failed of 3 runs$", out)
    assert all(log.read_text().count("stopped by SIGTERM at step") == 2 for log in logs)

    ended = subprocess.run(to_go_on(out), capture_output=True, text=True)
    random = f"{options[1]}: the first 1400 steps of 1500 are random actions: --learning-starts sets that\n"
    assert (ended.returncode, ended.stderr) == (0, random)
    assert re.search(r"2 done, 1 running, 0 failed of 3 runs, about 0 h 0 min left", ended.stdout)
    for log in logs:  # each session went on from the checkpoint of the one before
        begun, stopped = (re.findall(rf"{at} step ([\d,]+)", log.read_text()) for at in ("masked engine on cpu:", "at"))
        assert begun == ["0", *stopped] and len(set(begun)) == 3
    before = made_at(tmp_path)
    assert {path.parent for path in before} == {first, second, third}
    drawn = f"to draw them beside the published runs: python analysis.py {tmp_path}\n"
    assert run_campaign(*options) == (0, drawn, random) and made_at(tmp_path) == before


def test_quick_pipeline_failing_then_whole(command_line, tmp_path, monkeypatch):
    """One pass through the whole grid, from an empty folder to every figure, with everything that can come between."""
    options = ("--quick", "--seeds", 1, "--steps", 40, "--jobs", 2, "--results-dir", tmp_path)
    listed = {parsed(line): line for line in run_campaign("--list", *options)[1].splitlines()}
    # Measuring speed takes a minute of its own; what is there already is not measured again.
    (tmp_path / "quick" / "benchmarks").mkdir(parents=True)
    (tmp_path / "quick" / "benchmarks" / "updates.csv").write_text(
        "implementation,width,sparsity,microseconds,state_bytes\nsparse engine,256,0.5,1700,5e6\n"
    )

    def named(env: str, method: str) -> list[dst_td3.Arguments]:
        return [args for args in listed if (args.env, args.method) == (env, method)]

    # Left to the campaign are dense HalfCheetah, the runs that begin with its policies, and one of dst_sac.py. The
    # others are made here, which takes no start of python for each, and in short episodes.
    dense, *beginning_with_it = (a for a in named("HalfCheetah-v4", "td3") if a.updates_per_step == 1)
    assert [args.initial_policy.parent for args in beginning_with_it] == [run_directory(dense)] * 2
    (of_sac,) = named("Humanoid-v4", "ds-sac")
    left = {dense, *beginning_with_it, of_sac}
    evaluate = dst_td3.evaluate
    monkeypatch.setattr(dst_td3, "evaluate", lambda act, env, *rest: evaluate(act, TimeLimit(env, 10), *rest))
    for args, line in listed.items():
        if args not in left:
            _, program, *words = shlex.split(line)
            code, _, error = command_line(*words, kind=PROGRAMS[program])
            assert code == 0, error
    before = made_at(tmp_path)
    assert len(before) == len(listed) - 4

    # A run that cannot be made stops no other, nor what follows (a trifle in its place); those that begin
    # with its policy are named too.
    blocked = run_directory(dense)
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("no folder")
    trifle = jobs.Job("analysis", f'python -c \'open("{tmp_path}/followed", "x")\'', tmp_path / "followed")
    with monkeypatch.context() as patched:
        patched.setattr(campaign, "final_jobs", lambda given: [trifle])
        code, _, err = run_campaign(*options)
    assert code == 1 and trifle.is_done()
    failed = [line for line in err.splitlines() if line.startswith("  ")]
    assert err.startswith("3 failed") and len(failed) == 3
    assert sum("td3_total-timesteps=40" in line and "cannot use" in line for line in failed) == 1
    assert sum("policy-20.npz, which the run in that folder did not leave" in line for line in failed) == 1
    assert sum("policy-28.npz, which the run in that folder did not leave" in line for line in failed) == 1
    assert all(Path(line.split(":")[0].strip()).is_file() for line in failed)
    partial = made_at(tmp_path)
    assert partial.keys() - before.keys() == {run_directory(of_sac) / "summary.json"}
    assert partial.items() >= before.items()

    # Again, it makes what is missing and nothing else.
    blocked.unlink()
    code, out, err = run_campaign(*options)
    assert (code, err) == (0, ""), out
    whole = made_at(tmp_path)
    assert {path.parent for path in whole} == {run_directory(a) for a in listed}
    assert whole.items() >= partial.items()
    for kind, suffix, names in (("figures", "png", FIGURES), ("figures", "pdf", FIGURES), ("tables", "md", TABLES)):
        for name in names:
            assert (tmp_path / "quick" / kind / f"{name}.{suffix}").stat().st_size > 0
    assert (tmp_path / "quick" / "figures" / "fig1_learning_curves.png").stat().st_size > 10_000
    assert "missing" not in (tmp_path / "quick" / "tables" / "coverage.md").read_text().replace("seeds missing", "")
    cells = json.loads((tmp_path / "quick" / "analysis.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} == {"display_data"}, "warnings or stray output"
    assert sum("image/png" in output["data"] for output in outputs) == len(FIGURES)
    tables = list((tmp_path / "quick" / "tables").iterdir())
    assert sum("text/markdown" in output["data"] for output in outputs) == len(tables) + 1, "and what there is"


def test_what_the_kernel_kills_is_named_with_its_signal(capsys, tmp_path):
    killed = jobs.Job("killed", "python -c 'import os; os.kill(os.getpid(), 9)'", tmp_path / "never")
    silent = jobs.Job("silent", "python -c 'print(5)'", tmp_path / "never")  # it ends well, but leaves no result
    pool = jobs.Pool(2, tmp_path)
    pool.work([killed, silent])
    assert pool.report() == 1
    err = capsys.readouterr().err
    assert err.startswith("2 failed; the same command tries them again")
    assert f"  {tmp_path}/killed.log: ended by SIGKILL\n" in err and f"  {tmp_path}/silent.log: 5\n" in err


# ----------------------------------------------------------------------------------------------------------------------
# A program of one's own
# ----------------------------------------------------------------------------------------------------------------------


def test_any_program_whose_arguments_subclass_ours(tmp_path):
    options = (
        "--program",
        "examples/rigl.py",
        "--quick",
        "--steps",
        20,
        "--results-dir",
        tmp_path,
        "--env",
        "Hopper-v4",
    )
    own = (*TINY, "--sparsity", 0.5)
    code, out, err = run_campaign("--list", *options, "--env", "Ant-v4", "--seeds", 2, *own)
    assert code == 0 and "4 runs of 20 steps, 4 of them not finished" in err
    start = "python examples/rigl.py --env {} --seed {} --engine masked --hidden 8 8 --batch-size 8 --sparsity 0.5 "
    for line, env, seed in zip(out.splitlines(), ("Hopper-v4", "Ant-v4") * 2, (0, 0, 1, 1), strict=True):
        assert line.startswith(start.format(env, seed))
    assert run_campaign(*options, "--seeds", 1, *own)[0::2] == (0, "")
    # It is run by its own rule of growth, with its default method, and no notebook is made of it.
    (summary,) = tmp_path.rglob("summary.json")
    assert summary.parts[-3].startswith("ds-td3_") and "grow-by=gradient" in summary.parts[-3]
    log = tmp_path / "quick" / "logs" / f"{'_'.join(summary.parts[-4:-1])}.log"
    assert log.read_text().startswith(out.splitlines()[0] + "\n")
    assert not (tmp_path / "quick" / "analysis.ipynb").exists()


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("from dst_sac import SACArguments, main\n", "sac"),  # it only calls main with another's arguments
        ("import dst_sac\n\n\nclass Mine(dst_sac.SACArguments):\n    pass\n", "sac"),
        (
            "from dst_td3 import Arguments\nfrom dst_sac import SACArguments\n\n\nclass Mine(Arguments):\n    pass\n",
            "td3",
        ),
    ],
)
def test_a_program_may_lie_anywhere_and_say_its_arguments_in_any_way(tmp_path, text, method):
    (tmp_path / f"mine_{method}_{len(text)}.py").write_text(text)
    (program,) = tmp_path.glob("mine_*.py")
    code, out, err = run_campaign("--program", program, "--seeds", 2, "--list", "--", "--method", method)
    assert code == 0, err
    assert out.splitlines()[1].startswith(f"python {program} --seed 1 --method {method} --results-dir ")


# ----------------------------------------------------------------------------------------------------------------------
# Slurm
# ----------------------------------------------------------------------------------------------------------------------


def test_slurm_submits_what_is_missing(monkeypatch, tmp_path):
    """What sbatch is asked to do, where no sbatch need be there."""
    asked = []

    def submitted(command: list[str], **options) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="7;cluster\n")

    options = ("--quick", "--seeds", 1, "--only", "fig4", "--results-dir", tmp_path / "my results")
    listed = commands(*options)
    finished = run_directory(listed[0])
    finished.mkdir(parents=True)
    (finished / "summary.json").write_text("{}")
    (finished / f"{listed[2].initial_policy.stem}.npz").write_text("")

    monkeypatch.setattr(jobs.subprocess, "run", submitted)
    monkeypatch.setattr(campaign.shutil, "which", lambda name: name)
    code, out, err = run_campaign(*options, "--slurm", "--slurm-options", "--time=1:00 -p x")
    assert code == 0, err
    first, second = asked
    # Line 2 trains the other policy, line 3 has its policy already; the others wait for theirs.
    assert "--array=2,3" in first and not any(word.startswith("--dependency") for word in first)
    assert "--array=4,5,6" in second and "--dependency=afterany:7" in second
    for command in asked:
        assert command[0] == "sbatch" and "--requeue" in command and "--cpus-per-task=1" in command
        assert command[command.index("--time=1:00") :][:3] == ["--time=1:00", "-p", "x"]
        assert f"--output={tmp_path}/my results/quick/logs/slurm-%A_%a.log" in command
    # The task's list must be the very same list.
    (wrapped,) = {re.search(r"^exec (.*) --line \$SLURM_ARRAY_TASK_ID$", command[-1])[1] for command in asked}
    python, program, *words = shlex.split(wrapped)
    assert (python, program) == (sys.executable, campaign.__file__) and commands(*words) == listed
    assert "submitted job array 7" in out and "without --slurm" in out

    # One option with dashes is no option of ours, and another's program keeps its own arguments.
    program = ("--program", "dst_td3.py", "--seeds", 1, "--results-dir", tmp_path)
    assert run_campaign(*program, "--slurm", "--slurm-options", "--mem=8G", *TINY)[0] == 0
    assert "--mem=8G" in asked[-1]
    (tasks,) = re.findall(r"^exec \S+ \S+ (.*)$", asked[-1][-1])
    assert commands(*shlex.split(tasks.replace("--line $SLURM_ARRAY_TASK_ID", ""))) == commands(*program, *TINY)

    # What sbatch refuses, it says itself.
    monkeypatch.setattr(jobs.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3, ""))
    assert run_campaign(*options, "--slurm")[:2] == (3, "")


def test_slurm_is_refused_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run_campaign("--slurm", "--results-dir", tmp_path / "results")
    assert (code, err.count("\n")) == (2, 1) and "--slurm needs sbatch" in err


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no Slurm on this machine",
)
def test_slurm_task_requeued_in_the_middle_ends_with_the_same_bytes(tmp_path):
    options = (
        "--quick",
        "--seeds",
        1,
        "--steps",
        6000,
        "--program",
        "dst_td3.py",
        "--env",
        "Hopper-v4",
        "--results-dir",
    )
    here, there = tmp_path / "here", tmp_path / "there"
    code, _, err = run_all(*options, here, "--line", 1, *TINY)
    assert code == 0, err

    code, out, err = run_campaign(*options, there, "--slurm", *TINY)
    assert code == 0, err
    job = re.search(r"submitted job array (\d+)", out)[1]
    _, command, _ = run_campaign(*options, there, "--list", *TINY)
    run = run_directory(parsed(command))

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
