"""Grids of images as PNG, by zlib alone: this room has no need of an image library."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import write_bytes


def write_grid(path: Path, rows: list[Tensor], *, columns: int = 8, gap: int = 2) -> None:
    """Write rows of images, each (B, 3, H, W) in [-1, 1] (clamped), below each other.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_grid(folder / "a.png", [torch.zeros(2, 3, 4, 4)])
        >>> (folder / "a.png").read_bytes()[1:4]
        b'PNG'
    """
    images = torch.stack([row[:columns].detach().float().cpu() for row in rows])
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    down, across, _, height, width = pixels.shape
    shape = (gap + down * (height + gap), gap + across * (width + gap), 3)
    canvas = np.full(shape, 255, np.uint8)
    for i in range(down):
        for j in range(across):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[top : top + height, left : left + width] = pixels[i, j].transpose(1, 2, 0)
    write_bytes(path, _encode(canvas))


def _encode(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # filter 0 on every line
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bit RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
