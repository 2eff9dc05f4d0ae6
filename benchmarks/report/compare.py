"""Two reports of `python -m benchmarks`: what became slower or faster beyond the runs' own spread.

It compares the ratios to all other providers' times in the same run, which stay true from machine to machine and under
load. A ratio has changed if its 20 to 80 % ranges in the two reports do not overlap; it is worse if the new range lies
below the old one. A result or provider that has gone, or is newly refused or failed, is worse too. Absolute times are
reported where device, threads and clock are the same, and never judged.

example: python -m benchmarks compare benchmarks/results/cpu/bench.json results.json
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.command import parser_of

from .reading import load, spread, timed

_FEW = "not judged: too few turns"
_VERDICTS = ("unchanged", "slower", "faster", _FEW, "gone, refused or failed", "only in the new report")
# With three turns 26 % of equal runs differ by this rule, with five 10 %, with ten 1 % (simulated).
_ENOUGH = 8


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Lines by verdict: a dictionary of `_VERDICTS`."""
    told: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    *_, gone, alone = told.values()
    alone += [name for name in new["results"] if name not in old["results"]]
    gone += [f"{n}: {new['left'].get(n, 'not in the report')}" for n in old["results"] if n not in new["results"]]
    for name in old["results"].keys() & new["results"].keys():
        first, second = old["results"][name], new["results"][name]
        for provider in first["providers"] | second["providers"]:
            was, now = (result["providers"].get(provider, {"status": "missing"}) for result in (first, second))
            wrong = [found["status"] in ("refused", "failed") for found in (was, now)]
            if (was["status"] == "ok" and now["status"] != "ok") or wrong == [False, True]:
                gone.append(f"{name}: {provider}: {now['status']} {now.get('reason', '')}".rstrip())
            elif now["status"] == "ok" and was["status"] != "ok":
                alone.append(f"{name}: {provider}")
        for own, base in ((own, base) for own, bases in first["ratios"].items() for base in bases):
            before, after = (result["ratios"].get(own, {}).get(base) for result in (first, second))
            line = f"{name}: {base} / {own}: {spread(before)} -> {spread(after)}"
            if after and min(first["turns"], second["turns"]) < _ENOUGH:
                told[_FEW].append(line)
            elif after:
                slower, faster = after["p80"] < before["p20"], after["p20"] > before["p80"]
                told["slower" if slower else "faster" if faster else "unchanged"].append(line)
            elif timed(second).keys() >= {own, base}:
                gone.append(f"{line}no ratio")
    return {verdict: sorted(lines) for verdict, lines in told.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Which of device, threads and clock differ: where any does, absolute times say nothing."""
    pairs = [(report["environment"], report["results"].values()) for report in (old, new)]
    found = [(facts["device"], facts["threads"], sorted({r["clock"] for r in results})) for facts, results in pairs]
    return [f"{n}: {a} -> {b}" for n, a, b in zip(("device", "threads", "clock"), *found, strict=True) if a != b]


def absolutes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """New by old median times, by provider over all results that both have: median, least and greatest."""
    found: dict[str, list[float]] = {}
    for name in old["results"].keys() & new["results"].keys():
        before, after = (timed(report["results"][name], floors=True) for report in (old, new))
        for provider in before.keys() & after.keys():
            found.setdefault(provider, []).append(after[provider]["us"]["p50"] / before[provider]["us"]["p50"])
    return [f"{n}: {median(q):.2f} ({min(q):.2f}-{max(q):.2f}), {len(q)} results" for n, q in sorted(found.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 1 if something became worse, or a provider has gone."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    arguments = parser.parse_args(argv)
    old, new = load(arguments.old), load(arguments.new)
    found, other = changes(old, new), differences(old, new)
    compared = sum(len(found[verdict]) for verdict in ("unchanged", "slower", "faster"))
    told = found | {"unchanged": [], "other conditions, so only ratios are compared": other}
    told["absolute times, new / old (not judged)"] = [] if other else absolutes(old, new)
    for title, lines in told.items():
        if lines:
            print(f"{title}:\n  " + "\n  ".join(lines))
    print(f"{compared} ratios compared: {len(found['slower'])} slower, {len(found['faster'])} faster")
    return 1 if found["slower"] or found["gone, refused or failed"] else 0
