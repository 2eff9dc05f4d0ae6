"""How docstrings become Markdown for the API reference. `make docs` builds all of them."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

pytest.importorskip("griffe", reason="of the extra docs")
sys.path.insert(0, str(ROOT / "docs" / "site"))

from docstrings import as_markdown

pytestmark = pytest.mark.quick


def test_products_brackets_and_elements_are_no_markup() -> None:
    assert as_markdown("x [K*B, C] and `K*B`, <a, b>, draws[row][k], a < b") == (
        r"x [K\*B, C] and `K*B`, &lt;a, b>, draws[row]\[k], a < b"
    )


def test_code_stays_as_it_is() -> None:
    text = "Formula:\n\n    x' = a_x*x + s*z\n\nExample:\n    >>> 2*3\n    6"
    assert as_markdown(text) == text.replace("Example:", "Examples:")


def test_joined_arguments_are_described_one_by_one() -> None:
    text = "Do.\n\nArgs:\n    low, high: bounds, of\n        which low is the smaller.\n    **others: the rest."
    assert as_markdown(text) == (
        "Do.\n\nArgs:\n    low: bounds, of\n        which low is the smaller.\n"
        "    high: bounds, of\n        which low is the smaller.\n    **others: the rest."
    )
