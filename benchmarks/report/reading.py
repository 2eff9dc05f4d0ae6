"""What tables, pictures and comparisons read out of a report (the results.json of `python -m benchmarks`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastcfg.cli.parser import UsageError

SCHEMA = 1
_LOOPS = ("fastcfg", "fastcfg inductor", "fastcfg captured", "fastcfg captured compiled")
OURS = ("native", "reference", "inductor", "triton", *_LOOPS)


def load(path: str | Path) -> dict[str, Any]:
    """A report; UsageError if there is no such file, or not such a report."""
    try:
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        for result in report["results"].values():
            _ = result["ratios"].items(), [found["status"] for found in result["providers"].values()]
        _ = report["environment"], report["left"].items(), report["finished"]
        if (schema := report.get("schema")) != SCHEMA:
            raise UsageError(f"{path}: got schema {schema}, expected {SCHEMA}")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a report of `python -m benchmarks`") from error
    return report


def timed(result: dict[str, Any], floors: bool = False) -> dict[str, dict[str, Any]]:
    """Who has a time in a result, fastest first; floors (which make no result) only if asked for."""
    found = {k: v for k, v in result["providers"].items() if v.get("us") and (floors or not v.get("floor"))}
    return dict(sorted(found.items(), key=lambda item: item[1]["us"]["p50"]))


def fastest(result: dict[str, Any]) -> tuple[str | None, str | None]:
    """The fastest of everyone else and the fastest of fastcfg's own providers; None where there is none."""
    names = list(timed(result))
    return next((n for n in names if n not in OURS), None), next((n for n in names if n in OURS), None)


def case(result: dict[str, Any]) -> str:
    """The shape's or model's name and the batch."""
    return f"{result['family']} b{result['shape'][0]}"


def condition(report: dict[str, Any]) -> str:
    """The device, and a CPU's threads."""
    facts, threads = report["environment"], report["environment"]["threads"]
    return facts["device"] + f", {threads} thread{'s' * (threads != 1)}" * (facts["device_type"] == "cpu")


def duration(us: float | None) -> str:
    """Microseconds to three digits, in a unit that suits them; nothing for None."""
    unit, size = ("µs", 1) if us is None or us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)
    return "" if us is None else f"{us / size:.3g} {unit}"


def spread(ratio: dict[str, float] | None) -> str:
    """A ratio's median with its 20 to 80 % range; nothing for None."""
    form = ".2f" if ratio and ratio["p50"] < 2 else ".1f"
    return "" if ratio is None else f"{ratio['p50']:{form}} ({ratio['p20']:{form}}-{ratio['p80']:{form}})"


def number(value: float | None, form: str = ".0f") -> str:
    """A number; nothing for None."""
    return "" if value is None else f"{value:{form}}"
