"""A report as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from .reading import OURS, case, condition, duration, fastest, number, spread, timed

_COUNTS = ("dispatched", "kernels", "full_size", "reads", "host_copies")


def terminal(report: dict[str, Any]) -> str:
    """In 120 columns: the fastest rival beside fastcfg's fastest provider; what has no time, or is undone, and why."""
    lines = [condition(report), *_overview(report)]
    for title, results in _blocks(report).items():
        heads = ["", "dtype", "fastest rival", "time", "fastcfg", "time", "ratio", "GB/s", "copy", "roof", "kernels"]
        lines += ["", f"{title} (ratio: 20 to 80 % in brackets; times and kernels per row)"]
        lines += aligned(heads, map(_summary, results))
    for note in ["", *_notes(report)]:
        lines += wrap(note, 120, subsequent_indent="    ", break_on_hyphens=False) or [""]
    return "\n".join(lines) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown tables."""
    parts = [f"# {condition(report)}", "\n".join(f"- {note}" for note in _notes(report))]
    parts.append('Medians; "/ NAME": how many times as long as fastcfg\'s NAME takes, pair by pair (20 to 80 %).')
    for title, results in _blocks(report).items():
        parts += [f"## {title}", _everything(results)]
    facts = [(name, str(value)) for name, value in {**report["environment"], **report["settings"]}.items()]
    parts += ["## What one run dispatches", _counts(report), "## Machine code", roofline(report["roofline"])]
    parts += ["## Environment", table(("name", "value"), facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def roofline(roof: dict[str, Any] | None, variants: Sequence[str] = ()) -> str:
    """The kernels' machine code as a Markdown table, of all variants if none is named."""
    rows = []
    for row in roof["rows"] if roof else ():
        if not variants or row["variant"] in variants:
            cells = [row["variant"], row["target"], str(row["bytes_per_element"])]
            cells += [f"{row['instructions_per_element']:.1f}", str(row["registers"])]
            found = ((gpu, max(b["bytes_ps"], b["instructions_ps"]), b["bound"]) for gpu, b in row["gpus"].items())
            bounds = ", ".join(f"{gpu} {time:.1f} ({bound})" for gpu, time, bound in found)
            rows.append([*cells, str(row["spills"] + row["stack_bytes"]), bounds])
    heads = ("kernel", "target", "bytes per element", "instructions per element", "registers", "spills, local bytes")
    return table((*heads, "bound, ps per element"), rows) or "Not compiled."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without the columns that hold nothing; nothing without rows."""
    kept = _without_empty([list(heads), *map(list, rows)])
    lines = ["| " + " | ".join(row) + " |" for row in kept]
    return "\n".join([lines[0], "|" + "---|" * len(kept[0]), *lines[1:]]) if lines[1:] else ""


def aligned(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The same as lines of text, with numbers to the right."""
    kept = _without_empty([list(heads), *map(list, rows)])
    columns = list(zip(*kept, strict=True))
    numbers = [all(cell[:1].isdigit() for cell in column[1:] if cell) for column in columns]
    forms = [f"{'>' if right else '<'}{max(map(len, c))}" for right, c in zip(numbers, columns, strict=True)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in kept]


def _blocks(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    blocks: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"].values():
        blocks.setdefault(f"{result['kind']} {result['solver']}, noise {result['noise']}", []).append(result)
    return blocks


def _overview(report: dict[str, Any]) -> list[str]:
    """For every kind of work, everyone else's times in shares of fastcfg's fastest provider's: the range of medians."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in report["results"].values():
        for rival, ratio in result["ratios"].get(fastest(result)[1], {}).items():
            found.setdefault(result["kind"], {}).setdefault(rival, []).append(ratio["p50"])
    lines = ["", "how many times as long as fastcfg's fastest provider:"] if found else []
    for kind, rivals in found.items():
        told = ", ".join(f"{name} {min(ratios):.2g} to {max(ratios):.2g}" for name, ratios in rivals.items())
        lines += wrap(f"  {kind:8s}{told}", 120, subsequent_indent=" " * 10, break_on_hyphens=False)
    return lines


def _summary(result: dict[str, Any]) -> list[str]:
    rival, own = fastest(result)
    times = timed(result)
    cells = [case(result), result["dtype"].replace("float", "f")]
    for name in (rival, own):
        time = duration(times[name]["us"]["p50"] / result["rows"]) if name else ""
        cells += [(name or "-").replace("torch.compile ", "compile "), time]
    found = times.get(own or "", {})
    kernels = (found.get("counts") or {}).get("kernels")
    cells += [spread(result["ratios"].get(own, {}).get(rival)), number(found.get("gb_per_s"))]
    cells += [number(found.get(key), ".0%") for key in ("of_copy", "of_roofline")]
    return [*cells, "" if kernels is None else f"{kernels / result['rows']:.3g}"]


def _everything(results: list[dict[str, Any]]) -> str:
    own = [name for name in OURS if any(name in result["ratios"] for result in results)]
    heads = ["shape", "dtype", "provider", "a run", *(f"/ {name}" for name in own), "device", "host", "GB/s", "of copy"]
    rows = []
    for result in results:
        for name, found in (timed(result, floors=True) | result["providers"]).items():
            times = [(found.get(key) or {}).get("p50") for key in ("us", "device_us", "host_us")]
            ratios = [spread(result["ratios"].get(base, {}).get(name)) for base in own]
            row = [case(result), result["dtype"], name, duration(times[0]) or found["status"], *ratios]
            row += [*map(duration, times[1:]), number(found.get("gb_per_s"), ".1f")]
            row += [number(found.get(key), ".0%") for key in ("of_copy", "of_roofline")]
            row += [number(found.get(key), ",") for key in ("peak_bytes", "held_bytes", "compilations")]
            rows.append([*row, number(found.get("first_s"), ".3g"), number(found.get("error"), ".1e")])
    return table([*heads, "of roofline", "peak bytes", "held bytes", "compilations", "first run, s", "error"], rows)


def _counts(report: dict[str, Any]) -> str:
    rows = dict.fromkeys(
        (title, r["family"], r["dtype"], name, *(number(found["counts"].get(key), "") for key in _COUNTS))
        for title, results in _blocks(report).items()
        for r in results
        for name, found in r["providers"].items()
        if found.get("counts")
    )
    return table(("run", "shape", "dtype", "provider", *(key.replace("_", " ") for key in _COUNTS)), rows)


def _notes(report: dict[str, Any]) -> list[str]:
    """Who has no time, what is undone and what the GPU did; identical reasons once."""
    found = [
        (f"{provider['status']}, {provider['reason']}", who, name)
        for name, result in report["results"].items()
        for who, provider in result["providers"].items()
        if provider["status"] != "ok"
    ]
    found += [(f"left undone, {reason}", "", name) for name, reason in report["left"].items()]
    lines = []
    for reason in dict.fromkeys(why for why, _, _ in found):
        who, where = (dict.fromkeys(entry[i] for entry in found if entry[0] == reason) for i in (1, 2))
        names = ", ".join(filter(None, who))
        lines.append(f"{reason}: {names} (in {_named(where)})" if names else f"{reason}: {_named(where)}")
    lines += [f"GPU: {note}" for note in (report["gpu"] or {}).get("notes", ())]
    return lines if report["finished"] else [*lines, "not finished"]


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _named(names: Iterable[str], most: int = 3) -> str:
    first = list(names)
    return ", ".join(first[:most]) + (f" and {len(first) - most} more" if len(first) > most else "")
