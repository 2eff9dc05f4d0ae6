"""The project's own words: plain English, and one meaning for each term of the glossary."""

from __future__ import annotations

import re

import pytest
from support import ROOT

pytestmark = pytest.mark.quick

# Phrases that send a reader elsewhere or name nobody, and names with a second meaning, with what to write instead.
BANNED = {
    r"\bas there\b": "say it here, or name the place",
    r"\blikewise\b": "say it",
    r"\bsomebody|\bnobody|\bwhoever\b": "name the caller, the user, the thread",
    r"\bwhat is otherwise\b|\botherwise than\b": "what changed; different from",
    r"\banew\b": "again",
    r"\blooks? on\b|\blook on\b": "observe",
    r"\bgone on with\b|\bgoes on with\b": "resume",
    r"\bis their[s]\b": "name the owner",
    r"\bWorkspace\b|\bKeeper\b": "Buffers, ProgramCache",
}
FOLDERS = ("fastcfg", "kernels", "benchmarks", "tests", "docs")
# This file, and names of before that still import.
EXCEPT = {"tests/test_words.py", "tests/test_public_names.py", "fastcfg/_moved.py"}


def texts() -> list[str]:
    files = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".ipynb")
    ]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.exists()}
    return sorted(name for name in names - EXCEPT if "__pycache__" not in name)


@pytest.mark.parametrize("name", texts())
def test_words(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = []
    for pattern, instead in BANNED.items():
        for match in re.finditer(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {match.group()!r}: {instead}")
    assert found == []
