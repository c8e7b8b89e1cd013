"""README.md and the pages it leads to: tables, links and commands against results and code, not their prose."""

import ast
import csv
import json
import os
import re
import shlex
import statistics
from pathlib import Path

import pandas as pd
import pytest
import tyro
from running import ADAPTING_RECIPE, RECIPE, read_table

import analysis
import campaign
import dst_td3
import watch

ROOT = Path(dst_td3.__file__).parent
RESULTS = ROOT / "results"
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "results/README.md", "results/rules.md", *DOCS]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]


def table(text: str, head: str) -> list[dict[str, str]]:
    """Return the rows of the one table of a text whose first line begins with ``head``."""
    (found,) = re.findall(rf"^{re.escape(head)}.*\n(?:\|.*\n?)+", text, flags=re.MULTILINE)
    return read_table(found)


def final_returns(env: str, variant: str) -> list[float]:
    """Return the final returns of a variant's finished runs."""
    paths = sorted((RESULTS / env).glob(f"{variant}/seed*/summary.json"))
    return [json.loads(path.read_text())["final_return"] for path in paths]


def benchmark(name: str, key: str = "implementation") -> dict[str, dict[str, str]]:
    """Return the rows of a table of results/benchmarks by one of its columns."""
    with open(RESULTS / "benchmarks" / name) as file:
        return {line[key]: line for line in csv.DictReader(file)}


def is_times(cell: str, value: float) -> bool:
    """Tell whether a cell such as 1.05x, 3.2x or 1 is a factor, rounded."""
    return cell.removesuffix("x") in (f"{value:.2f}", f"{value:.1f}", f"{value:g}")


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# --- Pages ------------------------------------------------------------------------------------------------------------
def test_the_front_page_is_short():
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_a_page_points_to_exists(page):
    targets = re.findall(r"\]\((?!https:)([^)]+)\)", TEXT[page]) + re.findall(r'src="([^"]+)"', TEXT[page])
    assert targets or page.startswith("docs/")
    for target in targets:
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            assert heading in headings(file.read_text()), target


@pytest.mark.parametrize("page", DOCS)
def test_the_front_page_leads_to_every_page_and_each_begins_with_its_conclusion(page):
    assert f"]({page}" in README
    assert re.match(r"# .+\n\n\*\*[^*]", TEXT[page])


def definitions(path: Path) -> set[str]:
    """Return the names of the functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_the_map_from_the_paper_to_the_code_names_what_there_is():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", TEXT["docs/code.md"])
    assert {"erdos_renyi_topology", "adaptation_due", "drop_and_grow", "prune_target"} <= {name for name, _ in links}
    wrong = [f"{name} in {path}" for name, path in links if name not in definitions(ROOT / path)]
    assert not wrong, f"docs/code.md names what is not there: {', '.join(wrong)}"


def test_the_map_links_all_it_names():
    cells = " ".join(" ".join(row.values()) for row in table(TEXT["docs/code.md"], "| paper |"))
    assert not re.findall(r"(?<!\[)`[\w.]+`", cells.replace("`lambda", ""))


# --- Commands ---------------------------------------------------------------------------------------------------------
def commands() -> list[str]:
    """Return every command of the pages' shell blocks that this project answers, a container's as its own."""
    found = []
    for page in ("README.md", "CONTRIBUTING.md", "examples/README.md", *DOCS):
        for block in re.findall(r"```sh\n(.*?)```", TEXT[page], flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "dst-td3" in words[:-1] and words[0] == "docker":
                    words = words[words.index("dst-td3") + 1 :]
                    words = ["./run_all.sh", *words] if words[0].startswith("-") else words
                if words and words[0] in ("python", "./run_all.sh", "make") and "mine.py" not in words:
                    found.append(shlex.join(words))
    return sorted(set(found))


# Modules and files of the reader's own, or that come with packages not installed here.
THEIRS = "your_module", "shimmy:", "gymnasium_robotics:", "RUN_DIRECTORY", "$runs", "$run"


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    program = "campaign.py" if program == "./run_all.sh" else words.pop(0)
    if program == "-m":
        return
    assert (ROOT / program).is_file()
    if program == "campaign.py":
        end = words.index("--") if "--" in words else len(words)
        assert campaign.list_runs(campaign.parse(words[:end], words[end + 1 :]))
    elif program == "watch.py":
        run = tyro.cli(watch.Arguments, args=words).run_directory
        assert run.parts[0] == "runs" or run.exists()
    elif program == "analysis.py":
        tyro.cli(analysis.Arguments, args=words)
    elif "--env" in words and program != "examples/sb3.py":
        args = tyro.cli(campaign.arguments_class(program), args=words)
        args.validate()
        if not args.env.startswith(THEIRS):
            dst_td3.make_environment(args.env, args.env_kwargs).close()


def test_the_quick_start_ends_with_the_run_that_it_made():
    block = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)[0]
    (command,) = re.findall(r"^python dst_td3.py (.*)", block, flags=re.MULTILINE)
    args = tyro.cli(dst_td3.Arguments, args=[*shlex.split(command), "--results-dir", "runs"])
    line = r"^final return [\d.]+ \(mean of the last ten evaluations\), LCA [\d.]+: python watch.py (.*)"
    last = re.search(line, README, flags=re.MULTILINE)[1]
    assert last == os.fspath(dst_td3.run_directory(dst_td3.resolve(args)))


def test_the_python_of_the_front_page_runs(monkeypatch):
    """Its training, an hour long, gives a published run instead."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dst_td3, "train", lambda args: args.validate() or RESULTS / args.env / "ds-td3" / "seed0")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["env"].action_space.contains(names["action"])
    assert names["mask"].sum() == names["connections"][1]


def test_a_number_is_checked_as_the_page_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT["docs/reproduce.md"], flags=re.DOTALL)
    exec(block, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for seed, final, area in printed:
        summary = json.loads((RESULTS / f"Hopper-v4/ds-td3/seed{seed}/summary.json").read_text())
        assert (float(final), float(area)) == pytest.approx((summary["final_return"], summary["lca"]))
    assert len(printed) == 3


# --- Tables -----------------------------------------------------------------------------------------------------------
RETURNS = table(README, "| task |")


def test_the_front_table_has_every_task_of_the_paper():
    assert [row["task"] for row in RETURNS] == list(analysis.TASKS)


@pytest.mark.parametrize("method", ["TD3", "DS-TD3"])
@pytest.mark.parametrize("row", RETURNS, ids=lambda row: row["task"])
def test_the_front_table_is_what_the_results_say(row, method):
    final = final_returns(row["task"], method.lower())
    assert len(final) == 5
    assert row[method] == f"{statistics.mean(final):,.0f} ± {statistics.stdev(final):,.0f}"
    mean, deviation = analysis.PAPER_RETURN[row["task"]][list(analysis.METHODS.values()).index(method)]
    assert row[f"paper's {method}"] == f"{mean:,.0f} ± {deviation:,.0f}"


SPEEDS = table(README, "| agent |")


def speeds_of(row: dict[str, str], file: str) -> dict[str, str]:
    """Return the row of a benchmark's file that measured the agent of a page's row."""
    return benchmark(file)[{"TD3, compiled here": "td3, compiled"}.get(row["agent"], row["agent"].lower())]


@pytest.mark.parametrize("row", SPEEDS, ids=lambda row: row["agent"])
def test_the_table_of_speeds_is_what_the_benchmark_measured(row):
    speeds = speeds_of(row, "end_to_end.csv")
    assert row["steps/s"] == f"{float(speeds['steps_per_second']):,.0f}"
    for peer in ("RLtools", "Stable-Baselines3", "SBX"):
        assert is_times(row[f"over {peer}"], float(speeds[f"speedup_over_{peer.lower()}"]))


@pytest.mark.parametrize("row", SPEEDS[1:], ids=lambda row: row["agent"])
def test_the_table_of_speeds_has_the_return_of_every_agent_that_was_trained(row):
    method, size, *recipe = row["agent"].split(", ")
    variant = method.lower() + {"compiled here": ""}.get(size, "_" + size.replace(" ", "="))
    options = ADAPTING_RECIPE if method == "DS-TD3" else RECIPE
    ours = final_returns("HalfCheetah-v4", variant + f"_{options}" * len(recipe))
    ratio = statistics.mean(ours) / statistics.mean(final_returns("HalfCheetah-v4", "td3"))
    assert is_times(row["return over TD3"], ratio)


@pytest.mark.parametrize("row", table(TEXT["docs/benchmarks.md"], "| processor |"), ids=lambda row: row["processor"])
def test_speedups_on_each_processor_are_those_measured(row):
    folder = Path(re.search(r"\((.*?)/README.md\)", row["processor"])[1]).name.replace("benchmarks", "")
    with open(RESULTS / "benchmarks" / folder / "updates.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["width"] == "256" and "engine" in line["implementation"]]
    measured = {line["sparsity"]: float(line["speedup_over_dense"]) for line in lines}
    assert all(is_times(row[sparsity], measured[sparsity]) for sparsity in ("0.5", "0.8", "0.9", "0.95"))


@pytest.mark.parametrize(
    ("column", "file"),
    {
        "Zen 5, AVX-512": "end_to_end.csv",
        "Zen 5, AVX2 alone": "zen-5/end_to_end-avx2.csv",
        "Zen 5, default BLAS": "zen-5/end_to_end-default.csv",
        "Xeon, earlier engine": "xeon/end_to_end.csv",
    }.items(),
)
def test_speeds_over_rltools_are_those_measured(column, file):
    first, *rows = table(TEXT["docs/benchmarks.md"], "| agent | Zen 5")
    assert first[column] == f"{float(benchmark(file)['rltools']['steps_per_second']):,.0f}"
    for row in rows:
        assert is_times(row[column], float(speeds_of(row, file)["speedup_over_rltools"]))


@pytest.mark.parametrize("name", ["high_sparsity", "frontier"])
def test_tables_of_high_sparsity_are_the_notebooks(name):
    notebooks = (RESULTS / "tables" / f"{name}.md").read_text()
    assert notebooks[notebooks.index("\n| ") :].strip() in TEXT["docs/high-sparsity.md"]


def test_numbers_of_single_runs_are_those_recorded():
    """Means of 100,000 steps; the rest of a cell says of which run."""
    runs = pd.read_csv(RESULTS / "high-sparsity.csv")
    returns = runs[[column for column in runs if column.isdigit()]]
    means = {f"{mean:,.0f}" for last in (30, 50, 100) for mean in returns.iloc[:, last - 10 : last].mean(axis=1)}
    text = TEXT["docs/high-sparsity.md"]
    single = text[text.index("### What helped") :]
    numbers = set()
    for start in ("| change | task, sparsity", "| change | HalfCheetah", "| change | task | without"):
        for row in table(single, start):
            cells = [row[column] for column in row if column not in ("change", "task", "task, sparsity")]
            numbers |= {number for cell in cells for number in re.findall(r"[\d,]+\b", re.sub(r"\(.*?\)", "", cell))}
    published = {"3,299", "2,183"}  # finished runs, in the table of seeds
    assert len(numbers) > 70 and numbers - published <= means, numbers - means


def test_the_verdicts_are_the_notebooks():
    notebooks = {}
    for row in table((RESULTS / "tables" / "verdicts.md").read_text(), "| claim"):
        p = row["p one-sided, two-sided, Holm's"].split(", ")[1]
        verdict = f"{row['verdict'].strip('*')}: {row['statistic']}, p = {p}"
        notebooks.setdefault(row["claim"].split(". ")[0], []).append(verdict)
    shown = {}
    for start in ("| claim across", "| claim on HalfCheetah"):
        for row in table(TEXT["docs/findings.md"], start):
            number, *cells = row.values()
            shown[number.split(". ")[0]] = cells
    assert shown == notebooks


def test_differences_of_returns_are_the_notebooks():
    notebooks = table((RESULTS / "tables" / "differences.md").read_text(), "| environment |")
    returns = {row["environment"]: row for row in notebooks if row["of"] == "return"}
    rows = table(TEXT["docs/findings.md"], "| task | DS-TD3")
    assert [row.pop("task") for row in rows] == list(returns)
    for row, notebook in zip(rows, returns.values(), strict=True):
        assert row == {pair: notebook[pair] for pair in row} and len(row) == 2


def test_returns_outside_the_papers_deviations_are_listed():
    def numbers(cell: str) -> list[float]:
        return [float(number) for number in cell.replace(",", "").split(" ± ")]

    notebooks = table((RESULTS / "tables" / "table2_return.md").read_text(), "| environment |")
    rows = [(row, numbers(row["ours"])[0], *numbers(row["paper"])) for row in notebooks if row["ours"] != "-"]
    lower = {(row["environment"], row["method"]): (paper - ours) / deviation for row, ours, paper, deviation in rows}
    outside = {run: f"{below:.1f}" for run, below in lower.items() if abs(below) > 1}
    assert f"{len(rows) - len(outside)} of {len(rows)} mean returns lie within one" in README
    listed = table(TEXT["docs/findings.md"], "| task | method | ours")
    column = "below, in the paper's deviations"
    assert {(row["task"], row["method"]): row[column] for row in listed} == outside


def test_the_time_to_the_dense_return_is_the_notebooks():
    text = (RESULTS / "tables" / "seconds_to_dense.md").read_text()
    notebooks = {row["HalfCheetah-v4"]: row for row in table(text, "| HalfCheetah-v4 |")}
    for row in table(TEXT["docs/benchmarks.md"], "| agent | seeds | minutes"):
        measured = notebooks[row["agent"]]
        assert row["return after a third of RLtools' time"] == measured["return after a third of that run's time"]
        assert row["minutes"] == measured["minutes"].replace("-", "not reached")


def test_the_table_of_a_gpu_is_the_one_measured():
    text = (RESULTS / "benchmarks" / "h200" / "README.md").read_text()
    measured = table(text, "| implementation | width")
    for row in table(TEXT["docs/benchmarks.md"], "| width | agent"):
        method, sparsity = (*row["agent"].split(", "), "0")[:2]
        (gpu, core) = (
            line["microseconds"]
            for line in measured
            if line["implementation"].startswith(f"{method}, ")
            and (line["width"], float(line["sparsity"])) == (row["width"].replace(",", ""), float(sparsity))
        )
        assert (row["µs of an update, GPU"], row["one core"]) == (gpu, core)
