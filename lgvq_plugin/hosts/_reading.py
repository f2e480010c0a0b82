"""From whatever a quantizer returns to one record, `Codes`.

The rules, in the order of the known hosts (who returns what):
  (z_q, loss, (perplexity, one_hot, indices))      taming, latent-diffusion, IBQ, LlamaGen, CVQ
  (z_q, loss, indices)                             ViT-VQGAN (B, N, C), rosinality (B, h, w, C)
  (z_q, indices, loss) or (z_q, indices)           vector-quantize-pytorch, FSQ
  (z_q, loss, info, breakdown)                     Open-MAGVIT2
  (z_q, loss, indices (B, h, w, levels))           RQ-VAE (B, h, w, C)
The quantized vectors are the first floating tensor of three or four dimensions; the indices the
first integer tensor, however deep, that has one entry (or one a level) for each position.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sockets import ConfigError
from ..types import Codes

LAYOUTS = ("channels_first", "channels_last")
WIDTHS = ("e_dim", "embed_dim", "embedding_dim", "codebook_dim", "dim")
MATRICES = ("embedding", "embed", "codebook", "weight")  # attributes that hold a codebook
UNIT_LENGTH = ("l2_norm", "use_norm")  # LlamaGen, ViT-VQGAN: codes are rows of length 1


def codebook_of(quantizer: nn.Module) -> Tensor | None:
    """Return the code vectors (K, C), differentiable where they are trained; None if look-up free.

    Example:
        >>> codebook_of(nn.ModuleDict({"embedding": nn.Embedding(4, 2)})).shape
        torch.Size([4, 2])
    """
    for name in MATRICES:
        found = getattr(quantizer, name, None)
        if isinstance(found, nn.Module):
            found = getattr(found, "weight", None)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            continue
        if found.ndim == 3 and found.shape[0] == 1:
            found = found[0]
        if found.ndim != 2:
            continue
        rows = found.mT if _is_transposed(quantizer) else found
        is_unit = any(getattr(quantizer, flag, False) is True for flag in UNIT_LENGTH)
        return F.normalize(rows, dim=-1) if is_unit else rows
    return None


def code_width(quantizer: nn.Module) -> int | None:
    """Return C, the width of the vectors the quantizer gives, or None if it does not tell."""
    return _width(quantizer, codebook_of(quantizer))


def _width(quantizer: nn.Module, codebook: Tensor | None) -> int | None:
    project = dict(quantizer.named_children()).get("project_out")
    if project is not None:  # vector-quantize-pytorch: the width outside, not of the codebook
        outside = getattr(project, "out_features", None)
        return outside if isinstance(outside, int) else _attribute(quantizer, WIDTHS[::-1])
    if codebook is not None:
        return codebook.shape[1]
    inside = {m.embedding_dim for m in quantizer.modules() if isinstance(m, nn.Embedding)}
    return _attribute(quantizer, WIDTHS) or (inside.pop() if len(inside) == 1 else None)  # RQ-VAE


def _is_transposed(quantizer: nn.Module) -> bool:
    """Whether the codebook is rosinality's: a buffer `embed` (C, K), around it (B, h, w, C)."""
    embed = dict(quantizer.named_buffers(recurse=False)).get("embed")
    return embed is not None and embed.ndim == 2 and _attribute(quantizer, ("dim",)) == len(embed)


def read_codes(
    output: Any,
    quantizer: nn.Module,
    *,
    grid: tuple[int, int] | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
    layout: str | None = None,
    width: int | None = None,
) -> Codes:
    """Turn what `quantizer(source)` returned into a record.

    Args:
        output: of the quantizer.
        quantizer: gives the codebook.
        grid: (h, w), for hosts whose codes are (B, N, C); square if None.
        through: what our copy of the quantized vectors passes first.
        layout: channels_first or channels_last; None decides, see `layout_of`.
        width: C that the codes must have; None takes what the quantizer tells, if it fits.

    Raises:
        ConfigError: if there are no codes in the output, they are no grid, of another width, or
            of a layout that cannot be decided.
    """
    vectors = vectors_in(output)
    if vectors is None:
        raise ConfigError(
            f"lgvq.quantizer: {type(quantizer).__name__} returns no quantized vectors of 3 or 4 "
            f"dimensions, but {_described(output)}; name another module with lgvq.quantizer: PATH"
        )
    layout = layout or layout_of(output, quantizer, width=width)
    if through is not None:
        vectors = through(vectors)
    channels_last = _channels_last(vectors, layout)
    if width is not None and channels_last.shape[-1] != width:
        raise ConfigError(_misfit(vectors, quantizer, width, f"layout {layout}, shape", [layout]))
    shape = channels_last.shape[1:-1]
    rows = channels_last.flatten(1, -2)
    grid = (shape[0], shape[1]) if len(shape) == 2 else _grid_of(rows.shape[1], grid)
    codebook = codebook_of(quantizer)
    batch, _, channels = rows.shape
    indices = _indices(output, batch, shape)
    has_levels = indices is not None and indices.ndim == 3
    if codebook is not None and (has_levels or codebook.shape[1] != channels):
        codebook = None  # a sum of rows, or projected after the look-up: no row is a code
    if has_levels:
        indices = indices[..., 0]  # type: ignore[index]
    if indices is not None and getattr(quantizer, "remap", None) is not None:
        indices = quantizer.unmap_to_all(indices)  # type: ignore[operator]  # taming
    return Codes(rows, indices, grid, codebook)


def vectors_in(output: Any) -> Tensor | None:
    """Return the quantized vectors in what a quantizer returned, as it lays them out."""
    floats = (t for t in tensors_in(output) if t.is_floating_point() and t.ndim in (3, 4))
    return next(floats, None)


def layout_of(output: Any, quantizer: nn.Module, *, width: int | None = None) -> str:
    """Decide whether quantized vectors are channels_first or channels_last.

    What is known is asked in this order: the class (rosinality's, vector-quantize-pytorch's
    switches, an attribute `layout`), the width of a code, the shape of the indices, and in which
    layout equal indices have equal vectors.

    Raises:
        ConfigError: if both layouts fit, or none.
    """
    vectors = vectors_in(output)
    assert vectors is not None
    codebook = codebook_of(quantizer)
    known = _layout_of_class(quantizer, vectors.ndim)
    if known is not None:
        return known
    told = width or _width(quantizer, codebook)
    shapes = {each: _channels_last(vectors, each).shape for each in LAYOUTS}
    left = [each for each in LAYOUTS if told is None or shapes[each][-1] == told]
    by_indices = [
        each for each in LAYOUTS if _indices(output, len(vectors), shapes[each][1:-1]) is not None
    ]
    if width is not None and not left:
        raise ConfigError(_misfit(vectors, quantizer, width, "shape", by_indices))
    left = left or list(LAYOUTS)
    if len(left) > 1 and len([each for each in left if each in by_indices]) == 1:
        left = by_indices
    if len(left) > 1:
        left = _by_values(codebook, vectors, output) or left
    if len(left) > 1 and told is None and not by_indices:  # nothing is known: the usual ones
        return LAYOUTS[0] if vectors.ndim == 4 else LAYOUTS[1]
    if len(left) > 1:
        raise ConfigError(
            f"lgvq.layout: the vectors of {type(quantizer).__name__}, shape "
            f"{tuple(vectors.shape)}, fit both layouts; set lgvq.layout: channels_first "
            "(B, C, h, w) or channels_last (B, h, w, C)"
        )
    return left[0]


def _layout_of_class(quantizer: nn.Module, ndim: int) -> str | None:
    if ndim == 4 and _is_transposed(quantizer):
        return LAYOUTS[1]
    if getattr(quantizer, "layout", None) in LAYOUTS:
        return str(quantizer.layout)
    if getattr(quantizer, "channel_first", None) is True:
        return LAYOUTS[0]
    if getattr(quantizer, "accept_image_fmap", None) is True and ndim == 4:
        return LAYOUTS[0]
    if getattr(quantizer, "channel_last", None) is True and ndim == 3:
        return LAYOUTS[1]
    return None


def _channels_last(vectors: Tensor, layout: str) -> Tensor:
    return vectors if layout == LAYOUTS[1] else vectors.movedim(1, -1)


@torch.no_grad()
def _by_values(codebook: Tensor | None, vectors: Tensor, output: Any) -> list[str]:
    """Return the layout in which equal indices have equal vectors, or else the codebook's rows.

    The former also holds where a moving average has changed the codebook since the look-up.
    """
    spreads, gaps = [], []
    for each in LAYOUTS:
        channels_last = _channels_last(vectors, each)
        rows = channels_last.flatten(0, -2).float()
        indices = _indices(output, len(vectors), channels_last.shape[1:-1])
        if indices is None or indices.ndim == 3:
            return []
        used, group = indices.flatten().unique(return_inverse=True)
        counts = torch.bincount(group, minlength=len(used))[:, None]
        means = rows.new_zeros(len(used), rows.shape[1]).index_add_(0, group, rows) / counts
        spreads.append(float((rows - means[group]).square().mean()))
        if codebook is not None and codebook.shape[1] == rows.shape[1] and used[-1] < len(codebook):
            gaps.append(float((rows - codebook[indices.flatten()]).square().mean()))
    for found in (spreads, gaps):
        if len(found) == 2 and min(found) < 0.1 * max(found):
            return [LAYOUTS[found.index(min(found))]]
    return []


def _misfit(
    vectors: Tensor, quantizer: nn.Module, width: int, what: str, fitting: list[str]
) -> str:
    """Say that the heads' width is not the codes', and which one is."""
    shapes = {each: _channels_last(vectors, each).shape[-1] for each in fitting or LAYOUTS}
    ways = " or ".join(f"lgvq.code_dim: {c} ({each})" for each, c in shapes.items())
    return (
        f"lgvq.code_dim: the heads were built for codes of width {width}, but "
        f"{type(quantizer).__name__} gives vectors of {what} {tuple(vectors.shape)}; set {ways}"
    )


def _grid_of(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = round(count**0.5)
    grid = grid or (side, side)
    if grid[0] * grid[1] != count:
        raise ConfigError(
            f"lgvq.grid: {count} codes an image are no {grid[0]} x {grid[1]} grid; "
            "set lgvq.grid: [height, width] with that product"
        )
    return grid


def _indices(output: Any, batch: int, grid: Sequence[int]) -> Tensor | None:
    """Return (B, N), or (B, N, levels) of a residual quantizer, int64; None if there are none.

    Args:
        output: of the quantizer.
        batch: B.
        grid: (h, w), or (N,) where the codes are rows.
    """
    count = math.prod(grid)
    whole = [
        t.detach().long()
        for t in tensors_in(output)
        if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    ]
    for tensor in whole:
        if tensor.numel() == batch * count and _lies_on(tensor, batch, grid):
            return tensor.reshape(batch, count)
    for tensor in whole:
        if tensor.ndim < 3 or len(tensor) != batch or tensor.numel() % (batch * count):
            continue
        if tensor.shape[1] == count or math.prod(tensor.shape[1:3]) == count:
            if len(grid) == 1 or tensor.shape[1] == count or tensor.shape[1:3] == tuple(grid):
                return tensor.reshape(batch, count, -1)
        elif tensor.shape[-1] == count or tensor.shape[-2:] == tuple(grid):  # levels come first
            return tensor.reshape(batch, -1, count).mT
    return None


def _lies_on(tensor: Tensor, batch: int, grid: Sequence[int]) -> bool:
    """Whether indices with one entry for each position have the grid's shape, or none."""
    if tensor.ndim < 3 or len(tensor) != batch or len(grid) == 1:
        return True
    shape = [side for side in tensor.shape[1:] if side != 1]
    return shape in ([side for side in grid if side != 1], [math.prod(grid)])


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in what a module takes or returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)


def _attribute(quantizer: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(quantizer, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _described(output: Any) -> str:
    shapes = [tuple(t.shape) for t in tensors_in(output)]
    return (
        f"{type(output).__name__} with tensors of shapes {shapes}" if shapes else repr(output)[:80]
    )
