"""The file of results: written whole after every workload, so that nothing finished is lost, and gone on with later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastcfg.utils.files import write_text

SCHEMA = 1
OUT_OF_TIME = "time budget used up"
# A file is gone on with if these are the same; else its times would stand beside others'.
_SAME = ("fastcfg", "python", "torch", "triton", "device", "device_type", "threads", "commit")


class Results:
    """Results of a run, in a file.

    Args:
        path: the file. What it holds is gone on with if it is unfinished and of the same commit, machine and settings;
            else it is kept beside it as previous.json.
        environment: of this run.
        settings: of this run.
        fresh: start anew in any case.

    Attributes:
        report: what the file holds; docs/benchmarks.md describes it.
        told: what was done with the file that was there; empty if there was none.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, environment: dict[str, Any], settings: dict[str, Any], fresh: bool = False) -> None:
        self._path, self.told = path, ""
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "finished": False,
            "environment": environment,
            "settings": settings,
            "gpu": None,
            "results": {},
            "left": {},
            "roofline": None,
        }
        if not path.exists():
            return
        old = read(path)
        if not fresh and not old["finished"] and _key(old) == _key(self.report):
            self.report |= {name: old[name] for name in ("results", "roofline")}
            self.told = f"going on with {path}: {len(old['results'])} results are there"
        else:
            kept = path.with_name("previous.json")
            path.replace(kept)
            self.told = f"the results that were there are now in {kept}"

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


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: something else.
        OSError: it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        schema = report["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of results of `python -m benchmarks`") from error
    if schema != SCHEMA:
        raise ValueError(f"{path}: got schema {schema}, expected {SCHEMA}")
    return dict(report)


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
