"""Draw docs/recipes.png: what the blocks of docs/recipes.md leave in `images`. `python docs/site/recipes.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fastcfg.cli.grid import Row, Section, draw_grid
from fastcfg.utils.files import replacing

PAGE = Path(__file__).resolve().parents[1] / "recipes.md"
_BLOCK = re.compile(r"^## (?P<title>[^\n]+)\n|^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Run the page, and write its pictures."""
    names: dict[str, Any] = {}
    title, rows = "The pictures that the others begin with", []
    for match in _BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if match["title"]:
            title = match["title"]
            continue
        names["images"] = None
        exec(compile(match["code"], str(PAGE), "exec"), names)
        if names["images"] is not None:
            pictures = (names["images"].clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
            rows.append(Section(title, [Row("", pictures.permute(0, 2, 3, 1).numpy())]))
            print(f"{title}: {len(pictures)} pictures", flush=True)
    with replacing(PAGE.with_suffix(".png")) as temporary:
        draw_grid(rows, "fastcfg, the embedded model: docs/recipes.md", columns=4).save(temporary, format="PNG")


if __name__ == "__main__":
    main()
