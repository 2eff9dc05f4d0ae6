"""The tutorial without Jupyter: run a notebook's cells, keep their outputs, write it as Markdown.

`python docs/site/notebook.py docs/tutorial.ipynb` runs all cells and stores what they print and show.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Execute the code cells in order in one namespace, and store their outputs.

    Printed text and the last expression's value are kept; pictures (values with Jupyter's `_repr_png_`) as PNG.

    Args:
        notebook: the .ipynb file's content. Its cells' outputs are replaced.

    Returns:
        The namespace in the end.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        tree = ast.parse("".join(cell["source"]), f"cell {number}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), namespace)
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace) if last else None
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
        if value is not None:
            data: dict[str, Any] = {"text/plain": lines(repr(value))}
            if picture := getattr(value, "_repr_png_", lambda: None)():
                data = {"image/png": base64.b64encode(picture).decode(), "text/plain": ["a picture"]}
            outputs.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
        cell.update(execution_count=number, outputs=outputs)
    return namespace


def markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as Markdown, and the pictures that it shows, by file name."""
    parts, pictures = [], {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                file = f"{name}_{number}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f"![what the cell above shows]({file})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip("\n") + "\n```")
    return "\n\n".join(parts) + "\n", pictures


def lines(text: str) -> list[str]:
    """Text as notebooks store it."""
    return text.splitlines(keepends=True)


def main(path: Path) -> None:
    """Run a notebook and write it back with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
