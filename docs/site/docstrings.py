"""The house's docstrings as the Markdown that mkdocstrings expects: a griffe extension, named in mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

import griffe

# In prose, outside backticks: a star between words is a product, `<a, b>` an inner product and `a[i][k]` an element. In
# Markdown they are emphasis, a tag and a link.
_MARKUP = re.compile(r"(`[^`]*`)|(?<=\w)\*\*?(?=\w)|<(?=[A-Za-z|])|(?<=\])\[")
_SECTIONS = ("Args:", "Attributes:")
# Arguments or attributes described together: "s_tmin, s_tmax: ...", with the lines that continue it.
_TOGETHER = re.compile(r"(?m)^    ((?:\*{0,2}\w+,\s+)+\*{0,2}\w+): (.*(?:\n {8,}.*)*)")


class Docstrings(griffe.Extension):
    """Changes the text of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with `Example:` as the section of examples that it is, a description for each argument, and without
    accidental markup."""
    paragraphs = re.sub(r"(?m)^Example:$", "Examples:", text).split("\n\n")
    paragraphs = [_TOGETHER.sub(_apart, part) if part.startswith(_SECTIONS) else part for part in paragraphs]
    return "\n\n".join(part if _is_code(part) else _MARKUP.sub(_escaped, part) for part in paragraphs)


def _is_code(paragraph: str) -> bool:
    """Whether all of it is indented; sections begin with a line that is not."""
    return all(line.startswith("    ") for line in paragraph.splitlines()) or ">>>" in paragraph


def _apart(match: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {match[2]}" for name in re.split(r",\s+", match[1]))


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[1] else match[0].replace("*", r"\*").replace("[", r"\[").replace("<", "&lt;")
