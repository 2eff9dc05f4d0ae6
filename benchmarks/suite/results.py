"""The file of results: written whole after every workload, so that nothing finished is lost, and resumed later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report.reading import SCHEMA, load
from fastcfg.utils.files import write_text

OUT_OF_TIME = "time budget used up"
# A file is resumed if these are the same; else its times would stand beside others'.
_SAME = ("fastcfg", "python", "torch", "triton", "device", "device_type", "threads", "commit")


class Results:
    """Results of a run, in a file.

    Args:
        path: the file. It is resumed if it is unfinished and of the same commit, machine and settings, else kept beside
            the new one as previous.json.
        environment: of this run.
        settings: of this run.
        fresh: never resume.

    Attributes:
        report: the file's content; docs/benchmarks.md describes it.
        told: what was done with an earlier file; empty without one.

    Raises:
        UsageError: an earlier file is no report, or cannot be read.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, environment: dict[str, Any], settings: dict[str, Any], fresh: bool = False) -> None:
        self._path, self.told = path, ""
        head = {"schema": SCHEMA, "finished": False, "environment": environment, "settings": settings}
        self.report: dict[str, Any] = head | {"gpu": None, "results": {}, "left": {}, "roofline": None}
        if not path.exists():
            return
        old = load(path)
        if not fresh and not old["finished"] and _key(old) == _key(self.report):
            self.report |= {name: old[name] for name in ("results", "roofline")}
            self.told = f"resuming {path}: {len(old['results'])} results are there"
        else:
            kept = path.with_name("previous.json")
            path.replace(kept)
            self.told = f"the earlier results are now in {kept}"

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Keep a result, and write the file."""
        self.report["results"][name] = _rounded(record)
        self.write()

    def has(self, names: list[str]) -> bool:
        """Whether all of these are there."""
        return all(name in self.report["results"] for name in names)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_text(self._path, json.dumps(self.report, indent=1, allow_nan=False) + "\n")


def _key(report: dict[str, Any]) -> list[Any]:
    return [report["environment"].get(name) for name in _SAME] + [
        report["settings"].get(name) for name in ("seconds", "only")
    ]


def _rounded(value: Any) -> Any:
    """Floats to five digits: nothing is measured better."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
