"""README, CONTRIBUTING and the pages of docs/: links, paths and names in them exist. `make docs` builds them."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from support import ROOT
from test_layers import LAYERS

sys.path.insert(0, str(ROOT / "docs" / "site"))

import figure

pytestmark = pytest.mark.quick

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), DOCS / "tutorial.ipynb"]
# Folders of the checkout that pages name files in.
_FILE = re.compile(r"`((?:fastcfg|kernels|tests|benchmarks|docs)/[\w/.-]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """A page's text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them of plain ones."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing(names: list[str], beside: Path) -> list[str]:
    """Those that lead to no file, or to no heading of it."""
    lost = []
    for name in names:
        file, _, anchor = name.partition("#")
        target = beside.parent / file if file else beside
        if not target.exists() or (anchor and anchor not in slugs(target)):
            lost.append(name)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page: Path) -> None:
    text = text_of(page)
    links = [link for link in _LINK.findall(text) if not re.match(r"https?:|data:", link)]
    assert missing(links, page) == []
    assert [name for name in _FILE.findall(text) if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"[\w/]+\.(?:md|ipynb)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents)


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120


def test_commands_of_the_readme_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        for target in re.findall(r"^ *make (\w+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_host_times_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "benchmarks/results/cpu/host_time.json").read_text(encoding="utf-8"))["results"]
    philox, torch = (results[f"beside a replay, {noise}"]["host_us"]["median"] for noise in ("philox", "torch"))
    assert f"{philox:.1f} µs a row, {torch:.1f} µs with noise drawn by torch" in text_of(DOCS / "graphs.md")


def test_the_figure_is_the_layers() -> None:
    assert sorted(figure.layers()) == sorted(set(LAYERS) - {"utils"})
    visited = {name for _, names in figure.WALKS.values() for name in names}
    assert visited <= set(figure.layers())
    assert figure.SVG.read_text(encoding="utf-8") == figure.draw()


def test_the_engine_is_described() -> None:
    names = {path.stem for path in (ROOT / "fastcfg" / "engine").iterdir() if not path.name.startswith("__")}
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}" not in text} == set()


def test_the_reference_names_what_exists() -> None:
    """mkdocstrings reads the source as well: this is its check without it."""
    names = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
    ]
    assert len(names) > 20
    for name in names:
        module, _, member = name.rpartition(".")
        source = source_of(name) or source_of(module)
        assert source is not None, name
        if source_of(name) is None:
            bodies = ast.parse(source.read_text(encoding="utf-8")).body
            assert member in [getattr(node, "name", None) for node in bodies], name


def source_of(module: str) -> Path | None:
    """A module's or package's file."""
    path = ROOT.joinpath(*module.split("."))
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def test_every_public_package_has_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = {name.split(".")[1] for name in re.findall(r"^::: (fastcfg\.[\w.]+)$", text, re.MULTILINE)}
    assert documented == set(LAYERS) - {"utils", "kernels"}
