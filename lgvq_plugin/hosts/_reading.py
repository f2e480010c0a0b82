"""From whatever a quantizer returns to one record, `Codes`.

The rules, in the order of the known hosts (who returns what):
  (z_q, loss, (perplexity, one_hot, indices))      taming, latent-diffusion, IBQ, LlamaGen, CVQ
  (z_q, loss, indices)                             ViT-VQGAN (B, N, C), rosinality (B, h, w, C)
  (z_q, indices, loss) or (z_q, indices)           vector-quantize-pytorch, FSQ
  (z_q, loss, info, breakdown)                     Open-MAGVIT2
The quantized vectors are the first floating tensor of three or four dimensions; the indices the
first integer tensor, however deep, that has one entry (or one a level) for each position.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sockets import ConfigError
from ..types import Codes

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
    return codebook.shape[1] if codebook is not None else _attribute(quantizer, WIDTHS)


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
) -> Codes:
    """Turn what `quantizer(source)` returned into a record.

    Args:
        output: of the quantizer.
        quantizer: gives the codebook.
        grid: (h, w), for hosts whose codes are (B, N, C); square if None.
        through: what our copy of the quantized vectors passes first.

    Raises:
        ConfigError: if there are no codes in the output, or they are no grid.
    """
    vectors = next(
        (t for t in _tensors(output) if t.is_floating_point() and t.ndim in (3, 4)), None
    )
    if vectors is None:
        raise ConfigError(
            f"lgvq.quantizer: {type(quantizer).__name__} returns no quantized vectors of 3 or 4 "
            f"dimensions, but {_described(output)}; name another module with lgvq.quantizer: PATH"
        )
    if through is not None:
        vectors = through(vectors)
    codebook = codebook_of(quantizer)
    width = _width(quantizer, codebook)
    if vectors.ndim == 4:
        is_last = width is not None and vectors.shape[-1] == width != vectors.shape[1]
        is_last = is_last or _is_transposed(quantizer)
        channels_last = vectors if is_last else vectors.movedim(1, -1)
        grid = (channels_last.shape[1], channels_last.shape[2])
        rows = channels_last.flatten(1, 2)
    else:
        is_first = width is not None and vectors.shape[1] == width != vectors.shape[2]
        rows = vectors.mT if is_first else vectors
        grid = _grid_of(rows.shape[1], grid)
    batch, count, channels = rows.shape
    indices = _indices(output, batch, count)
    has_levels = indices is not None and indices.ndim == 3
    if codebook is not None and (has_levels or codebook.shape[1] != channels):
        codebook = None  # a sum of rows, or projected after the look-up: no row is a code
    if has_levels:
        indices = indices[..., 0]  # type: ignore[index]
    if indices is not None and getattr(quantizer, "remap", None) is not None:
        indices = quantizer.unmap_to_all(indices)  # type: ignore[operator]  # taming
    return Codes(rows, indices, grid, codebook)


def _grid_of(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = round(count**0.5)
    grid = grid or (side, side)
    if grid[0] * grid[1] != count:
        raise ConfigError(
            f"lgvq.grid: {count} codes an image are no {grid[0]} x {grid[1]} grid; "
            "set lgvq.grid: [height, width] with that product"
        )
    return grid


def _indices(output: Any, batch: int, count: int) -> Tensor | None:
    """Return (B, N), or (B, N, levels) of a residual quantizer, int64; None if there are none."""
    whole = [
        t.detach().long()
        for t in _tensors(output)
        if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    ]
    for tensor in whole:
        if tensor.numel() == batch * count:
            return tensor.reshape(batch, count)
    for tensor in whole:
        if tensor.ndim >= 3 and tensor.numel() % (batch * count) == 0 and len(tensor) == batch:
            return tensor.reshape(batch, count, -1)
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _attribute(quantizer: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(quantizer, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _described(output: Any) -> str:
    shapes = [tuple(t.shape) for t in _tensors(output)]
    return (
        f"{type(output).__name__} with tensors of shapes {shapes}" if shapes else repr(output)[:80]
    )
