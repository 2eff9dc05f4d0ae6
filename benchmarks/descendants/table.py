"""The comparison as a Markdown table: a row a call, its generator's in the same row."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .compare import BAD

Record = dict[str, Any]

_WORST = (*BAD, "broken", "refused", "the original", "stepped, then the original", "stepped", "engine")
_WORDS = {
    "engine": "fused",
    "stepped": "fused, its own loop",
    "stepped, then the original": "the original",
}
_HEAD = (
    "project",
    "commit",
    "call",
    "outcome",
    "images differ by",
    "`pred_xstart`s by",
    "µs a step: theirs → ours",
)


def table(projects: list[Record], before: list[Record] | None = None) -> str:
    """The table.

    Args:
        projects: name, commit and calls, the records of `compare`.
        before: the same of an earlier fastcfg, for a column of what its outcomes were.
    """
    earlier = _outcomes(before or [])
    head = [*_HEAD[:3], *(["before"] if before else []), *_HEAD[3:]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for project in projects:
        for i, rows in enumerate(_grouped(project["calls"]).values()):
            worst = min(rows, key=lambda row: _WORST.index(row["outcome"]))
            names = [project["name"], project["commit"]] if i == 0 else ["", ""]
            was = [_cell(earlier.get((project["name"], worst["name"])))] if before else []
            apart = [row["difference"] for row in rows if row["difference"] is not None]
            steps = [row["predicted"] for row in rows if row["progressive"] and row.get("predicted") is not None]
            times = next((row["step_us"] for row in rows if row.get("step_us")), None)
            speed = f"{times[0]:.0f} → {times[1]:.0f}" if times else ""
            shown = [f"{max(values):.1g}" if values else "" for values in (apart, steps)]
            cells = [*names, _call(rows), *was, _outcome(worst), *shown, speed]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(projects: list[Record]) -> str:
    """How many calls, a loop and its generator as one, have which outcome."""
    counts = Counter(_cell(outcome) for outcome in _outcomes(projects).values())
    return f"{counts.total()} calls: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())


def _grouped(calls: list[Record]) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for call in calls:
        rows.setdefault(call["name"], []).append(call)
    return rows


def _outcomes(projects: list[Record]) -> dict[tuple[str, str], str]:
    return {
        (project["name"], name): min((row["outcome"] for row in rows), key=_WORST.index)
        for project in projects
        for name, rows in _grouped(project["calls"]).items()
    }


def _call(rows: list[Record]) -> str:
    name, _, rest = rows[0]["name"].partition(", ")
    return f"`{name}`" + f", {rest}" * bool(rest) + ", progressive" * any(row["progressive"] for row in rows)


def _cell(outcome: str | None) -> str:
    return "" if outcome is None else _WORDS.get(outcome, outcome)


def _outcome(row: Record) -> str:
    reason = row["reason"].replace("|", "\\|")
    reason = reason if len(reason) <= 120 else f"{reason[:117]} ..."
    shown = row["outcome"] != "engine" and reason
    return _cell(row["outcome"]) + (f" ({reason})" if shown else "")
