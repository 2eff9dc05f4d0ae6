"""Draw docs/architecture.svg: the layers, and three walks through them. `python docs/site/figure.py`.

`GROUPS` and `WALKS` are the figure; tests/docs/test_pages.py compares the boxes with the layers that are enforced.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

SVG = Path(__file__).resolve().parents[1] / "architecture.svg"

# From top to bottom: a group's title, and rows of boxes, each a layer with what it is. A layer imports only from those
# above it or to the left.
GROUPS: list[tuple[str, list[list[tuple[str, str]]]]] = [
    (
        "what to compute: float64 numpy, on the host",
        [
            [
                ("schedule", "betas, respacing"),
                ("sigmas", "noise levels"),
                ("table", "StepTable"),
                ("step", "StepSpec, buffers"),
                ("clip", "bounds of x0"),
                ("combination", "sums in one pass"),
            ],
            [
                ("state_change", "between two rows"),
                ("known_pixels", "inpainting"),
                ("solvers", "-> StepTable"),
                ("guidance", "branches, weights"),
            ],
        ],
    ),
    (
        "one row of it",
        [
            [("reference", "plain torch"), ("compiler", "scheduler -> table")],
            [("kernels", "Triton"), ("ops", "checks, dispatch, Stepper")],
        ],
    ),
    ("all rows", [[("engine", "Sampler: conditioning, noise, buffers, programs, graphs, the loop")]]),
    ("networks", [[("models", "GLIDE, guided-diffusion"), ("training", "for guidance")]]),
    (
        "products",
        [
            [("pipelines", "prompts to pictures"), ("frontends", "the doors")],
            [("parity", "proof on your device"), ("cli", "the command")],
        ],
    ),
]
# By colour: a walk's title, and the layers it visits.
WALKS = {
    "#c62828": ("a sample", ["engine", "guidance", "ops", "kernels"]),
    "#1565c0": ("a scheduler", ["frontends", "compiler", "table", "ops", "kernels"]),
    "#2e7d32": ("a prompt", ["cli", "pipelines", "models", "solvers", "engine"]),
}

WIDTH, MARGIN, BOX, GAP, TITLE = 880, 20, 52, 10, 26


def layers() -> list[str]:
    """The boxes' names, in order."""
    return [name for _, rows in GROUPS for row in rows for name, _ in row]


def draw() -> str:
    """The figure as SVG."""
    parts, places, y = [], {}, MARGIN
    for title, rows in GROUPS:
        height = TITLE + len(rows) * (BOX + GAP)
        parts.append(_box(MARGIN, y, WIDTH - 2 * MARGIN, height, "#f4f4f7", "#d0d0d8"))
        parts.append(_text(MARGIN + 12, y + 18, title, 13, "#55555f"))
        y += TITLE
        for row in rows:
            width = (WIDTH - 2 * MARGIN - GAP * (len(row) + 1)) / len(row)
            for i, (name, what) in enumerate(row):
                x = MARGIN + GAP + i * (width + GAP)
                parts.append(_box(x, y, width, BOX, "#ffffff", "#8888a0"))
                parts.append(_text(x + 12, y + 22, name, 15, "#15151f", bold=True))
                parts.append(_text(x + 12, y + 41, what, 12, "#55555f"))
                places[name] = (x + width, y)
            y += BOX + GAP
        y += GAP
    taken: dict[str, int] = {}
    for colour, (_, visited) in WALKS.items():
        for number, name in enumerate(visited, 1):
            right, top = places[name]
            x = right - 16 - 24 * taken.setdefault(name, 0)
            taken[name] += 1
            parts.append(_dot(x, top + 16, colour, number))
    x = MARGIN + 12
    for colour, (title, visited) in WALKS.items():
        parts += [_dot(x, y + 12, colour, 1), _text(x + 16, y + 17, f"{title}: {' > '.join(visited)}", 12, "#15151f")]
        y += 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10:.0f}" font-family="sans-serif">\n'
        "<title>The layers of fastcfg, and three walks through them</title>\n"
        f'<rect width="{WIDTH}" height="{y + 10:.0f}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="6" fill="{fill}" stroke="{line}"/>'


def _text(x: float, y: float, text: str, size: int, fill: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{weight}>{escape(text)}</text>'


def _dot(x: float, y: float, fill: str, number: int) -> str:
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="{fill}"/>'
    place = f'x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle"'
    return f'{circle}<text {place} font-size="12" fill="#ffffff">{number}</text>'


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
