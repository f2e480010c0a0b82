"""From whatever a quantizer returns to one record, `Codes`.

The rules, in the order of the known hosts (who returns what):
  (z_q, loss, (perplexity, one_hot, indices))      taming, latent-diffusion, IBQ, LlamaGen, CVQ
  (z_q, loss, indices)                             ViT-VQGAN (B, N, C), rosinality (B, h, w, C)
  (z_q, indices, loss) or (z_q, indices)           vector-quantize-pytorch, FSQ
  (z_q, loss, info, breakdown)                     Open-MAGVIT2
The quantized vectors are the first floating tensor of three or four dimensions; the indices the
first integer tensor, however deep, that has one entry (or one a level) for each position.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError
from ..types import Codes

WIDTHS = ("e_dim", "embed_dim", "embedding_dim", "codebook_dim", "dim")
SIZES = ("n_e", "n_embed", "num_embeddings", "codebook_size", "num_codes")


def codebook_of(quantizer: nn.Module) -> Tensor | None:
    """Return the code vectors (K, C), differentiable where they are trained; None if look-up free.

    Example:
        >>> codebook_of(nn.ModuleDict({"embedding": nn.Embedding(4, 2)})) is None
        True
    """
    for name in ("embedding", "embed", "codebook", "weight"):
        found = getattr(quantizer, name, None)
        if isinstance(found, nn.Module):
            found = getattr(found, "weight", None)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            continue
        if found.ndim == 3 and found.shape[0] == 1:
            found = found[0]
        if found.ndim != 2:
            continue
        # rosinality keeps its codebook as a buffer (C, K).
        is_transposed = name == "embed" and not isinstance(found, nn.Parameter)
        return (
            found.mT if is_transposed and _attribute(quantizer, ("dim",)) == len(found) else found
        )
    return None


def code_width(quantizer: nn.Module) -> int | None:
    """Return C, the width of the vectors the quantizer gives, or None if it does not tell."""
    if "project_out" in dict(quantizer.named_children()):  # vector-quantize-pytorch: dim outside
        outside = getattr(quantizer.get_submodule("project_out"), "out_features", None)
        if isinstance(outside, int):
            return outside
        return _attribute(quantizer, ("dim",))
    codebook = codebook_of(quantizer)
    return codebook.shape[1] if codebook is not None else _attribute(quantizer, WIDTHS)


def read_codes(output: Any, quantizer: nn.Module, *, grid: tuple[int, int] | None = None) -> Codes:
    """Turn what `quantizer(source)` returned into a record.

    Args:
        output: of the quantizer.
        quantizer: gives the codebook.
        grid: (h, w), for hosts whose codes are (B, N, C); square if None.

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
    codebook = codebook_of(quantizer)
    width = code_width(quantizer)
    if vectors.ndim == 4:
        is_last = width is not None and vectors.shape[-1] == width != vectors.shape[1]
        channels_last = vectors if is_last else vectors.movedim(1, -1)
        grid = (channels_last.shape[1], channels_last.shape[2])
        rows = channels_last.flatten(1, 2)
    else:
        is_first = width is not None and vectors.shape[1] == width != vectors.shape[2]
        rows = vectors.mT if is_first else vectors
        grid = _grid_of(rows.shape[1], grid)
    batch, count, channels = rows.shape
    indices = _indices(output, batch, count)
    if codebook is not None and codebook.shape[1] != channels:
        codebook = None  # codes are projected after the look-up: no row is what the host decodes
    if codebook is not None and indices is not None and indices.ndim == 3:
        codebook = None
    if indices is not None and indices.ndim == 3:
        indices = indices[..., 0]
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
    for tensor in _tensors(output):
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
            continue
        if tensor.numel() == batch * count:
            return tensor.detach().reshape(batch, count).long()
        if tensor.ndim >= 3 and tensor.numel() % (batch * count) == 0 and len(tensor) == batch:
            return tensor.detach().reshape(batch, count, -1).long()
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
