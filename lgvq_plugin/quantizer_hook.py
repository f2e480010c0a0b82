"""Find a host's quantizer, hook it, and read its codes, whatever it returns.

Known return values:
  (z_q, loss, (perplexity, one_hot, indices))      taming, latent-diffusion, IBQ, LlamaGen, CVQ
  (z_q, loss, indices)                             ViT-VQGAN (B, N, C), rosinality (B, h, w, C)
  (z_q, indices, loss) or (z_q, indices)           vector-quantize-pytorch, FSQ
  (z_q, loss, info, breakdown)                     Open-MAGVIT2
  (z_q, loss, indices (B, h, w, levels))           RQ-VAE (B, h, w, C)
The quantized vectors are the first floating-point tensor of 3 or 4 dimensions; the indices are the
first integer tensor, however nested, with one entry (or one per level) for each position.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import join_levels
from .sockets import ConfigError, suggest
from .types import Codes

NAMES = ("quantize", "quantizer", "quantise", "vq", "bottleneck")
CLASS_WORDS = ("quantiz", "quantis", "codebook", "bottleneck", "fsq", "lfq", "simvq")
SIZES = ("n_e", "n_embed", "num_embed", "num_embeddings", "codebook_size", "num_codes")
WIDTHS = ("e_dim", "embed_dim", "embedding_dim", "codebook_dim", "dim")
CODEBOOKS = ("embedding", "embed", "codebook", "weight")
UNIT_LENGTH = ("l2_norm", "use_norm")  # LlamaGen, ViT-VQGAN: codes are rows of length 1
FIRST, LAST = LAYOUTS = ("channels_first", "channels_last")
DECODER_NAMES = ("dec", "post_", "up", "to_pix", "disc", "gen")  # what follows a quantizer
ONE_PASS = (
    "run the model right before its loss, and any other pass inside `with handle.disabled():` "
    "(`loss.disabled()` for LGVQLoss); a loss that trains nothing belongs under torch.no_grad()"
)


# -- find ----------------------------------------------------------------------------------------


def find_quantizer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return (path, module) of the model's quantizer, or None if there is none or several."""
    found = _candidates(model)
    return found[0] if len(found) == 1 else None


def require_quantizer(model: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return (path, module) of the model's quantizer.

    Args:
        model: any tokenizer.
        path: dotted path from the config; None looks for the usual names, then for a single
            outermost module whose class is named like a quantizer or that owns a codebook.

    Raises:
        ConfigError: if the path does not exist, or there is no quantizer or more than one.
    """
    if path is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        if path in modules:
            return path, modules[path]
        near = [name for name in modules if name and name.count(".") <= path.count(".")]
        raise ConfigError(
            f"lgvq.quantizer: {type(model).__name__} has no {path!r}{suggest(path, near)}"
        )
    found = _candidates(model)
    if len(found) == 1:
        return found[0]
    names = ", ".join(name for name, _ in found)
    what = (
        f"several modules that could be it ({names})" if names else "no module that looks like it"
    )
    raise ConfigError(
        f"lgvq.quantizer: {type(model).__name__} has {what}; name it with lgvq.quantizer: PATH"
        f"{f', or all levels with [{names}]' if names else ''}. "
        f"Modules: {', '.join(sorted(dict(model.named_children())))}"
    )


def require_quantizers(
    model: nn.Module, paths: str | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Return the model's quantizer, or all those at `paths`, by path; ConfigError for others."""
    several = [paths] if paths is None or isinstance(paths, str) else paths
    quantizers = dict(require_quantizer(model, path) for path in several)
    if len({id(module) for module in quantizers.values()}) < len(quantizers):
        raise ConfigError(
            f"lgvq.quantizer: {', '.join(quantizers)} are one module of {type(model).__name__}; "
            "name each quantizer once"
        )
    return quantizers


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    children = dict(model.named_children())
    usual = [(name, children[name]) for name in NAMES if name in children]
    return usual[:1] or _outermost(model, _is_named_so) or _outermost(model, _has_codebook)


def _outermost(
    model: nn.Module, accept: Callable[[str, nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        is_loss = path.split(".")[0] in ("loss", "vq_loss")
        if path and not is_inside and not is_loss and accept(path.rpartition(".")[2], module):
            found.append((path, module))
    return found


def _is_named_so(name: str, module: nn.Module) -> bool:
    return name in NAMES or any(word in type(module).__name__.lower() for word in CLASS_WORDS)


def _has_codebook(name: str, module: nn.Module) -> bool:
    """Whether a module has a matrix and an attribute that is its number of rows."""
    codebook = None if isinstance(module, nn.Embedding) else codebook_of(module)
    return codebook is not None and len(codebook) in (getattr(module, n, None) for n in SIZES)


def codebook_of(quantizer: nn.Module) -> Tensor | None:
    """Return the code vectors (K, C), differentiable where they are trained; None if look-up free.

    >>> codebook_of(nn.ModuleDict({"embedding": nn.Embedding(4, 2)})).shape
    torch.Size([4, 2])
    """
    for name in CODEBOOKS:
        found = getattr(quantizer, name, None)
        found = getattr(found, "weight", None) if isinstance(found, nn.Module) else found
        if isinstance(found, Tensor) and found.is_floating_point():
            found = found[0] if found.ndim == 3 and len(found) == 1 else found
            if found.ndim == 2:
                rows = found.mT if _is_transposed(quantizer) else found
                is_unit = any(getattr(quantizer, flag, False) is True for flag in UNIT_LENGTH)
                return F.normalize(rows, dim=-1) if is_unit else rows
    return None


def code_width(quantizer: nn.Module) -> int | None:
    """Return C, the width of the vectors that the quantizer returns, or None if unknown."""
    project = dict(quantizer.named_children()).get("project_out")
    if project is not None:  # vector-quantize-pytorch: the width outside, not the codebook's
        outside = getattr(project, "out_features", None)
        return outside if isinstance(outside, int) else _int_attribute(quantizer, WIDTHS[::-1])
    codebook = codebook_of(quantizer)
    if codebook is not None:
        return codebook.shape[1]
    inside = {m.embedding_dim for m in quantizer.modules() if isinstance(m, nn.Embedding)}
    only = inside.pop() if len(inside) == 1 else None  # RQ-VAE
    return _int_attribute(quantizer, WIDTHS) or only


def _is_transposed(quantizer: nn.Module) -> bool:
    """Whether the codebook is rosinality's: a buffer `embed` (C, K); its vectors (B, h, w, C)."""
    embed = dict(quantizer.named_buffers(recurse=False)).get("embed")
    is_matrix = embed is not None and embed.ndim == 2
    return is_matrix and _int_attribute(quantizer, ("dim",)) == len(embed)  # type: ignore[arg-type]


def _int_attribute(quantizer: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(quantizer, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


# -- hook ----------------------------------------------------------------------------------------


class QuantizerHook:
    """Forward hooks on quantizers that keep the codes of the last pass until they are taken.

    Args:
        quantizers: by path; codes of several are joined in this order.
        widths: C of each, if heads were built for it.
        grid: (h, w), for hosts whose codes are rows.
        ratio: of our gradient's length to the host's at the codes; None leaves gradients alone.
        layout: channels_first or channels_last; None: see :func:`layout_of`.

    Attributes:
        enabled: whether passes are recorded.
        balance: rescales our gradient if there is a `ratio`, else None.
    """

    def __init__(
        self,
        quantizers: Mapping[str, nn.Module],
        *,
        widths: Mapping[str, int] | None = None,
        grid: tuple[int, int] | None = None,
        ratio: float | None = None,
        layout: str | None = None,
    ) -> None:
        self.grid, self.layout, self.enabled = grid, layout, True
        self.balance = None if ratio is None else GradientBalance(ratio)
        self._records: dict[str, _Record] = {}
        for path, module in quantizers.items():
            self._install(path, module, (widths or {}).get(path))

    def _install(self, path: str, module: nn.Module, width: int | None) -> None:
        self._records[path] = _Record(module, width, module.register_forward_hook(self.record))

    def follow(self, host: nn.Module) -> None:
        """Move to the quantizers that `host` has at the same paths now."""
        for path, record in self._records.items():
            module = host.get_submodule(path)
            if module is not record.module:
                record.handle.remove()
                self._install(path, module, record.width)

    def remove(self) -> None:
        """Remove the hooks."""
        for record in self._records.values():
            record.handle.remove()
        self._records = {}

    def forget(self) -> None:
        """Drop what was recorded."""
        for record in self._records.values():
            record.codes, record.passes = None, []

    def expect_new_pass(self) -> None:
        """Keep the codes; the host will run again before its next loss."""
        for record in self._records.values():
            record.passes = []

    @property
    def codes(self) -> Codes | None:
        """Codes of the last pass, or None before all quantizers have run."""
        found = {path: r.codes for path, r in self._records.items() if r.codes is not None}
        if not found or len(found) < len(self._records):
            return None
        return join_levels(found) if len(found) > 1 else next(iter(found.values()))

    @torch.compiler.disable
    def record(self, quantizer: nn.Module, args: Any, output: Any) -> None:
        """Keep what `quantizer` just returned; the forward hook."""
        if not self.enabled:
            return
        record = next(r for r in self._records.values() if r.module is quantizer)
        vectors = _require_vectors(output, quantizer)
        layout = self.layout or record.layouts.get(vectors.ndim)
        if layout is None:
            layout = layout_of(output, quantizer, width=record.width)
            record.layouts[vectors.ndim] = layout
        through, width = self.balance.split if self.balance else None, record.width
        record.codes = read_codes(
            output, quantizer, grid=self.grid, through=through, layout=layout, width=width
        )
        record.had_gradients = torch.is_grad_enabled()
        node: Any = vectors.grad_fn
        if node is not None:
            if not record.reaches_input and next(_tensors_in(args), None) is not None:
                record.reaches_input = _reaches(vectors, args)
            one = _Pass()
            node.metadata[id(one)] = one  # freed with the graph
            record.passes.append(weakref.ref(one))

    def take(self, *, host: nn.Module | None = None) -> Codes:
        """Return the codes and forget them.

        Args:
            host: the model that the codes' gradient is to train; None if nothing is trained.

        Raises:
            RuntimeError: if no pass was recorded or, with a `host` to train, the codes carry no
                gradient or may belong to another pass than the loss's own.
        """
        try:
            codes = self.codes
            if codes is None:
                missing = [path for path, record in self._records.items() if record.codes is None]
                is_partial = 0 < len(missing) < len(self._records)
                which = f" ({', '.join(missing)} did not run)" if is_partial else ""
                raise RuntimeError(
                    f"the quantizer's hook saw no codes since the last step{which}: run the model "
                    "before its loss; under torch.compile attach before the first compiled call; "
                    "or the model does not call this module (set lgvq.quantizer)"
                )
            if host is not None and torch.is_grad_enabled():
                for path, record in self._records.items():
                    self._require_gradient(host, path, record)
                    alive = sum(each() is not None for each in record.passes)
                    if alive > 1:
                        raise RuntimeError(
                            f"{path or 'the quantizer'} ran {alive} times with gradients since "
                            f"the last loss, so it is ambiguous whose codes to use; {ONE_PASS}"
                        )
            return codes
        finally:
            self.forget()

    def _require_gradient(self, host: nn.Module, path: str, record: "_Record") -> None:
        has_gradient = record.codes is not None and record.codes.codes.requires_grad
        if has_gradient and record.reaches_input is not False:
            return
        inside = {id(p) for r in self._records.values() for p in r.module.parameters()}
        untrained = [
            name
            for name, p in host.named_parameters()
            if p.requires_grad
            and id(p) not in inside
            and not name.startswith(("loss.", "lgvq.", "heads."))
            # Codes of a frozen encoder have no gradient either.
            and (_is_before(name, path) or not record.had_gradients)
        ]
        if not untrained:
            return
        if has_gradient:
            raise RuntimeError(
                f"the gradient of the codes ends inside {path or 'the quantizer'}, so the text "
                f"loss would not train {untrained[0]}: its straight-through step is outside of it, "
                "or it got a detached input; let it return z + (codes - z).detach(), or name a "
                "module that does (lgvq.quantizer)"
            )
        cause = (
            "the host detached them, or ran its encoder under torch.no_grad()"
            if record.had_gradients
            else "its quantizer ran last under torch.no_grad(), as in a preview between the "
            "model's forward pass and its loss"
        )
        raise RuntimeError(
            f"the codes carry no gradient, so the text loss would not train {untrained[0]}: "
            f"{cause}; {ONE_PASS}"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the context."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before


@dataclass(eq=False)
class _Record:
    """What the hook knows of one quantizer; the last three fields are those of the last pass."""

    module: nn.Module
    width: int | None
    handle: Any
    layouts: dict[int, str] = field(default_factory=dict)  # decided once, by dimensions
    reaches_input: bool | None = None  # whether the codes' gradient goes past the quantizer
    codes: Codes | None = None
    had_gradients: bool = False
    passes: "list[weakref.ref[_Pass]]" = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "codes": None, "passes": []}  # no graph in copies and files


class _Pass:
    """Lives as long as the autograd graph of one forward pass."""


def is_hooked(quantizer: nn.Module) -> bool:
    """Return whether a :class:`QuantizerHook` is on the quantizer."""
    hooks = quantizer._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), QuantizerHook) for hook in hooks)


def _is_before(name: str, quantizer: str) -> bool:
    """Whether a parameter comes before the quantizer, by its name or its place in a Sequential."""
    first, own = name.split(".")[0], quantizer.split(".")[0]
    if first.isdecimal() and own.isdecimal():
        return int(first) < int(own)
    return not any(part.startswith(DECODER_NAMES) for part in name.split(".")[:-1])


def _reaches(output: Tensor, inputs: Any) -> bool:
    """Whether a gradient of `output` flows on to the quantizer's inputs."""
    sources = [tensor for tensor in _tensors_in(inputs) if tensor.requires_grad]
    ends = {tensor.grad_fn for tensor in sources if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in sources if tensor.grad_fn is None}
    seen, waiting = {None, output.grad_fn}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in ends or id(getattr(node, "variable", None)) in leaves:
            return True
        fresh = {following for following, _ in node.next_functions} - seen  # type: ignore[union-attr]
        seen |= fresh
        waiting += fresh
    return False


# -- read ----------------------------------------------------------------------------------------


def read_codes(
    output: Any,
    quantizer: nn.Module,
    *,
    grid: tuple[int, int] | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
    layout: str | None = None,
    width: int | None = None,
) -> Codes:
    """Convert the `output` of a quantizer.

    Args:
        output: what it returned.
        quantizer: owns the codebook.
        grid: (h, w), for hosts whose codes are (B, N, C); square if None.
        through: applied to our copy of the quantized vectors.
        layout: channels_first or channels_last; None: see :func:`layout_of`.
        width: C that the codes must have; None accepts any.

    Raises:
        ConfigError: if the output holds no codes, or they have no grid, another width, or an
            ambiguous layout.
    """
    vectors = _require_vectors(output, quantizer)
    layout = layout or layout_of(output, quantizer, width=width)
    channels_last = _channels_last(through(vectors) if through else vectors, layout)
    if width is not None and channels_last.shape[-1] != width:
        raise _misfit(vectors, quantizer, width, f"layout {layout}, shape", [layout])
    shape = channels_last.shape[1:-1]
    rows = channels_last.flatten(1, -2)
    batch, count, channels = rows.shape
    side = round(count**0.5)
    grid = (shape[0], shape[1]) if len(shape) == 2 else grid or (side, side)
    if grid[0] * grid[1] != count:
        raise ConfigError(
            f"lgvq.grid: {count} codes per image are no {grid[0]} x {grid[1]} grid; "
            "set lgvq.grid: [height, width] with that product"
        )
    codebook = codebook_of(quantizer)
    indices = _indices(output, batch, shape)
    has_levels = indices is not None and indices.ndim == 3
    if codebook is not None and (has_levels or codebook.shape[1] != channels):
        codebook = None  # a sum of rows, or projected after the look-up: no row is a code
    if indices is not None:
        indices = indices[..., 0] if has_levels else indices
        if getattr(quantizer, "remap", None) is not None:
            indices = quantizer.unmap_to_all(indices)  # type: ignore[operator]  # taming
    return Codes(rows, indices, grid, codebook)


def layout_of(output: Any, quantizer: nn.Module, *, width: int | None = None) -> str:
    """Decide whether quantized vectors are channels_first or channels_last, else ConfigError.

    Evidence, strongest first: the class (rosinality's, vector-quantize-pytorch's switches, an
    attribute `layout`), the width of a code, the shape of the indices, and in which layout equal
    indices have equal vectors.
    """
    vectors = _require_vectors(output, quantizer)
    if (known := _layout_of_class(quantizer, vectors.ndim)) is not None:
        return known
    expected = width or code_width(quantizer)
    views = {each: _channels_last(vectors, each) for each in LAYOUTS}
    found = {k: _indices(output, len(v), v.shape[1:-1]) for k, v in views.items()}
    left = [each for each in LAYOUTS if expected in (None, views[each].shape[-1])]
    by_indices = [each for each in LAYOUTS if found[each] is not None]
    if width is not None and not left:
        raise _misfit(vectors, quantizer, width, "shape", by_indices)
    left = left or list(LAYOUTS)
    if len(left) > 1 and len(by_indices) == 1:
        left = by_indices
    if len(left) > 1:
        left = _layout_by_values(codebook_of(quantizer), views, found) or left
    if len(left) == 1:
        return left[0]
    if expected is None and not by_indices:  # no evidence: the usual ones
        return FIRST if vectors.ndim == 4 else LAST
    raise ConfigError(
        f"lgvq.layout: the vectors of {type(quantizer).__name__}, shape {tuple(vectors.shape)}, "
        "fit both layouts; set lgvq.layout: channels_first (B, C, h, w) or channels_last "
        "(B, h, w, C)"
    )


SWITCHES = (  # of vector-quantize-pytorch: (attribute that is True, dimensions, layout)
    ("channel_first", (3, 4), FIRST),
    ("accept_image_fmap", (4,), FIRST),
    ("channel_last", (3,), LAST),
)


def _layout_of_class(quantizer: nn.Module, ndim: int) -> str | None:
    if ndim == 4 and _is_transposed(quantizer):
        return LAST
    if getattr(quantizer, "layout", None) in LAYOUTS:
        return str(quantizer.layout)
    given = (s for s in SWITCHES if getattr(quantizer, s[0], None) is True and ndim in s[1])
    return next((layout for *_, layout in given), None)


@torch.no_grad()
def _layout_by_values(
    codebook: Tensor | None, views: dict[str, Tensor], found: dict[str, Tensor | None]
) -> list[str]:
    """Return the layout in which equal indices have equal vectors, or else the codebook's rows.

    The former also holds where an EMA has changed the codebook since the look-up.
    """
    spreads, gaps = [], []
    for layout, view in views.items():
        rows, indices = view.flatten(0, -2).float(), found[layout]
        if indices is None or indices.ndim == 3:
            return []
        used, group = indices.flatten().unique(return_inverse=True)
        counts = torch.bincount(group, minlength=len(used))[:, None]
        means = rows.new_zeros(len(used), rows.shape[1]).index_add_(0, group, rows) / counts
        spreads.append(float((rows - means[group]).square().mean()))
        if codebook is not None and codebook.shape[1] == rows.shape[1] and used[-1] < len(codebook):
            gaps.append(float((rows - codebook[indices.flatten()]).square().mean()))
    for errors in (spreads, gaps):
        if len(errors) == 2 and min(errors) < 0.1 * max(errors):
            return [LAYOUTS[errors.index(min(errors))]]
    return []


def _channels_last(vectors: Tensor, layout: str) -> Tensor:
    return vectors if layout == LAST else vectors.movedim(1, -1)


def _misfit(
    vectors: Tensor, quantizer: nn.Module, width: int, what: str, fitting: list[str]
) -> ConfigError:
    widths = {each: _channels_last(vectors, each).shape[-1] for each in fitting or LAYOUTS}
    ways = " or ".join(f"lgvq.code_dim: {c} ({each})" for each, c in widths.items())
    return ConfigError(
        f"lgvq.code_dim: the heads were built for codes of width {width}, but "
        f"{type(quantizer).__name__} gives vectors of {what} {tuple(vectors.shape)}; set {ways}"
    )


def _require_vectors(output: Any, quantizer: nn.Module) -> Tensor:
    tensors = [*_tensors_in(output)]
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.ndim in (3, 4):
            return tensor
    shapes = [tuple(t.shape) for t in tensors]
    what = f"{type(output).__name__} with tensors of shapes {shapes}" if shapes else repr(output)
    raise ConfigError(
        f"lgvq.quantizer: {type(quantizer).__name__} returns no quantized vectors of 3 or 4 "
        f"dimensions, but {what if shapes else what[:80]}; name another module with "
        "lgvq.quantizer: PATH"
    )


def _indices(output: Any, batch: int, grid: Sequence[int]) -> Tensor | None:
    """Return (B, N) or, of a residual quantizer, (B, N, levels) int64; None if there are none.

    `grid` is (h, w), or (N,) where the codes are rows.
    """
    count = math.prod(grid)
    integers = [
        t.detach().long()
        for t in _tensors_in(output)
        if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    ]
    for tensor in integers:
        if tensor.numel() == batch * count and _fits_grid(tensor, batch, grid):
            return tensor.reshape(batch, count)
    for tensor in integers:
        if tensor.ndim < 3 or len(tensor) != batch or tensor.numel() % (batch * count):
            continue
        is_flat = tensor.shape[1] == count
        if is_flat or math.prod(tensor.shape[1:3]) == count:
            if is_flat or len(grid) == 1 or tensor.shape[1:3] == tuple(grid):
                return tensor.reshape(batch, count, -1)
        elif tensor.shape[-1] == count or tensor.shape[-2:] == tuple(grid):  # levels come first
            return tensor.reshape(batch, -1, count).mT
    return None


def _fits_grid(tensor: Tensor, batch: int, grid: Sequence[int]) -> bool:
    """Whether indices with one entry per position have the grid's shape or are flat."""
    if tensor.ndim < 3 or len(tensor) != batch or len(grid) == 1:
        return True
    shape = [side for side in tensor.shape[1:] if side != 1]
    return shape in ([side for side in grid if side != 1], [math.prod(grid)])


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner)


# -- balance -------------------------------------------------------------------------------------


class GradientBalance:
    """Rescales our gradient at the codes; the heads' own gradients are unchanged.

    Args:
        ratio: length of our gradient in units of the host's, over a process's whole batch.

    Attributes:
        scale: factor of the ratio, set in each batch by the schedule and `lgvq.every`.
        measured: the ratio before rescaling at the last backward pass; None before the first.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.scale = ratio, 1.0
        self.measured: Tensor | None = None

    def split(self, vectors: Tensor) -> Tensor:
        """Return the codes for our heads; the host continues with `vectors`, of any shape.

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
        branch: Tensor = _HoldBack.apply(vectors, ours)
        vectors.register_hook(lambda host: self._mixed(host, ours.pop()) if ours else None)
        return branch

    def _mixed(self, host: Tensor, ours: Tensor) -> Tensor:
        wanted, given = host.float().norm(), ours.float().norm().clamp(min=1e-20)
        self.measured = given / wanted.clamp(min=1e-20)
        # Without a gradient of the host's, as in a backward pass of our loss alone, ours stays.
        factor = torch.where(wanted > 0, self.ratio * self.scale * wanted / given, 1.0)
        return host + (ours * factor).to(host.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "measured": None}


class _HoldBack(torch.autograd.Function):
    """Identity; backward appends the gradient to a list and passes zeros on.

    The heads run after the host's decoder, so backward gets here before it reaches the codes.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ours: list[Tensor]) -> Tensor:
        ctx.ours = ours
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.ours.append(gradients[0])
        return torch.zeros_like(gradients[0]), None
