"""The curve of adherence over network forwards per picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.ways import Best, Measured
from fastcfg.utils.files import replacing

_FORWARDS, _PER_CENT = [10, 15, 20, 30, 50, 100], [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]


def plot(measured: Iterable[Measured], best: Best, chosen: Measured | None, path: str) -> None:
    """Draw it as a PNG, whole or not at all: a line for every solver, kind of guidance, scale, interval and schedule,
    filled where a way drew as many prompts as the best."""
    from matplotlib.figure import Figure

    lines: dict[str, list[Measured]] = defaultdict(list)
    for row in sorted(measured, key=lambda row: (row.way.solver, row.forwards_per_picture)):
        lines[row.way.label(steps=False)].append(row)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    low, high = (100 * (1 - best.adherence + sign * best.standard_error) for sign in (-1, 1))
    axes.axhspan(low, high, color="gray", alpha=0.2, label=f"best ({best.way.label()}) ± one standard error")
    axes.plot(best.forwards_per_picture, 100 * (1 - best.adherence), "ks")
    marks = "osv^D<>phX*P"
    for number, (label, rows) in enumerate(lines.items()):
        colour, mark = f"C{number % 10}", marks[number % len(marks)]
        x = [row.forwards_per_picture for row in rows]
        wrong, errors = ([100 * value(row) for row in rows] for value in (_wrong, lambda row: row.standard_error))
        axes.errorbar(
            x, wrong, errors, label=label, color=colour, marker=mark, mfc="white", capsize=2, linewidth=1, markersize=5
        )
        full = [i for i, row in enumerate(rows) if len(row.verdicts) >= best.num_prompts]
        axes.plot([x[i] for i in full], [wrong[i] for i in full], mark, color=colour, zorder=4)
    if chosen is not None:
        where = (chosen.forwards_per_picture, 100 * _wrong(chosen))
        axes.plot(*where, "o", markersize=15, fillstyle="none", color="black", label="fast", zorder=5)
    axes.set(xlabel="network forwards per picture", ylabel="pictures that lack something asked for, %")
    axes.set(title=f"filled: {best.num_prompts} prompts, open: fewer; bars: one standard error")
    axes.set(
        xscale="log", yscale="log", xticks=_FORWARDS, xticklabels=_FORWARDS, yticks=_PER_CENT, yticklabels=_PER_CENT
    )
    axes.set_ylim(0.1, 120)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside right upper")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _wrong(row: Measured) -> float:
    return 1 - row.fraction
