"""README.md, and the pages it leads to, against the code and the results they speak of, so that none falls behind."""

import ast
import csv
import json
import re
import statistics
from pathlib import Path

import pytest
from runs import ADAPTING_RECIPE, RECIPE, read_table

import dst_td3

ROOT = Path(dst_td3.__file__).parent
README = (ROOT / "README.md").read_text()


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
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)\)", README)
    assert {"erdos_renyi_topology", "adaptation_due", "drop_and_grow", "prune_target"} <= {name for name, _ in links}
    wrong = [f"{name} in {path}" for name, path in links if name not in definitions(ROOT / path)]
    assert not wrong, f"README.md names what is not there: {', '.join(wrong)}"


def test_the_map_links_all_it_names():
    code_map = README.split("## Read the code")[1].split("\n\n")[2]
    assert code_map.startswith("| paper |")
    assert not re.findall(r"(?<!\[)`[\w.]+`", code_map.replace("`lambda", ""))


OF_RESULTS = (f"results/{name}.md" for name in ("README", "findings", "high-sparsity", "rules"))
PAGES = ["README.md", "CONTRIBUTING.md", *OF_RESULTS]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_a_page_points_to_exists(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!https:)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", file.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_its_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["env"].action_space.contains(names["action"])
    assert names["mask"].sum() == names["connections"][1]


FRONT_TABLE = read_table(README[README.index("| environment |") : README.index("Return is the mean")])


def summaries_of(row: dict[str, str]) -> list[dict]:
    """Return the summaries that a row of the front table rests on: of its first seeds, later ones await their set."""
    folder = ROOT / "results" / row["environment"] / row["method"].lower()
    return [json.loads((folder / f"seed{seed}" / "summary.json").read_text()) for seed in range(int(row["seeds"]))]


@pytest.mark.parametrize("row", FRONT_TABLE, ids=lambda row: f"{row['environment']} {row['method']}")
def test_the_front_table_is_what_the_results_say(row):
    summaries = summaries_of(row)
    final = [s["final_return"] for s in summaries]
    deviation = f" ± {statistics.stdev(final):,.0f}" if len(final) > 1 else ""
    assert f"{statistics.mean(final):,.0f}{deviation}" == row["return"]
    assert f"{statistics.mean(s['lca'] for s in summaries):.3f}" == row["LCA"]


def test_the_front_table_has_every_result():
    finished = {path.parts[-4:-2] for path in (ROOT / "results").glob("*-v4/*td3/seed*/summary.json")}
    assert {(row["environment"], row["method"].lower()) for row in FRONT_TABLE} == finished


DENSE = "HalfCheetah-v4", "TD3"
SPEED_TABLE = read_table(README[README.index("| agent |") : README.index("The row of our own compiled")])


@pytest.mark.parametrize("row", SPEED_TABLE, ids=lambda row: row["agent"])
def test_the_table_of_speeds_is_what_the_benchmark_measured(row):
    with open(ROOT / "results" / "benchmarks" / "end_to_end.csv") as file:
        measured = {line["implementation"]: line for line in csv.DictReader(file)}
    names = {"TD3 in torch": "td3", "TD3, compiled here": "td3, compiled"}
    speeds = measured[names.get(row["agent"], row["agent"].lower())]
    assert row["steps/s"] == f"{float(speeds['steps_per_second']):,.0f}"
    for peer in ("RLtools", "Stable-Baselines3", "SBX"):
        ratio = float(speeds[f"speedup_over_{peer.lower()}"])
        assert row[f"over {peer}"].rstrip("x") in (f"{ratio:.1f}", f"{ratio:.2f}", f"{ratio:g}")


@pytest.mark.parametrize("row", [row for row in SPEED_TABLE if ", " in row["agent"]], ids=lambda row: row["agent"])
def test_the_table_of_speeds_has_the_return_of_every_agent_that_was_trained(row):
    def final_returns(variant: str) -> list[float]:
        paths = (ROOT / "results" / "HalfCheetah-v4").glob(f"{variant}/seed*/summary.json")
        return [json.loads(path.read_text())["final_return"] for path in paths]

    method, size, *recipe = row["agent"].split(", ")
    folders = {"compiled here": "", "width 77": "_hidden=77,77"}
    variant = method.lower() + folders.get(size, "_" + size.replace(" ", "="))
    options = ADAPTING_RECIPE if method == "DS-TD3" else RECIPE
    ours = final_returns(variant + f"_{options}" * len(recipe))
    (dense,) = [summaries_of(row) for row in FRONT_TABLE if (row["environment"], row["method"]) == DENSE]
    ours = [s["final_return"] for s in dense] if variant == "td3" and not recipe else ours
    ratio = f"{statistics.mean(ours) / statistics.mean(s['final_return'] for s in dense):.2f}x" if ours else "-"
    assert row["return over dense"] == ratio.replace("1.00x", "1")


@pytest.mark.parametrize(
    ("page", "table", "head"),
    [
        ("README.md", "claims", "| claim |"),
        ("README.md", "high_sparsity", "| setting |"),
        ("results/findings.md", "methods", "| environment |"),
    ],
)
def test_tables_of_returns_are_the_notebooks(page, table, head):
    notebooks = (ROOT / "results" / "tables" / f"{table}.md").read_text()
    assert notebooks[notebooks.index(head) :].strip() in (ROOT / page).read_text()
