"""Images with words beside them, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_FONT_SIZE = 15
_LINE = 19


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[str]]], title: str = "", cell: int = 128
) -> Image.Image:
    """A sheet of images.

    Args:
        rows: (heading, images, captions): the heading stands left of the row, a caption under each page; empty
            captions take no room.
        title: stands over all.
        cell: side in pixels to which each page is fitted.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    letters = max(8, int(cell / font.getlength("n")))
    left = 10 * _FONT_SIZE if any(heading for heading, _, _ in rows) else _MARGIN
    wrapped = [[textwrap.wrap(caption, letters) for caption in captions] for _, _, captions in rows]
    heights = [cell + _LINE * max((len(lines) for lines in row), default=0) + _MARGIN for row in wrapped]
    top = _MARGIN + (2 * _LINE if title else 0)
    width = left + (cell + _MARGIN) * max(len(images) for _, images, _ in rows)
    page = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, "black", ImageFont.load_default(_FONT_SIZE + 3))
    for (heading, images, _), captions, height in zip(rows, wrapped, heights):
        draw.multiline_text((_MARGIN, top), textwrap.fill(heading, 17), "black", font, spacing=4)
        for column, image in enumerate(images):
            x = left + column * (cell + _MARGIN)
            page.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (x, top))
            if column < len(captions):
                draw.multiline_text((x, top + cell + 2), "\n".join(captions[column]), "black", font, spacing=4)
        top += height
    return page
