"""A contact sheet: pictures as training will see them, captions below."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._files import write_bytes
from ..datasets.base import CaptionedFiles

COLUMNS = 6
MARGIN = 8
LINE = 13  # pixels of a line of text
LINES = 5
LETTERS = 31  # that fit below a picture of 192 pixels


def write_sheet(path: Path, dataset: CaptionedFiles, indices: Sequence[int]) -> None:
    """Write a PNG with these samples of a data set that gives (H, W, 3) images."""
    from PIL import Image, ImageDraw, ImageFont

    samples = [dataset[index] for index in indices]
    side = samples[0]["image"].shape[0]
    wide, high = side + MARGIN, side + MARGIN + LINES * LINE + MARGIN
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "#e8e8e8")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(_font()), 10)
    for place, sample in enumerate(samples):
        left = MARGIN + place % columns * wide
        top = MARGIN + place // columns * high
        pixels = ((sample["image"] + 1) * 127.5).round().astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (left, top))
        told = sample["captions"][0] if sample["captions"] else "(no caption)"
        more = len(sample["captions"]) - 1
        words = f"{told}  (+{more})" if more > 0 else told
        for row, line in enumerate(_lines(words, sample["file"])):
            ink = "#777777" if row == 0 else "black"
            pen.text((left, top + side + 2 + row * LINE), line, fill=ink, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _lines(caption: str, file: str) -> list[str]:
    name = file if len(file) <= LETTERS else f"…{file[1 - LETTERS :]}"
    return [name, *textwrap.wrap(caption, LETTERS, max_lines=LINES - 1, placeholder=" …")]


def _font() -> Path:
    # matplotlib's wheel carries it: wide coverage of letters, the same on every machine.
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
