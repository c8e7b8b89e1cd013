"""Every table and figure of analysis.ipynb, each made by one function from a folder of runs.

Tables and figures follow the paper (Sokar et al. 2022, arXiv 2106.04217); those below "Beyond" it does not have.
``analysis.py`` reads the runs and has the statistics. Only finished runs count; where runs are missing, a figure or
table goes on with what there is.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import analysis
from analysis import (
    COLOURS,
    EVAL_INTERVAL,
    GREEN,
    LEAST_SEEDS,
    METHODS,
    MORE_COLOURS,
    PAIRS,
    PAPER_LCA,
    PAPER_MEANS,
    PAPER_RETURN,
    PINK,
    SAC_METHODS,
    SEEDS,
    SKY,
    STEPS,
    TASKS,
    V4_NOTE,
    Plot,
    Results,
    Run,
    Table,
    add_legend_where_drawn,
    describe_options,
    final_returns,
    label_axes,
    lcas,
    learning_curves,
    mark_empty,
    mean_and_std,
    name_of,
    plot_curves,
    smoothed,
    steps_and_returns,
    steps_to_reach,
    student,
    thousands,
    with_interval,
)
from dst_td3 import Layer
from high_sparsity import DORMANT

FOUR_TASKS = TASKS[:4]  # without Humanoid, on which a TD3 that fails makes quotients as large as one likes
HALFCHEETAH, WALKER2D, HOPPER, ANT = FOUR_TASKS
# SAC and DS-SAC (Tables 3 to 5).
PAPER_SAC_LCA = {
    "HalfCheetah-v4": (1.6229, 1.7081),
    "Walker2d-v4": (0.5368, 0.5906),
    "Hopper-v4": (0.4441, 0.4875),
    "Ant-v4": (0.7504, 0.8229),
    "Humanoid-v4": (0.3776, 0.6777),
}
PAPER_SAC_RETURN = {
    "HalfCheetah-v4": ((11645.12, 425.59), (11084.39, 445.15)),
    "Walker2d-v4": ((3858.20, 689.91), (4216.77, 236.23)),
    "Hopper-v4": ((3100.39, 374.45), (3229.39, 135.82)),
    "Ant-v4": ((5899.30, 197.15), (5943.54, 169.95)),
    "Humanoid-v4": ((5425.56, 196.33), (5584.64, 109.40)),
}
RECIPE = {"step-exponent": "0.5", "updates-per-step": "2", "recycle-dormant": "True"}
ADAPTING_RECIPE = RECIPE | {"drop-by": "contribution"}


def on_four_tasks(options: dict[str, str], own: dict[str, dict[str, str]] | None = None) -> dict[str, dict[str, str]]:
    """Return options for each of the four tasks: the shared ones, and some of its ``own``."""
    return {env: options | (own or {}).get(env, {}) for env in FOUR_TASKS}


THREE_STEPS = {WALKER2D: {"n-step": "3"}}
RLX2 = {  # sparsities of the hidden layers that keep as many connections in all as RLx2
    HALFCHEETAH: {"sparsity": "0.92", "critic-sparsity": "0.853"},
    WALKER2D: {"sparsity": "0.977", "critic-sparsity": "0.961", **THREE_STEPS[WALKER2D]},
    HOPPER: {"sparsity": "0.985", "critic-sparsity": "0.957"},
    ANT: {"sparsity": "0.969", "critic-sparsity": "0.892"},
}
RLX2_PAPER = {  # sparsities of actor and critics, output layers included; return over dense TD3's, in its paper
    HALFCHEETAH: ("0.90, 0.85", 0.998),
    WALKER2D: ("0.97, 0.95", 0.981),
    HOPPER: ("0.98, 0.95", 0.970),
    ANT: ("0.96, 0.88", 1.039),
}
AS_RLX2 = "DS-TD3, as many connections as RLx2, recipe"
HIGH_SPARSITY = {  # method, options on each task
    "DS-TD3, the paper's settings": ("ds-td3", on_four_tasks({})),
    "DS-TD3, 0.9, the paper's settings otherwise": ("ds-td3", on_four_tasks({"sparsity": "0.9"})),
    "DS-TD3, 0.95, the paper's settings otherwise": ("ds-td3", on_four_tasks({"sparsity": "0.95"})),
    "DS-TD3, 0.9, recipe": ("ds-td3", on_four_tasks({"sparsity": "0.9"} | ADAPTING_RECIPE, THREE_STEPS)),
    "DS-TD3, 0.95, recipe": ("ds-td3", on_four_tasks({"sparsity": "0.95"} | ADAPTING_RECIPE, THREE_STEPS)),
    AS_RLX2: ("ds-td3", on_four_tasks(ADAPTING_RECIPE, RLX2)),
    "DS-TD3, 0.9, recipe, but targets of one step": ("ds-td3", on_four_tasks({"sparsity": "0.9"} | ADAPTING_RECIPE)),
    "DS-TD3, 0.95, recipe, but targets of one step": ("ds-td3", on_four_tasks({"sparsity": "0.95"} | ADAPTING_RECIPE)),
    "Static-TD3, 0.9, recipe": ("static-td3", on_four_tasks({"sparsity": "0.9"} | RECIPE)),
    "DS-TD3, 0.9, recipe, but dropped by magnitude": ("ds-td3", on_four_tasks({"sparsity": "0.9"} | RECIPE)),
    "TD3, recipe": ("td3", {HALFCHEETAH: RECIPE, WALKER2D: RECIPE}),
    "TD3, width 77, recipe": ("td3", {HALFCHEETAH: {"hidden": "77,77"} | RECIPE}),
}
FIGURE_5 = dict.fromkeys(  # without those that two settings share
    (env, method, tuple(options.items()))
    for method, settings in HIGH_SPARSITY.values()
    for env, options in settings.items()
)
SETTINGS = [  # where it is shown, environment, method, options
    *(("Figure 1, Tables 1 and 2", env, method, {}) for env in TASKS for method in METHODS),
    *(("Figure 2", HALFCHEETAH, "ds-td3", {"adapt-interval": e}) for e in ("200", "500", "2000")),
    *(("Figure 3", HALFCHEETAH, "ds-td3", {"sparsity": s}) for s in ("0.25", "0.5", "0.8")),
    *(("Tables 3 to 5", env, method, {}) for env in TASKS for method in SAC_METHODS),
    *(("Figure 5", env, method, dict(options)) for env, method, options in FIGURE_5 if options),
]


# --- What there is ----------------------------------------------------------------------------------------------------
def basis(selected: list[Run]) -> dict[str, str]:
    """Return the columns that say what stands behind a cell, and how that falls short of the paper."""
    if not selected:
        return {"seeds": "0", "steps": "-", "remark": "**missing**"}
    steps, interval = selected[0].steps, selected[0].length[2]
    remarks = []
    if steps < STEPS:
        remarks.append("**shorter than the paper's run**")
    if len(selected) < len(SEEDS):
        remarks.append(f"{len(SEEDS) - len(selected)} of {len(SEEDS)} seeds missing")
    if interval != EVAL_INTERVAL:
        remarks.append(f"evaluated every {interval:,} steps")
    return {"seeds": str(len(selected)), "steps": f"{steps:,}", "remark": "; ".join(remarks)}


def coverage(results: Results) -> Table:
    """Return what stands behind each setting of the paper and of Figure 5."""
    settings = [(*s[:3], describe_options(s[3]), results.select(*s[1:])) for s in SETTINGS]
    for method, fraction in itertools.product(("td3", "ds-td3"), (0.5, 0.7)):
        option = f"first samples from the policy after {fraction:.0%} of a run"
        settings.append(("Figure 4", HALFCHEETAH, method, option, results.initial_policies(method, fraction)))
    rows = [
        {"shown in": shown, "environment": env, "method": name_of(method), "option": option, **basis(selected)}
        for shown, env, method, option, selected in settings
    ]
    return Table("coverage", "**Runs behind the figures and tables** (finished runs only).", rows)


def unfinished(results: Results) -> Table:
    """Return the runs that are not finished, with the step of their last evaluation."""
    rows = [
        {
            "environment": r.env,
            "method": name_of(r.method),
            "option": describe_options(r.options),
            "seed": str(r.seed),
            "evaluated up to step": f"{r.evaluations['step'].max():,} of {r.steps:,}" if len(r.evaluations) else "-",
        }
        for r in results.runs
        if r.summary is None
    ]
    return Table("unfinished", "**Unfinished runs**, left out of everything else.", rows, optional=True)


# --- The paper's tables -----------------------------------------------------------------------------------------------
def paper_table(
    results: Results, methods: dict[str, str], values: Callable, paper: dict, digits: int, format_paper: Callable
) -> list[dict[str, str]]:
    """Return our numbers beside the paper's, environment by environment."""
    rows = []
    for env in TASKS:
        for (method, name), published in zip(methods.items(), paper[env], strict=False):
            selected = results.select(env, method)
            ours = mean_and_std(values(selected), digits)
            row = {"environment": env, "method": name, "ours": ours, "paper": format_paper(published)}
            rows.append({**row, **basis(selected)})
        if methods is METHODS:
            sac = {"environment": env, "method": "SAC", "ours": "-", "paper": format_paper(paper[env][-1])}
            remark = "the paper's number, of another SAC than the appendix's; not run here"
            rows.append({**sac, "seeds": "-", "steps": "-", "remark": remark})
    return rows


def paper_mean(mean: float) -> str:
    """Format the paper's mean LCA."""
    return f"{mean:.4f}"


def paper_pair(pair: tuple[float, float]) -> str:
    """Format the paper's mean and standard deviation of a return."""
    return f"{pair[0]:,.1f} ± {pair[1]:,.1f}"


def table_1(results: Results) -> Table:
    """Return Table 1: the learning curve area."""
    caption = "**Table 1.** Learning curve area, mean ± standard deviation over seeds (the paper gives means)."
    rows = paper_table(results, METHODS, lcas, PAPER_LCA, 4, paper_mean)
    return Table("table1_lca", f"{caption} {V4_NOTE}", rows)


def table_2(results: Results) -> Table:
    """Return Table 2: the return."""
    caption = "**Table 2.** Return over the last ten evaluations, mean ± standard deviation over seeds."
    rows = paper_table(results, METHODS, final_returns, PAPER_RETURN, 1, paper_pair)
    return Table("table2_return", f"{caption} {V4_NOTE}", rows)


def appendix_lca(results: Results) -> Table:
    """Return Tables 3 to 5's learning curve area of SAC and DS-SAC."""
    caption = "**DS-SAC, learning curve area**, mean ± standard deviation over seeds (the paper gives means)."
    rows = paper_table(results, SAC_METHODS, lcas, PAPER_SAC_LCA, 4, paper_mean)
    return Table("appendix_lca", f"{caption} {V4_NOTE}", rows)


def appendix_return(results: Results) -> Table:
    """Return Tables 3 to 5's return of SAC and DS-SAC."""
    caption = "**DS-SAC, return** over the last ten evaluations, mean ± standard deviation over seeds."
    rows = paper_table(results, SAC_METHODS, final_returns, PAPER_SAC_RETURN, 1, paper_pair)
    return Table("appendix_return", f"{caption} {V4_NOTE}", rows)


def compute(results: Results) -> Table:
    """Return connections, the paper's count of FLOPs, and peak memory."""
    rows, paper = [], {"td3": "214,784; 1.07e14; 1.00", "ds-td3": "sparsity 0.51; 0.49"}
    for env, (method, name) in itertools.product(TASKS, METHODS.items()):
        if not (selected := results.select(env, method)):
            continue
        summary = selected[0].summary
        rows.append(
            {
                "environment": env,
                "method": name,
                "connections": f"{summary['connections']:,}",
                "sparsity": f"{summary['sparsity']:.2f}",
                "FLOPs of 1e6 steps": f"{summary['training_flops'] * 1e6 / selected[0].steps:.3g}",
                "of dense": f"{summary['training_flops'] / summary['training_flops_of_dense']:.2f}",
                "paper": paper.get(method, "-") if env == HALFCHEETAH else "-",
                "peak memory": f"{max(r.summary['peak_memory_bytes'] for r in selected) / 1e6:,.0f} MB",
                "engine": ", ".join(sorted({r.engine for r in selected})),
                **basis(selected),
            }
        )
    note = "Memory is a whole process's, the largest of the seeds (a resumed one counts its buffer's file too); "
    note += "`benchmarks/` has what a step takes."
    return Table("compute", f"**Memory and compute.** {note} {V4_NOTE}", rows)


# --- The paper's figures ----------------------------------------------------------------------------------------------
def environment_panels(results: Results) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with one panel for each environment that has a finished run, and one for the legend."""
    shown = [env for env in TASKS if any(results.select(env, method) for method in METHODS)]
    return analysis.panels_of(shown or TASKS)


def add_legend(figure: Figure, panels: dict[str, Axes], note: str = "") -> None:
    """Explain the lines of all panels once, beside them, and name the environments that are missing."""
    if missing := [env for env in TASKS if env not in panels]:
        note += "\nno finished run yet:\n" + ", ".join(missing)
    analysis.add_legend(figure, panels, note)


def figure_1(results: Results) -> Plot:
    """Return Figure 1: learning curves, with the paper's final returns as diamonds."""
    figure, panels = environment_panels(results)
    for env, axes in panels.items():
        for (method, name), published in zip(METHODS.items(), PAPER_MEANS[env], strict=False):
            selected = results.select(env, method)
            plot_curves(axes, selected, name, COLOURS[name])
            if selected and selected[0].steps == STEPS:
                axes.plot(STEPS, published, "D", color=COLOURS[name], markersize=7, clip_on=False)
        if any(r.steps == STEPS for method in METHODS for r in results.select(env, method)):
            axes.plot(STEPS, PAPER_MEANS[env][-1], "D", color=GREEN, markersize=7, label="SAC (paper)")
        label_axes(axes, env)
    add_legend(figure, panels, "mean of ten evaluations, single ones pale\ndiamonds: the paper's final returns (-v3)")
    return Plot("fig1_learning_curves", figure)


def comparison(lines: list[tuple[list[Run], str, str]], title: str, name: str) -> Plot:
    """Return learning curves in one panel; a line has runs, a label and a colour."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for selected, label, colour in lines:
        plot_curves(axes, selected, label, colour)
    label_axes(axes, title)
    add_legend_where_drawn(axes)
    return Plot(name, figure)


def beside_dense(results: Results, variants: list[tuple[dict, str, str]], title: str, name: str) -> Plot:
    """Return learning curves of variants of DS-TD3 on HalfCheetah beside TD3's."""
    lines = [(results.select(HALFCHEETAH, "td3"), "TD3", COLOURS["TD3"])]
    lines += [(results.select(HALFCHEETAH, "ds-td3", options), label, colour) for options, label, colour in variants]
    return comparison(lines, title, name)


def figure_2(results: Results) -> Plot:
    """Return Figure 2: how often to adapt."""
    colours = {"200": SKY, "500": GREEN, "1000": COLOURS["DS-TD3"], "2000": PINK}
    variants = [
        ({} if e == "1000" else {"adapt-interval": e}, f"DS-TD3 e = {e}", colour) for e, colour in colours.items()
    ]
    title = "HalfCheetah-v4: steps between adaptations (e)"
    return beside_dense(results, variants, title, "fig2_adapt_interval")


def figure_3(results: Results) -> Plot:
    """Return Figure 3: how sparse."""
    colours = {"0.25": SKY, "0.5": COLOURS["DS-TD3"], "0.8": PINK}
    variants = [({"sparsity": s}, f"DS-TD3 {float(s):.0%} sparse", colour) for s, colour in colours.items()]
    return beside_dense(results, variants, "HalfCheetah-v4: sparsity", "fig3_sparsity")


def figure_4(results: Results) -> Plot:
    """Return Figure 4: learning from a trained policy's first samples, Figure 1's runs pale beside it."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, fraction, letter in zip(both, (0.5, 0.7), "ab", strict=True):
        for method, pale in (("td3", "#AAAAAA"), ("ds-td3", SKY)):
            if learned := results.initial_policies(method, fraction):
                random = results.select(HALFCHEETAH, method)
                plot_curves(axes, random, f"{METHODS[method]}, random first samples", pale)
                plot_curves(axes, learned, f"{METHODS[method]}, learned ones", COLOURS[METHODS[method]])
        label_axes(axes, f"({letter}) first samples from the policy after {fraction:.0%} of a run")
        axes.label_outer()
        add_legend_where_drawn(axes)
    return Plot("fig4_initial_policy", figure)


# --- Beyond the paper: methods against each other ---------------------------------------------------------------------
def first_step(selected: list[Run], target: float) -> int | None:
    """Return the step at which the mean curve of runs first averages ``target`` over ten evaluations in a row."""
    curve = learning_curves(selected).mean(axis=1)
    return steps_to_reach(curve.index.to_numpy(), curve.to_numpy(), target, never=None)


def steps_to_dense(results: Results) -> Table:
    """Return the steps to dense TD3's final return."""
    rows = []
    for env, (method, name) in itertools.product(TASKS, METHODS.items()):
        if not (dense := results.select(env, "td3")):
            continue
        target = final_returns(dense).mean()
        whole, own = dense[0].steps, first_step(dense, target) or dense[0].steps
        selected = results.select(env, method)
        step = first_step(selected, target) if selected else None
        rows.append(
            {
                "environment": env,
                "method": name,
                "TD3's final return": f"{target:,.0f}",
                "reached at step": "not reached" if selected and step is None else f"{step:,}" if selected else "-",
                "fewer steps than TD3's whole run": "-" if step is None else f"{1 - step / whole:.0%}",
                "than TD3's own first time there": "-" if step is None else f"{1 - step / own:.0%}",
                **basis(selected),
            }
        )
    caption = (
        "**Steps to dense TD3's final return**, in the mean of ten evaluations in a row (paper: 40 to 50 % fewer)."
    )
    return Table("steps_to_dense", f"{caption} {V4_NOTE}", rows)


def differences(results: Results) -> Table:
    """Return each method's mean return and LCA less those of another, beside the paper's differences."""
    rows = []
    measures = (("return", final_returns, PAPER_MEANS, 0), ("LCA", lcas, PAPER_LCA, 3))
    for env, (measure, values, paper, digits) in itertools.product(TASKS, measures):
        row, published = {"environment": env, "of": measure}, dict(zip(METHODS, paper[env], strict=False))
        for pair in PAIRS:
            ours = analysis.describe_difference(*(values(results.select(env, method)) for method in pair), digits)
            first, second = (published[method] for method in pair)
            row[" less ".join(METHODS[method] for method in pair)] = f"{ours} ({first - second:,.{digits}f})"
        rows.append(row)
    caption = "**One method less another**, means over seeds [95 % interval, Welch's t] (paper)."
    return Table("differences", f"{caption} {V4_NOTE}", rows)


# --- Beyond the paper: moments, costs, high sparsity ------------------------------------------------------------------
def dense_moments(results: Results) -> tuple[Plot, Table]:
    """Return what the dense gradient in Adam's moments changes, figure and table, between runs of the same length."""
    moments = results.select(HALFCHEETAH, "ds-td3", {"dense-moments": "True"})
    as_long = results.select(HALFCHEETAH, "ds-td3", length=moments[0].length) if moments else []
    settings = [
        (as_long, "moments of connections alone", COLOURS["DS-TD3"]),
        (moments, "moments of every position", COLOURS["Static-TD3"]),
    ]
    rows = [
        {
            "DS-TD3 on HalfCheetah-v4": label,
            "return": mean_and_std(final_returns(selected), 1),
            "LCA": mean_and_std(lcas(selected), 4),
            **basis(selected),
        }
        for selected, label, _ in settings
        if selected
    ]
    caption = "**Adam's moments** with and without the gradient of positions without a connection."
    plot = comparison(settings, "HalfCheetah-v4, DS-TD3: Adam's moments", "dense_moments")
    return plot, Table("dense_moments", caption, rows)


def read_benchmark(results: Results, name: str, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """Read what ``make benchmark`` measured; where that is not there, return no rows, and say why."""
    path = results.folder / "benchmarks" / f"{name}.csv"
    measured = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
    if set(columns) <= set(measured):
        return measured, "not measured yet: make benchmark"
    return pd.DataFrame(columns=columns), f"{path.name} lacks the columns\n" + ", ".join(columns)


def seconds_and_bytes(results: Results) -> Plot:
    """Return seconds of an update and bytes of an agent against sparsity, as ``make benchmark`` measured them."""
    columns = ("implementation", "width", "sparsity", "microseconds", "state_bytes")
    measured, why = read_benchmark(results, "updates", columns)
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    for axes, column, unit, label in zip(
        figure.subplots(1, 2), columns[3:], (1, 1e6), ("µs per update", "MB of agent state"), strict=True
    ):
        at_256 = measured[measured["width"] == 256]
        for (implementation, group), colour in zip(
            at_256.groupby("implementation", sort=False), [*COLOURS.values(), *MORE_COLOURS] * 3, strict=False
        ):
            group = group.sort_values("sparsity")
            if group["sparsity"].nunique() == 1:  # a dense implementation has one cost whatever the sparsity
                axes.axhline(group[column].iloc[0] / unit, color=colour, linestyle="--", label=implementation)
            else:
                axes.plot(group["sparsity"], group[column] / unit, "o-", color=colour, label=implementation)
        axes.set(xlabel="sparsity", ylabel=label, title=f"{label}, width 256")
        mark_empty(axes, why)
        if axes.get_legend_handles_labels()[0]:
            axes.set_ylim(bottom=0)
            axes.legend()
    return Plot("seconds_and_bytes", figure)


def select_setting(results: Results, setting: str, env: str) -> list[Run]:
    """Return the finished runs of a setting in an environment, in the order of their seeds."""
    method, settings = HIGH_SPARSITY[setting]
    return results.select(env, method, settings[env]) if env in settings else []


def mean_quotient(ours: list[np.ndarray], dense: list[np.ndarray]) -> tuple[float, tuple[float, float] | None]:
    """Return the mean over tasks of one cell's mean over another's, and its interval, None with too few seeds for one.

    The interval is Student's, with the variance that both means pass on (delta method) and Welch's degrees of freedom.
    """
    pairs = [(x, y, x.mean(), y.mean()) for x, y in zip(ours, dense, strict=True)]
    value = float(np.mean([x_mean / y_mean for *_, x_mean, y_mean in pairs]))
    sizes = [len(sample) for x, y, *_ in pairs for sample in (x, y)]
    if min(sizes) < LEAST_SEEDS:
        return value, None
    variances = []
    for x, y, x_mean, y_mean in pairs:
        by_x, by_y = 1 / y_mean / len(pairs), x_mean / y_mean**2 / len(pairs)  # derivatives of the value
        variances += [by_x**2 * x.var(ddof=1) / len(x), by_y**2 * y.var(ddof=1) / len(y)]
    low, high, _ = student(value, variances, sizes)
    return value, (low, high)


def over_dense(results: Results, setting: str, tasks: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the final returns of a setting on each task, and those of dense TD3."""
    ours = [final_returns(select_setting(results, setting, env)) for env in tasks]
    return ours, [final_returns(results.select(env, "td3")) for env in tasks]


def describe_quotient(ours: list[np.ndarray], dense: list[np.ndarray]) -> str:
    """Format a setting's return over dense TD3's, and how many seeds of the setting are behind it."""
    if min(map(len, ours + dense)) == 0:
        return "-"
    value, interval = mean_quotient(ours, dense)
    quotient = with_interval(value, interval) if interval else f"{value:.2f}"
    return f"{quotient} ({' + '.join(str(len(sample)) for sample in ours)})"


def high_sparsity(results: Results) -> Table:
    """Return final returns at high sparsity over dense TD3's."""
    rows = []
    for setting in HIGH_SPARSITY:
        quotients = {env: describe_quotient(*over_dense(results, setting, [env])) for env in FOUR_TASKS}
        mean = describe_quotient(*over_dense(results, setting, FOUR_TASKS))
        if set(quotients.values()) != {"-"}:
            rows.append({"setting": setting, **quotients, "mean of the four": mean})
    seeds = ", ".join(f"{env} {len(results.select(env, 'td3'))}" for env in FOUR_TASKS)
    caption = f"**Final return over dense TD3's** [95 % interval] (seeds). Seeds of dense TD3: {seeds}. {V4_NOTE}"
    return Table("high_sparsity", caption, rows)


def each_seed(selected: list[Run], target: float) -> str:
    """Format each run's final return, and in brackets the step where it reached ``target``, if it did."""
    formatted = []
    for run in selected:
        step = steps_to_reach(*steps_and_returns(run), target, never=None)
        formatted.append(f"{final_returns([run])[0]:,.0f}" + ("" if step is None else f" ({thousands(step)})"))
    return ", ".join(formatted) or "-"


def high_sparsity_seeds(results: Results) -> Table:
    """Return the final return of each seed at high sparsity, so that a mean cannot hide one that failed."""
    dense = {env: final_returns(results.select(env, "td3")) for env in FOUR_TASKS}
    targets = {env: returns.mean() if len(returns) else math.inf for env, returns in dense.items()}
    rows = []
    runs = {"TD3": {env: results.select(env, "td3") for env in FOUR_TASKS}}
    runs |= {setting: {env: select_setting(results, setting, env) for env in FOUR_TASKS} for setting in HIGH_SPARSITY}
    for setting, selected in runs.items():
        cells = {env: each_seed(selected[env], targets[env]) for env in FOUR_TASKS}
        if set(cells.values()) != {"-"}:
            rows.append({"setting": setting, **cells})
    caption = (
        "**Final return of each seed** (the step at which the mean of ten evaluations in a row reached dense TD3's "
        f"mean final return, where it did). {V4_NOTE}"
    )
    return Table("high_sparsity_seeds", caption, rows)


def frontier(results: Results) -> Table:
    """Return RLx2's frontier and, with no more connections in all, the returns, seconds and bytes of our agents."""
    columns = ("environment", "implementation", "speedup_over_dense", "state_bytes")
    measured, _ = read_benchmark(results, "frontier", columns)
    costs = measured.set_index(["environment", "implementation"])
    rows = []
    for env, (sparsities, published) in RLX2_PAPER.items():
        if not (selected := select_setting(results, AS_RLX2, env)):
            continue
        row = {"task": env, "RLx2's sparsities": sparsities, "RLx2's return over dense": f"{published:.2f}"}
        summary = selected[0].summary
        row["our connections"] = f"{summary['connections']:,} ({1 - summary['sparsity']:.1%})"
        row["our return over dense"] = describe_quotient(*over_dense(results, AS_RLX2, [env]))
        row |= {"steps/s over dense": "-", "MB, dense": "-"}
        if (env, "ds-td3, recipe") in costs.index:
            ours, dense = (costs.loc[env, name] for name in ("ds-td3, recipe", "td3, compiled"))
            row["steps/s over dense"] = f"{ours['speedup_over_dense']:.1f}x"
            row["MB, dense"] = f"{ours['state_bytes'] / 1e6:.2f}, {dense['state_bytes'] / 1e6:.2f}"
        rows.append(row)
    caption = (
        "**Beside RLx2**, whose actor and critics have as many connections together, in three million steps (ours: "
        "one). Share of dense connections in brackets, then [95 % interval] (seeds); speed and the bytes of an agent's "
        f"state are measured on one core, beside our compiled dense TD3. {V4_NOTE}"
    )
    return Table("frontier", caption, rows)


def plot_against_sparsity(axes: Axes, results: Results) -> None:
    """Draw final return over dense TD3's against sparsity, mean over the environments that have both."""
    names = list(HIGH_SPARSITY)
    for label, settings, marker, colour, shift in (  # those of the same sparsity stand side by side
        ("DS-TD3, the paper's settings", names[:3], "o", COLOURS["DS-TD3"], 0.0),
        ("DS-TD3, recipe", names[3:5], "s", GREEN, 0.02),
        ("Static-TD3, recipe", ["Static-TD3, 0.9, recipe"], "^", COLOURS["Static-TD3"], -0.02),
        ("DS-TD3, recipe, dropped by magnitude", ["DS-TD3, 0.9, recipe, but dropped by magnitude"], "v", PINK, -0.04),
    ):
        points = []
        for setting in settings:
            shared = [env for env in FOUR_TASKS if select_setting(results, setting, env) and results.select(env, "td3")]
            if not shared:
                continue
            value, interval = mean_quotient(*over_dense(results, setting, shared))
            low, high = interval or (value, value)
            runs = [run for env in shared for run in select_setting(results, setting, env)]
            at = np.mean([run.summary["sparsity"] for run in runs]) + shift
            points.append((at, value, value - low, high - value))
            if len(shared) < len(FOUR_TASKS):
                text = {"textcoords": "offset points", "ha": "center", "color": colour}
                axes.annotate(str(len(shared)), (at, high), (0, 7), **text)
        if points:
            x, y, below, above = zip(*points, strict=True)
            axes.errorbar(x, y, (below, above), fmt=marker, color=colour, label=label, capsize=3)
    axes.set(
        xlabel="sparsity (equal ones side by side)",
        ylabel="final return over dense TD3's",
        title="mean over environments",
    )
    mark_empty(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.axhline(1, color=COLOURS["TD3"], linestyle="--", label="TD3")
        axes.margins(y=0.3)
        axes.set(xlim=(0.4, 1), ylim=(0, None))
        axes.legend(loc="lower left")


TIMED = {  # on HalfCheetah: a setting, whose speed by the benchmark's name, and its colour
    "TD3 at RLtools' speed": ("rltools", COLOURS["TD3"]),
    "DS-TD3, the paper's settings": ("ds-td3, sparsity 0.5", COLOURS["DS-TD3"]),
    "DS-TD3, 0.9, recipe": ("ds-td3, sparsity 0.9, recipe", GREEN),
    "DS-TD3, 0.95, recipe": ("ds-td3, sparsity 0.95, recipe", PINK),
    "TD3, width 77, recipe": ("td3, width 77, recipe", SKY),
}


def time_to_dense(selected: list[Run], dense: list[Run], speed: float, reference: float) -> dict[str, str]:
    """Return the columns of the time to dense TD3's final return, at microseconds a step of both."""
    step = first_step(selected, final_returns(dense).mean())
    whole = dense[0].steps * reference / 1e6
    curve = smoothed(learning_curves(selected).mean(axis=1))
    by_then = curve[curve.index * speed / 1e6 <= whole / 3].iloc[-1]
    return {
        "steps/s": f"{1e6 / speed:,.0f}",
        "TD3's final return reached at step": "not reached" if step is None else f"{step:,}",
        "minutes": "-" if step is None else f"{step * speed / 6e7:.1f}",
        "of RLtools' whole run": "-" if step is None else f"{step * speed / whole / 1e6:.0%}",
        "return after a third of that run's time": f"{by_then:,.0f}",
        **basis(selected),
    }


def figure_5(results: Results) -> tuple[Plot, Table]:
    """Return returns at high sparsity, against sparsity and against time, and the time to dense TD3's final return."""
    measured, _ = read_benchmark(results, "end_to_end", ("implementation", "microseconds_per_step"))
    speeds = measured.set_index("implementation")["microseconds_per_step"]
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_against_sparsity(left, results)
    dense, rows = results.select(HALFCHEETAH, "td3"), []
    for label, (implementation, colour) in TIMED.items():
        selected = select_setting(results, label, HALFCHEETAH) if label in HIGH_SPARSITY else dense
        if not selected or implementation not in speeds:
            continue
        minutes = learning_curves(selected).index * speeds[implementation] / 1e6 / 60
        plot_curves(right, selected, label, colour, x=minutes)
        if dense and "rltools" in speeds:
            columns = time_to_dense(selected, dense, speeds[implementation], speeds["rltools"])
            rows.append({HALFCHEETAH: label, **columns})
    label_axes(right, HALFCHEETAH, xlabel="minutes on one core")
    add_legend_where_drawn(right)
    caption = "**Time to dense TD3's final return**, evaluations left out."
    return Plot("fig5_high_sparsity", figure), Table("seconds_to_dense", caption, rows)


# --- Beyond the paper: topologies, provenance -------------------------------------------------------------------------
def topology_alive(results: Results) -> Plot:
    """Return the share of the first connections that is still alive, in each sparse layer, mean over seeds."""
    layers = {("actor", 1): "-", ("actor", 2): "--", ("critic", 1): "-", ("critic", 2): "--"}
    figure, panels = environment_panels(results)
    for env, axes in panels.items():
        if selected := [r for r in results.select(env, "ds-td3") if len(r.topology)]:
            topology = pd.concat([r.topology for r in selected])
            alive = topology.groupby(["network", "layer", "step"])["initial_connections_alive"].mean()
            for (network, layer), style in layers.items():
                if (network, layer) in alive.index:
                    colour = COLOURS["DS-TD3"] if network == "actor" else COLOURS["Static-TD3"]
                    axes.plot(alive[network, layer], style, color=colour, label=f"{network} layer {layer}")
            axes.set_ylim(0, 1.02)
        label_axes(axes, env, ylabel="first connections alive")
    add_legend(figure, panels)
    return Plot("topology_alive", figure)


def topology_inputs(results: Results) -> Plot:
    """Return the connections of each input feature in the actor's first layer over a run, of the lowest seed."""
    figure, panels = environment_panels(results)
    for env, axes in panels.items():
        axes.grid(False)
        if selected := [r for r in results.select(env, "ds-td3") if len(r.topology)]:
            topology = selected[0].topology
            first = topology[(topology["network"] == "actor") & (topology["layer"] == 1)]
            counts = np.array([[int(n) for n in row.split()] for row in first["connections_per_input"]]).T
            extent = (first["step"].min(), first["step"].max(), len(counts) - 0.5, -0.5)
            image = axes.imshow(counts, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis")
            figure.colorbar(image, ax=axes, label="connections")
            axes.xaxis.set_major_formatter(thousands)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=env, xlabel="environment steps", ylabel="input feature")
        mark_empty(axes)
    return Plot("topology_inputs", figure)


def count_dormant(layers: list[Layer]) -> tuple[list[int], float]:
    """Return how many units of each hidden layer are dormant, and the share of connections with one at either end."""
    dormant = [((layer.weight.abs().sum(0) < DORMANT) & (layer.bias[0] <= 0)).numpy() for layer in layers[:-1]]
    ends = [np.zeros(layers[0].mask.shape[0], bool), *dormant, np.zeros(layers[-1].mask.shape[1], bool)]
    wasted = [
        (layer.mask.numpy() == 1) & (before[:, None] | after)
        for layer, (before, after) in zip(layers, itertools.pairwise(ends), strict=True)
    ]
    share = sum(layer.sum() for layer in wasted) / sum(int(layer.mask.sum()) for layer in layers)
    return [int(units.sum()) for units in dormant], share


def dormant_units(results: Results) -> Table:
    """Return how many units of trained actors are dormant, and how many of their connections come to nothing."""
    rows = []
    for _, env, method, options in SETTINGS:
        if actors := [run.actor for run in results.select(env, method, options) if run.actor]:
            units, shares = zip(*map(count_dormant, actors), strict=True)
            rows.append(
                {
                    "environment": env,
                    "method": name_of(method),
                    "option": describe_options(options),
                    "dormant units of each hidden layer": " and ".join(f"{n:.0f}" for n in np.mean(units, axis=0)),
                    "the actor's connections into or out of them": f"{np.mean(shares):.0%}",
                    "seeds": str(len(actors)),
                }
            )
    return Table("dormant_units", "**Dormant units** of trained actors, mean over seeds.", rows)


def session_columns(session: dict) -> dict[str, str]:
    """Return the columns that say what one session of a run was made with."""
    versions, commit = session["versions"], str(session["commit"])
    return {
        "processor": session["machine"]["processor"],
        "python": versions["python"],
        "torch": versions["torch"],
        "gymnasium": versions["gymnasium"],
        "mujoco": versions.get("mujoco", "-"),
        "commit": commit[:12] + commit[40:],  # a "-dirty" may follow its digits
    }


def run_columns(run: Run) -> dict[str, str]:
    """Return the columns of a run: those of its sessions, in order, where they differ."""
    columns = {"engine": run.engine}
    sessions = [session_columns(session) for session in run.sessions]
    for name in sessions[0]:
        changes = itertools.groupby(session[name] for session in sessions)
        columns[name] = ", then ".join(value for value, _ in changes)
    return columns


def provenance(results: Results) -> Table:
    """Return which engine, machine, versions and commits made each finished run."""
    made = pd.DataFrame(
        [
            {
                "environment": run.env,
                "method": name_of(run.method),
                "option": describe_options(run.options),
                "steps": f"{run.steps:,}",
                **run_columns(run),
                "seeds": run.seed,
            }
            for run in results.runs
            if run.summary
        ]
    )
    rows = []
    if len(made):
        grouped = made.groupby(list(made.columns.drop("seeds")), sort=True)["seeds"]
        seeds = grouped.apply(lambda numbers: ", ".join(map(str, sorted(numbers)))).reset_index()
        rows = seeds.to_dict("records")
    return Table("provenance", "**What made each finished run.**", rows)
