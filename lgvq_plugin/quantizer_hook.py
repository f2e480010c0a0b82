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

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import join_levels
from .sockets import ConfigError, suggest
from .types import Codes

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


# -- The gradient of our terms at the codes, brought to a share of the host's own ----------------


TINY = 1e-20


class GradientBalance:
    """Rescales our gradient at the codes; the heads' own gradients stay as they are.

    Args:
        ratio: length of our gradient in units of the host's, over the whole batch of a process.

    Attributes:
        scale: share of the ratio that holds now, the schedule's, in [0, 1].
        measured: what the ratio was before, at the last backward pass; None before the first.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.scale = ratio, 1.0
        self.measured: Tensor | None = None

    def split(self, vectors: Tensor) -> Tensor:
        """Return the codes for our heads; `vectors` of any shape are what the host goes on with.

        Two passes in a step are balanced each by itself.

        Example:
            >>> codes = torch.ones(2, requires_grad=True)
            >>> vectors = codes * 1
            >>> for_our_heads = GradientBalance(0.5).split(vectors)
            >>> ((vectors * torch.tensor([3.0, 4.0])).sum() + 100 * for_our_heads[0]).backward()
            >>> codes.grad  # the host's (3, 4), and ours along the first axis, half as long
            tensor([5.5000, 4.0000])
        """
        if not vectors.requires_grad:
            return vectors
        ours: list[Tensor] = []

        def mix(host: Tensor) -> Tensor | None:
            return self._mixed(host, ours.pop()) if ours else None

        branch: Tensor = _HoldBack.apply(vectors, ours)
        vectors.register_hook(mix)
        return branch

    def _mixed(self, host: Tensor, ours: Tensor) -> Tensor:
        wanted, given = host.float().norm(), ours.float().norm().clamp(min=TINY)
        self.measured = given / wanted.clamp(min=TINY)
        return host + (ours * (self.ratio * self.scale * wanted / given)).to(host.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "measured": None}


class _HoldBack(torch.autograd.Function):
    """The identity; its gradient goes into a list, and zeros go on, so that the sum has none of it.

    Our heads are built after the host's decoder has run, so autograd is here before the codes.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ours: list[Tensor]) -> Tensor:
        ctx.ours = ours
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.ours.append(gradients[0])
        return torch.zeros_like(gradients[0]), None


# -- Find a host's quantizer, and listen to it ---------------------------------------------------


NAMES = ("quantize", "quantizer", "quantise", "vq", "bottleneck")
LIKELY = ("quantiz", "quantis", "codebook", "bottleneck", "fsq", "lfq", "simvq")
SIZES = ("n_e", "n_embed", "num_embed", "num_embeddings", "codebook_size", "num_codes")


ONE_PASS = (
    "run the model right before its loss, and any other pass inside `with handle.disabled():` "
    "(`loss.disabled()` for LGVQLoss); a loss that trains nothing belongs under torch.no_grad()"
)
AFTER = ("dec", "post_", "up", "to_pix", "disc", "gen")  # names of what follows a quantizer


def find_quantizers(
    model: nn.Module, paths: str | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Return the model's quantizer, or all those at `paths`, by path; see `find_quantizer`."""
    if paths is None or isinstance(paths, str):
        found = find_quantizer(model, paths)
        assert found is not None
        return dict([found])
    quantizers = {path: find_quantizers(model, path)[path] for path in paths}
    if len({id(module) for module in quantizers.values()}) < len(quantizers):
        raise ConfigError(
            f"lgvq.quantizer: {', '.join(quantizers)} are one module of {type(model).__name__}; "
            "name each quantizer once"
        )
    return quantizers


def find_quantizer(
    model: nn.Module, path: str | None = None, *, required: bool = True
) -> tuple[str, nn.Module] | None:
    """Return (path, module) of the model's quantizer.

    Args:
        model: any tokenizer.
        path: dotted path from the config; None looks for the usual names, then for the one
            outermost module whose class is named like a quantizer.
        required: raise if there is none, else return None.

    Raises:
        ConfigError: if the path does not exist, or there is no quantizer or more than one.
    """
    if path is not None:
        module = dict(model.named_modules(remove_duplicate=False)).get(path)
        if module is None:
            if not required:
                return None
            known = [name for name, _ in model.named_modules() if name]
            near = suggest(path, [name for name in known if name.count(".") <= path.count(".")])
            raise ConfigError(f"lgvq.quantizer: {type(model).__name__} has no {path!r}{near}")
        return path, module
    children = dict(model.named_children())
    for name in NAMES:
        if name in children:
            return name, children[name]
    found = _outermost(model, _is_named_so) or _outermost(model, _has_codebook)
    if len(found) == 1:
        return found[0]
    if not required:
        return None
    told = ", ".join(name for name, _ in found)
    raise ConfigError(
        f"lgvq.quantizer: {type(model).__name__} has "
        + (
            f"several modules that could be it ({told})"
            if found
            else "no module that looks like it"
        )
        + "; name it with lgvq.quantizer: PATH"
        + (f", or all levels with [{', '.join(n for n, _ in found)}]" if found else "")
        + f". Modules: {', '.join(sorted(children))}"
    )


def _outermost(model: nn.Module, accept: Callable[[str, nn.Module], bool]) -> list[Any]:
    """Outermost accepted modules as (path, module); the loss is not searched."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if not path or inside or path.split(".")[0] in ("loss", "vq_loss"):
            continue
        if accept(path.rpartition(".")[2], module):
            found.append((path, module))
    return found


def _is_named_so(name: str, module: nn.Module) -> bool:
    return name in NAMES or any(word in type(module).__name__.lower() for word in LIKELY)


def _has_codebook(name: str, module: nn.Module) -> bool:
    """A matrix of codes, and a number of codes that is its size; of torch's layers one has both."""
    codebook = None if isinstance(module, nn.Embedding) else codebook_of(module)
    return codebook is not None and any(
        getattr(module, size, None) == len(codebook) for size in SIZES
    )


def _is_before(name: str, quantizer: str) -> bool:
    """Whether a parameter is by its name no decoder's; in a Sequential the numbers tell."""
    first, own = name.split(".")[0], quantizer.split(".")[0]
    if first.isdecimal() and own.isdecimal():
        return int(first) < int(own)
    return not any(part.startswith(AFTER) for part in name.split(".")[:-1])


def is_tapped(quantizer: nn.Module) -> bool:
    """Return whether somebody listens to the quantizer already."""
    hooks = quantizer._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Tap) for hook in hooks)


def _reaches(output: Tensor, inputs: Any) -> bool:
    """Whether a gradient of `output` goes on to what went into the quantizer."""
    sources = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
    ends = {tensor.grad_fn for tensor in sources if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in sources if tensor.grad_fn is None}
    seen, waiting = {output.grad_fn}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node in ends or id(getattr(node, "variable", None)) in leaves:
            return True
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        waiting += fresh
    return False


class _Pass:
    """Lives as long as the autograd graph of one forward pass."""


class Tap:
    """A forward hook on quantizers that keeps the codes of the last pass until they are taken.

    Args:
        grid: (h, w), for hosts whose codes are rows.
        ratio: of our gradient to the host's at the codes, or None.
        layout: channels_first or channels_last; None decides.

    Attributes:
        quantizers: the modules that are listened to, by path.
        enabled: whether passes are recorded.
        balance: of our gradient with the host's, or None.
    """

    def __init__(
        self,
        grid: tuple[int, int] | None = None,
        ratio: float | None = None,
        layout: str | None = None,
    ) -> None:
        self.grid, self.layout, self.enabled = grid, layout, True
        self.balance = None if ratio is None else GradientBalance(ratio)
        self.quantizers: dict[str, nn.Module] = {}
        self._widths: dict[str, int] = {}
        self._handles: list[Any] = []
        self._layouts: dict[tuple[str, int], str] = {}  # decided once: (path, dimensions)
        self._records: dict[str, tuple[Codes, bool]] = {}  # and whether gradients were on
        self._reaching: dict[str, bool] = {}  # whether the codes' gradient goes past the quantizer
        self._passes: dict[str, list[weakref.ref[_Pass]]] = {}

    def install(
        self, quantizers: Mapping[str, nn.Module], widths: Mapping[str, int] | None = None
    ) -> "Tap":
        """Start listening to `quantizers`, and to no others any more.

        Args:
            quantizers: by path; the order is that of their codes.
            widths: C of each, if heads were built for it.
        """
        self.remove()
        self.quantizers, self._widths = dict(quantizers), dict(widths or {})
        self._handles = [q.register_forward_hook(self.record) for q in self.quantizers.values()]
        return self

    def follow(self, host: nn.Module) -> None:
        """Listen to the quantizers that `host` has at the same paths now."""
        now = {path: host.get_submodule(path) for path in self.quantizers}
        if any(now[path] is not module for path, module in self.quantizers.items()):
            self.install(now, dict(self._widths))

    def remove(self) -> None:
        """Stop listening, and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.quantizers, self._layouts, self._reaching = [], {}, {}, {}
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded."""
        self._records, self._passes = {}, {}

    def settle(self) -> None:
        """Keep the codes, but expect that the host runs anew before it asks for them."""
        self._passes = {}

    @property
    def codes(self) -> Codes | None:
        """The record of the last pass, or None before all quantizers have run."""
        if not self.quantizers or self._records.keys() != self.quantizers.keys():
            return None
        found = [self._records[path][0] for path in self.quantizers]
        if len(found) == 1:
            return found[0]
        return join_levels(dict(zip(self.quantizers, found, strict=True)))

    @torch.compiler.disable
    def record(self, quantizer: nn.Module, args: Any, output: Any) -> None:
        """Keep what `quantizer` just returned; its hook."""
        if not self.enabled:
            return
        path = next(path for path, module in self.quantizers.items() if module is quantizer)
        vectors = vectors_in(output)
        layout = self.layout
        if layout is None and vectors is not None:
            width, key = self._widths.get(path), (path, vectors.ndim)
            if key not in self._layouts:
                self._layouts[key] = layout_of(output, quantizer, width=width)
            layout = self._layouts[key]
        codes = read_codes(
            output,
            quantizer,
            grid=self.grid,
            through=None if self.balance is None else self.balance.split,
            layout=layout,
            width=self._widths.get(path),
        )
        self._records[path] = (codes, torch.is_grad_enabled())
        if vectors is not None and vectors.grad_fn is not None:
            if not self._reaching.get(path) and next(tensors_in(args), None) is not None:
                self._reaching[path] = _reaches(vectors, args)
            one = _Pass()
            node: Any = vectors.grad_fn
            node.metadata[id(one)] = one  # goes when the graph goes
            self._passes.setdefault(path, []).append(weakref.ref(one))

    def set_scale(self, scale: float) -> None:
        """Say which share of the balance's ratio the schedule has now."""
        if self.balance is not None:
            self.balance.scale = scale

    def balance_log(self, split: str) -> dict[str, Tensor]:
        """Return the gradients' ratio before balancing at the last backward pass, if known."""
        measured = self.balance.measured if self.balance is not None and split == "train" else None
        return {} if measured is None else {f"{split}/lgvq/gradient_ratio": measured}

    def take(self, *, host: nn.Module | None = None) -> Codes:
        """Return the codes and forget them.

        Args:
            host: what the codes' gradient shall train; None if nothing is trained.

        Raises:
            RuntimeError: if no pass was recorded, or, with a `host` to train, the codes carry no
                gradient, or are not for certain those of the loss's own forward pass.
        """
        records, passes, codes = self._records, self._passes, self.codes
        self.forget()
        if codes is None:
            missing = [path for path in self.quantizers if path not in records]
            raise RuntimeError(
                "the quantizer's hook saw no codes since the last step"
                + (f" ({', '.join(missing)} did not run)" if records else "")
                + ": run the model before its loss; under torch.compile attach before the first "
                "compiled call; or the model does not call this module (set lgvq.quantizer)"
            )
        if host is not None and torch.is_grad_enabled():
            for path, (level, had_gradients) in records.items():
                self._require_gradient(host, path, level, had_gradients)
                alive = sum(each() is not None for each in passes.get(path, ()))
                if alive > 1:
                    raise RuntimeError(
                        f"{path or 'the quantizer'} ran {alive} times with gradients since the "
                        f"last loss, so whose codes are meant is not known; {ONE_PASS}"
                    )
        return codes

    def _require_gradient(
        self, host: nn.Module, path: str, codes: Codes, had_gradients: bool
    ) -> None:
        if codes.codes.requires_grad and self._reaching.get(path, True):
            return
        inside = {id(p) for q in self.quantizers.values() for p in q.parameters()}
        names = [n for n, p in host.named_parameters() if p.requires_grad and id(p) not in inside]
        names = [n for n in names if not n.startswith(("loss.", "lgvq.", "heads."))]
        if had_gradients:  # a frozen encoder gives such codes, too, whatever the decoder does
            names = [name for name in names if _is_before(name, path)]
        if names and codes.codes.requires_grad:
            raise RuntimeError(
                f"the gradient of the codes ends inside {path or 'the quantizer'}, so the text "
                f"loss would not train {names[0]}: its straight-through step is outside of it, or "
                "it got a detached input; let it return z + (codes - z).detach(), or name a "
                "module that does (lgvq.quantizer)"
            )
        if names:
            why = (
                "the host detached them, or ran its encoder under torch.no_grad()"
                if had_gradients
                else "its quantizer ran last under torch.no_grad(), as in a preview between the "
                "model's forward pass and its loss"
            )
            raise RuntimeError(
                f"the codes carry no gradient, so the text loss would not train {names[0]}: "
                f"{why}; {ONE_PASS}"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the context."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def __getstate__(self) -> dict[str, Any]:
        # No graph in a copy or a file.
        return {**self.__dict__, "_records": {}, "_passes": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other
