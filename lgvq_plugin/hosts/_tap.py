"""Find a host's quantizer, and listen to it."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import join_levels
from ..sockets import ConfigError, suggest
from ..types import Codes
from ._balance import GradientBalance
from ._reading import codebook_of, layout_of, read_codes, tensors_in, vectors_in

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
