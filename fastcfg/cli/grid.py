"""A grid of pictures with captions, as a PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_PAGE, _INK, _FAINT = (255, 255, 255), (28, 30, 38), (110, 114, 125)
_MARGIN, _GAP, _SECTION_GAP, _LABEL_GAP = 24, 6, 26, 14
_TITLE_SIZE, _LABEL_SIZE, _FOOTER_SIZE = 22, 15, 13
# The width to aim at for a row of pictures, and the largest side of a picture.
_ROW_WIDTH, _LARGEST_TILE = 768, 256


@dataclass(frozen=True, eq=False)
class Row:
    """Pictures, uint8 [n, H, W, 3], with a label to their left, which may be empty."""

    label: str
    pictures: np.ndarray


@dataclass(frozen=True, eq=False)
class Section:
    """Rows under one caption, all with the same number of pictures."""

    caption: str
    rows: Sequence[Row]


def draw_grid(sections: Sequence[Section], footer: str, columns: int) -> Image.Image:
    """Lay sections out from top to bottom, with a footer and up to `columns` pictures side by side."""
    from PIL import Image, ImageDraw, ImageFont

    fonts = [ImageFont.load_default(size) for size in (_TITLE_SIZE, _LABEL_SIZE, _FOOTER_SIZE)]
    title_font, label_font, footer_font = fonts
    size = sections[0].rows[0].pictures.shape[1]
    # A whole multiple of the picture's size, so that all of its pixels are equally large.
    tile = size * max(1, min(_ROW_WIDTH // columns, _LARGEST_TILE) // size)
    labels = [row.label for section in sections for row in section.rows]
    indent = max(int(label_font.getlength(label)) for label in labels)
    indent += _LABEL_GAP if indent else 0
    width = max(indent + columns * (tile + _GAP) - _GAP, 380)

    lines = sum(-(-len(row.pictures) // columns) for section in sections for row in section.rows)
    texts = [footer, *(section.caption for section in sections)]
    # Every word may need its own line; surplus height is cropped at the end.
    words = sum(max(1, len(text.split())) for text in texts)
    height = lines * (tile + _GAP) + words * int(_TITLE_SIZE * 1.4) + len(texts) * (_SECTION_GAP + _LABEL_GAP)
    page = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _PAGE)
    draw = ImageDraw.Draw(page)
    y = _MARGIN
    for section in sections:
        y = _write(draw, y, section.caption, title_font, _INK, width) + _LABEL_GAP // 2
        for row in section.rows:
            lines = -(-len(row.pictures) // columns)
            middle = y + (lines * (tile + _GAP) - _GAP) / 2
            draw.text((_MARGIN, middle), row.label, _FAINT, label_font, anchor="lm")
            for i, picture in enumerate(row.pictures):
                line, column = divmod(i, columns)
                place = (_MARGIN + indent + column * (tile + _GAP), y + line * (tile + _GAP))
                page.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.BICUBIC), place)
            y += lines * (tile + _GAP)
        y += _SECTION_GAP - _GAP
    y = _write(draw, y - _SECTION_GAP // 2, footer, footer_font, _FAINT, width)
    return page.crop((0, 0, page.width, y + _MARGIN // 2))


def save_png(image: Image.Image, path: str, text: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all, with texts by keyword in its tEXt chunks, and the settings as JSON under
    "fastcfg"."""
    from PIL.PngImagePlugin import PngInfo

    from fastcfg.utils.files import replacing

    info = PngInfo()
    for keyword, value in text.items():
        info.add_text(keyword, value)
    info.add_text("fastcfg", json.dumps(settings))
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info, optimize=True)


def _write(draw: Any, y: int, text: str, font: Any, ink: tuple[int, int, int], width: int) -> int:
    """Write text in lines of at most `width`; returns the y below it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    height = int(font.size * 1.4)
    for line in lines:
        draw.text((_MARGIN, y), line, ink, font)
        y += height
    return y
