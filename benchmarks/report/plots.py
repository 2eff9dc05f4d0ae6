"""A report as pictures; one that has nothing to show is not drawn. Needs matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcfg.utils.files import replacing

from .reading import OURS, case, condition, duration, fastest, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COPY, MODEL = "copy of the same bytes", "model alone"
_ORIGINALS = ("guided-diffusion", "guided-diffusion itself", "GLIDE", "GLIDE itself", "diffusers", "k-diffusion")
_NAMES = (
    *OURS,
    *_ORIGINALS,
    "torch eager",
    "torch.compile",
    "torch.compile max-autotune",
    "torch.compile reduce-overhead",
    COPY,
)
# Okabe and Ito's, which colour-blind people tell apart, and darker ones of the same; fastcfg has the cool ones.
_OURS = "#003A5D #56B4E9 #0072B2 #009E73 #56B4E9 #0072B2 #009E73 #00543D "
_RIVALS = "#E69F00 #8F6300 #D55E00 #7A3600 #CC79A7 #7B4173 #8C8C8C #B8A800 #6B6200 #6B6200 #000000"
_LOOKS = dict(zip(_NAMES, zip((_OURS + _RIVALS).split(), "vosDosD^os^sDvPXhh ", strict=True), strict=True))
_STYLE = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
Result = dict[str, Any]
Groups = dict[str, list[Result]]


def draw(report: Result, folder: str | Path) -> list[Path]:
    """Draw what the report has, each PNG whole or not at all, and return what was written; OSError if it cannot be."""
    import matplotlib

    written = []
    for make in (speedup, bandwidth, waterfall, roofline):
        with matplotlib.rc_context(_STYLE):
            if figure := make(report):
                written.append(Path(folder) / f"{make.__name__}.png")
                with replacing(written[-1]) as temporary:
                    figure.savefig(temporary, dpi=160, format="png", metadata={"Software": None})
    return written


def speedup(report: Result) -> Figure | None:
    """How many times as long everyone else takes as fastcfg's fastest provider, by batch."""
    groups, told = _alike(report, "step", lambda r: f"{r['family']}, {r['solver']}")
    if several := {name for name, results in groups.items() if len({r["shape"][0] for r in results}) > 1}:
        groups = {name: results for name, results in groups.items() if name in several}
    groups = dict(sorted(groups.items(), key=lambda group: group[0].split(", ")[0]))  # a line of panels per family
    ticks = sorted({result["shape"][0] for results in groups.values() for result in results})

    def panel(axes: Axes, results: list[Result]) -> None:
        rivals = [name for name in _names(results) if name not in OURS]
        for i, rival in enumerate(rivals):
            ratios = ((r["shape"][0], r["ratios"].get(fastest(r)[1], {}).get(rival)) for r in results)
            points = sorted((batch, ratio) for batch, ratio in ratios if ratio)
            errors = [[abs(ratio[key] - ratio["p50"]) for _, ratio in points] for key in ("p20", "p80")]
            # Side by side, so that none hides another.
            batches = [batch * 1.05 ** (i - (len(rivals) - 1) / 2) for batch, _ in points]
            if points:
                axes.errorbar(batches, [ratio["p50"] for _, ratio in points], errors, capsize=2, **_look(rival))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", subs=[2, 5])
        axes.set(xticks=ticks, xticklabels=ticks, xlim=(ticks[0] / 1.6, ticks[-1] * 1.6))
        axes.yaxis.set(major_formatter="{x:g}×", minor_formatter="{x:g}×")
        axes.axhline(1, color="black", linewidth=0.8)

    title = f"One step beside the model: everyone else's time / fastcfg's fastest\n{told}; bars: 20 to 80 %"
    return _grid(groups, panel, title, ("batch", "speed-up"), len({name.split(", ")[1] for name in groups}))


def bandwidth(report: Result) -> Figure | None:
    """Bytes per second by bytes moved, below what a copy of as many bytes reaches."""
    from matplotlib.ticker import NullFormatter

    def panel(axes: Axes, results: list[Result]) -> None:
        for name in (*_names(results), COPY):
            rates = [(r["bytes"] / 1e6, r["providers"].get(name, {}).get("gb_per_s")) for r in results]
            if points := sorted((size, rate) for size, rate in rates if rate):
                axes.plot(*zip(*points, strict=True), **_look(name))
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())

    groups, told = _alike(report, "step", lambda r: r["solver"])
    title = f"One step beside the model: its bytes / its time; dashed: a copy of as many bytes\n{told}"
    return _grid(groups, panel, title, ("MB that a fused step moves", "GB/s"), len(groups))


def waterfall(report: Result) -> Figure | None:
    """A loop's time per row from the originals to the captured program: the model, and everything else."""

    def panel(axes: Axes, results: list[Result]) -> None:
        result, times = results[0], timed(results[0])
        floor = result["providers"].get(MODEL, {}).get("us", {"p50": 0})["p50"] / result["rows"]
        for name, found in times.items():
            low, total, high = (found["us"][key] / result["rows"] for key in ("p20", "p50", "p80"))
            axes.barh(name, min(floor, total), color="#C8C8C8")
            axes.barh(name, max(total - floor, 0), left=floor, color=_look(name)["color"])
            axes.errorbar(total, name, xerr=[[total - low], [high - total]], color="#333333", capsize=2)
            axes.annotate(f"  {duration(total)}", (high, name), va="center")
        axes.set_xlim(0, 1.25 * max(found["us"]["p80"] for found in times.values()) / result["rows"])
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda us, _: duration(us))

    groups, told = _alike(report, "loop", lambda r: f"{case(r)}, {r['solver']}, {r['rows']} rows")
    title = f"One row of a sampling loop: the model alone (grey), everything else (coloured)\n{told}; bars: 20 to 80 %"
    return _grid(groups, panel, title, ("time per row", ""), 2, shared=False)


def roofline(report: Result) -> Figure | None:
    """The two lower bounds of every kernel variant on every GPU, from the machine code."""

    def panel(axes: Axes, rows: list[Result]) -> None:
        names = [row["variant"] for row in rows[::-1]]
        bounds = [[row[key] for row in rows[::-1]] for key in ("bytes_ps", "instructions_ps")]
        axes.hlines(names, *bounds, color="#BBBBBB")
        axes.plot(bounds[0], names, "o", color="#0072B2", label="by bytes moved", markersize=5)
        axes.plot(bounds[1], names, "s", color="#D55E00", label="by instructions issued", markersize=4)
        axes.set_xlim(left=0)

    roof = report["roofline"] or {"rows": [], "triton": ""}
    groups: Groups = {}
    for row in roof["rows"]:
        for gpu, bounds in row["gpus"].items():
            groups.setdefault(gpu, []).append({"variant": row["variant"], **bounds})
    title = f"Least time by datasheet and machine code (Triton {roof['triton']}), not measured: the greater one holds"
    return _grid(groups, panel, title, ("ps per element", ""), len(groups))


def _alike(report: Result, kind: str, key: Callable[[Result], str]) -> tuple[Groups, str]:
    """Results of one kind, dtype and noise, those that most have, by panel; and these conditions in words."""
    results = [result for result in report["results"].values() if result["kind"] == kind and timed(result)]
    counted = Counter((result["dtype"], result["noise"]) for result in results)
    most = max(counted, key=lambda pair: (counted[pair], pair[1] == "given"), default=("", ""))
    kept = [result for result in results if (result["dtype"], result["noise"]) == most]
    groups = {name: [r for r in kept if key(r) == name] for name in dict.fromkeys(map(key, kept))}
    return groups, f"{condition(report)}, {most[0]}, noise {most[1]}"


def _names(results: list[Result]) -> list[str]:
    """Who has a time, in the order of the colours."""
    found = dict.fromkeys(name for result in results for name in timed(result))
    return sorted(found, key=lambda name: list(_LOOKS).index(name) if name in _LOOKS else len(_LOOKS))


def _look(name: str) -> dict[str, Any]:
    colour, marker = _LOOKS.get(name, ("#444444", "o"))
    return {"label": name, "color": colour, "marker": marker, "ms": 4, "ls": "--" if name == COPY else "-"}


def _grid(
    groups: Groups, panel: Callable[..., None], title: str, labels: tuple[str, str], columns: int, shared: bool = True
) -> Figure | None:
    """A panel for every group and one legend for all of them; None without groups."""
    from matplotlib.figure import Figure

    if not groups:
        return None
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(9, 1 + rows * max(2.4, 0.18 * max(map(len, groups.values())))), layout="constrained")
    figure.suptitle(title)
    legend: dict[str, Any] = {}
    grid = figure.subplots(rows, columns, squeeze=False, sharey=shared)
    for axes, (name, results) in zip_longest(grid.flat, groups.items(), fillvalue=("", [])):
        axes.set(title=name, xlabel=labels[0], ylabel=labels[1], axisbelow=True)
        if shared:
            axes.label_outer()
        panel(axes, results) if results else axes.set_axis_off()
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if shared and not legend:
        return None
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=5, labelcolor="linecolor", frameon=False)
    return figure
