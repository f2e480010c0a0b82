"""How a loss meets the host that builds it: by torch's registration hook, then by stand-ins.

host.__init__: self.loss = LGVQLoss(...)   -> listen: who took me? has it a quantizer?
               self.quantize = ...         -> found: tap it, replace the methods below
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .alignment import Alignment, Captions
from .config import parse
from .files import write_bytes, write_json
from .guides.base import build_guide
from .quantizer_hook import (
    NAMES,
    Tap,
    code_width,
    codebook_of,
    find_quantizer,
    find_quantizers,
    is_tapped,
)
from .sockets import ConfigError
from .types import Codes

# Torch's hook on registrations is one for all; here lie, weakly, the losses that wait for a host.
_WAITING: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod]" = weakref.WeakKeyDictionary()
_HOOK: list[Any] = []


def listen(loss: nn.Module, method: Callable[..., None]) -> None:
    """Call `method(parent, name, child)` whenever a module gets a submodule, while `loss` lives."""
    weakref.finalize(loss, _remove_if_idle).atexit = False  # before the entry: it runs after it
    _WAITING[loss] = weakref.WeakMethod(method)
    if not _HOOK:
        _HOOK.append(register_module_module_registration_hook(_on_registration))


def stop_listening(loss: nn.Module) -> None:
    """Call it no more; the last one to go removes torch's hook."""
    _WAITING.pop(loss, None)
    _remove_if_idle()


def _remove_if_idle() -> None:
    if not _WAITING and _HOOK:
        _HOOK.pop().remove()


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    for method in [reference() for reference in _WAITING.values()]:
        if method is not None:
            method(parent, name, child)


def gets_quantizer(
    parent: nn.Module, name: str, child: nn.Module | None, path: str | Sequence[str] | None
) -> nn.Module | None:
    """Return what `parent` will have once `child` is in, if that completes a quantizer; or None."""
    view = View({**parent._modules, name: child})
    if path is not None:
        wanted = {each.split(".")[0] for each in ([path] if isinstance(path, str) else path)}
        return view if wanted <= view._modules.keys() else None
    return view if find_quantizer(view, required=False) else None


class HostMethods:
    """Stand-ins for methods of the host: where its batches come in, and where its optimizers are.

    Bound methods as attributes of the instance: they survive copy.deepcopy and pickle.
    """

    INPUTS = ("training_step", "validation_step", "test_step")

    def __init__(self, host: nn.Module, loss: Any):
        self.host, self.loss = host, loss
        names = ("get_input",) if hasattr(host, "get_input") else self.INPUTS
        self.names = [n for n in (*names, "configure_optimizers") if hasattr(host, n)]
        for name in self.names:
            setattr(host, name, getattr(self, name))
        self.averages: list[AverageOfHost] = []
        # The host may build its average after its loss, so it is looked for whenever keys matter.
        self._hooks: list[Any] = [
            host.register_state_dict_pre_hook(self.find_averages),
            host.register_load_state_dict_pre_hook(self.drop_averages_of_heads),
        ]

    def remove(self) -> None:
        """Give the host its own methods back, and its averages."""
        self.find_averages()
        for hook in self._hooks:
            hook.remove()
        for average in self.averages:
            average.remove()
        self.averages = []
        for name in self.names:
            if getattr(vars(self.host).get(name), "__self__", None) is self:
                delattr(self.host, name)

    def find_averages(self, *unused: Any) -> None:
        """Keep the heads out of the moving averages that the host has of itself by now."""
        known = [each.module for each in self.averages]
        for module in self.host.modules():
            names = getattr(module, "m_name2s_name", None)
            if isinstance(names, dict) and not any(module is one for one in known):
                self.averages.append(AverageOfHost(module, self.host, self.loss))

    def drop_averages_of_heads(
        self, host: nn.Module, state: dict[str, Any], prefix: str, *unused: Any
    ) -> None:
        """Checkpoints of earlier versions have averages of the heads, as `model_ema.*`."""
        self.find_averages()
        for key in [k for k in state if is_average_of_heads(k.removeprefix(prefix))]:
            del state[key]

    def get_input(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Taming's, and that of all its descendants."""
        return self._with_batch("get_input", batch, *args, **kwargs)

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's."""
        return self._with_batch("training_step", batch, *args, **kwargs)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's."""
        return self._with_batch("validation_step", batch, *args, **kwargs)

    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's."""
        return self._with_batch("test_step", batch, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """Lightning's, and of taming's protocol."""
        self.find_averages()
        return self.loss.add_heads(self._own("configure_optimizers")())

    def _own(self, name: str) -> Any:
        return getattr(type(self.host), name).__get__(self.host)

    def _with_batch(self, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.find_averages()
        self.loss.receive(batch)
        return call_as_declared(self._own(name), batch, *args, **kwargs)


def is_average_of_heads(key: str) -> bool:
    """Whether a host's average of itself (LitEma) has a head at `key`; it leaves the dots out.

    Example:
        >>> is_average_of_heads("model_ema.losslgvqcode_vitcls"), is_average_of_heads("loss.lgvq.a")
        (True, False)
    """
    return key.startswith("model_ema.") and "losslgvq" in key.replace(".", "")


class AverageOfHost:
    """Stand-ins for methods of a LitEma, which see the host without our heads.

    latent-diffusion's, and so SEED-Voken's and others': `m_name2s_name` maps the names of
    parameters to those of buffers, and `forward(model)`, `copy_to(model)` go over
    `model.named_parameters()`.

    Args:
        module: the average; its buffers for heads are removed.
        host: whose average it is.
        loss: has the heads as `lgvq`.
    """

    METHODS = ("forward", "copy_to")

    def __init__(self, module: nn.Module, host: nn.Module, loss: nn.Module) -> None:
        self.module, self.host, self.loss = module, host, loss
        heads = {id(p) for p in loss.get_submodule("lgvq").parameters()}
        names: dict[str, str] = module.m_name2s_name  # type: ignore[assignment]
        for name, parameter in host.named_parameters():
            if id(parameter) in heads and name in names:
                module._buffers.pop(names.pop(name), None)
        for name in self.METHODS:
            if hasattr(type(module), name):
                setattr(module, name, getattr(self, name))

    def remove(self) -> None:
        """Give the average its own methods back."""
        for name in self.METHODS:
            vars(self.module).pop(name, None)

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Move the average on."""
        return type(self.module).forward(self.module, self._bare(model), *args, **kwargs)

    def copy_to(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Give `model` the averaged weights."""
        kind: Any = type(self.module)
        return kind.copy_to(self.module, self._bare(model), *args, **kwargs)

    def _bare(self, model: nn.Module) -> Any:
        return WithoutHeads(model, self.loss) if model is self.host else model


class WithoutHeads:
    """A host whose parameters are its own."""

    def __init__(self, host: nn.Module, loss: nn.Module) -> None:
        self._host = host
        self._heads = {id(p) for p in loss.get_submodule("lgvq").parameters()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`, without heads."""
        for name, parameter in self._host.named_parameters(*args, **kwargs):
            if id(parameter) not in self._heads:
                yield name, parameter

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """As `nn.Module.parameters`, without heads."""
        return (parameter for _, parameter in self.named_parameters(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


class View(nn.Module):
    """Submodules of a host as they will be once the one under registration is in."""

    def __init__(self, modules: Mapping[str, nn.Module | None]):
        super().__init__()
        self._modules.update(modules)


def grid_of(host: nn.Module) -> tuple[int, int] | None:
    """Return (h, w) of the codes of a taming-style decoder, which knows it; else None."""
    shape = getattr(getattr(host, "decoder", None), "z_shape", None)
    if shape is None or len(shape) != 4 or min(shape[-2:]) < 1:
        return None
    return int(shape[-2]), int(shape[-1])


def call_as_declared(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with no more arguments than `method` takes.

    Lightning looks at the signature of `training_step` before it passes a batch index; ours, in
    its place, takes everything.

    Example:
        >>> call_as_declared(lambda batch: batch, "images", 7)
        'images'
    """
    kinds = [p.kind for p in inspect.signature(method).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        taken = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        args = args[: sum(kind in taken for kind in kinds)]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        kwargs = {k: v for k, v in kwargs.items() if k in inspect.signature(method).parameters}
    return method(*args, **kwargs)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `root` has `old`."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


# -- Put the heads into the optimizer that trains the host, as a parameter group of their own ----


# What schedulers keep as one list entry a group; the other lists of theirs are no such.
PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def add_heads(
    result: Any,
    heads: Sequence[nn.Parameter],
    host: Sequence[nn.Parameter],
    *,
    undecayed: Iterable[nn.Parameter] = (),
) -> Any:
    """Add `heads` to the optimizer in `result` that trains the most of `host`.

    Their group learns as the group that holds the most of the host: same learning rate, weight
    decay and schedule. Where that one has a weight decay, `undecayed` go into a second group
    without. An optimizer state saved before the heads came, or with all heads in one group,
    still loads; schedulers restored from such a state get the missing entries at the next step.

    Args:
        result: what `configure_optimizers` returns: an optimizer, a list, a dict, (list, list).
        heads: parameters of the heads; none of them may be in an optimizer twice.
        host: parameters of quantizer, encoder and decoder.
        undecayed: those of `heads` without weight decay, see `undecayed_parameters`.

    Returns:
        `result`, with the groups added in place; schedulers of that optimizer follow.

    Raises:
        ConfigError: if no optimizer trains the host, or a scheduler that is not in `result`
            already drives the one that does.
    """
    optimizers = list(_of_type(result, Optimizer))
    wanted = {id(p) for p in host}
    held = [sum(_share(o, wanted)) for o in optimizers]
    if not optimizers or max(held) == 0:
        raise ConfigError(
            f"no optimizer among {len(optimizers)} trains the host's parameters, so the heads "
            "would never learn; pass the heads' parameters to your optimizer yourself"
        )
    optimizer = optimizers[held.index(max(held))]
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    fresh = [p for p in heads if p.requires_grad and id(p) not in known]
    if not fresh:
        return result
    schedulers = [s for s in _schedulers(result) if s.optimizer is optimizer]
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            "a learning rate scheduler already drives the optimizer, and would not know the new "
            "group; add the heads before building it, or give both: [optimizer, scheduler]"
        )
    shares = _share(optimizer, wanted)
    index = shares.index(max(shares))
    model = dict(optimizer.param_groups[index])
    names = {id(p): f"lgvq.{i}" for i, p in enumerate(fresh)}
    exempt, first = {id(p) for p in undecayed}, len(optimizer.param_groups)
    parts = [(model, fresh)]
    if model.get("weight_decay"):
        parts = [
            (model, [p for p in fresh if id(p) not in exempt]),
            ({**model, "weight_decay": 0.0}, [p for p in fresh if id(p) in exempt]),
        ]
    for settings, part in parts:
        if part:
            optimizer.add_param_group(_group_like(settings, part, names))
    older = OlderStates(first, index, heads=fresh, exempt=exempt, schedulers=schedulers)
    optimizer.register_load_state_dict_pre_hook(older.accept)
    optimizer.register_step_pre_hook(older.extend)
    older.extend(optimizer)
    return result


def undecayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that weight decay would only distort.

    These are biases, norms and temperatures (fewer than two dimensions), and learned tokens:
    positions, [CLS], mask tokens (first dimension 1) and embeddings.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> [tuple(p.shape) for p in undecayed_parameters(layers)]
        [(2,), (2,), (2,)]
    """
    return [
        parameter
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if parameter.ndim < 2 or isinstance(part, nn.Embedding) or _is_token(parameter)
    ]


def _is_token(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 3 and parameter.shape[0] == 1


def remove_heads(result: Any, heads: Sequence[nn.Parameter]) -> None:
    """Take the heads out again; under a scheduler, which counts groups, an empty one stays."""
    ours = {id(p) for p in heads}
    for optimizer in _of_type(result, Optimizer):
        if not sum(_share(optimizer, ours)):
            continue
        for parameter in heads:
            optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        for hooks in (
            optimizer._optimizer_load_state_dict_pre_hooks,
            optimizer._optimizer_step_pre_hooks,
        ):
            for key, hook in [*hooks.items()]:
                if isinstance(getattr(hook, "__self__", None), OlderStates):
                    del hooks[key]


def _share(optimizer: Optimizer, wanted: set[int]) -> list[int]:
    """How many of the wanted parameters each group holds."""
    return [sum(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


def _group_like(
    model: dict[str, Any], heads: list[nn.Parameter], names: dict[int, str]
) -> dict[str, Any]:
    """Return a group with the settings of `model`, those that a scheduler keeps there included."""
    group = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in model.items()
        if key not in ("params", "param_names")
    }
    is_named = "param_names" in model
    return {**group, "params": [(names[id(p)], p) for p in heads] if is_named else heads}


class OlderStates:
    """Lets optimizer and schedulers be restored from a run with other groups of heads, or none.

    Args:
        first: index of the heads' first group.
        model: index of the host's group that the heads' groups follow.
        heads: in the order of earlier runs, which had them in one group.
        exempt: ids of those that go without weight decay.
        schedulers: of the optimizer.
    """

    def __init__(
        self,
        first: int,
        model: int,
        *,
        heads: Sequence[nn.Parameter],
        exempt: set[int],
        schedulers: Sequence[Any],
    ) -> None:
        self.first, self.model, self.schedulers = first, model, schedulers
        self.one_group = [id(p) for p in heads]
        self.two_groups = sorted(self.one_group, key=lambda each: each in exempt)  # stable

    def accept(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Give a saved state the groups that `optimizer` has; a load_state_dict pre-hook."""
        saved = state["param_groups"]
        count = sum(share > 0 for share in _share(optimizer, {*self.one_group}))
        before = len(saved) - (len(optimizer.param_groups) - count)
        if before not in (0, 1, 2) or before == count == 2:
            return None
        theirs, rest = saved[self.first : self.first + before], saved[self.first + before :]
        settings = (theirs or saved[self.model :])[0]
        numbers = [number for group in theirs for number in group["params"]]
        if before == 0:  # they have learned nothing yet
            start = sum(len(group["params"]) for group in saved)
            numbers = list(range(start, start + len(self.one_group)))
        order = self.two_groups if before == 2 else self.one_group
        if len(order) != len(numbers):
            return None
        number_of = dict(zip(order, numbers, strict=True))
        groups = []
        for group in optimizer.param_groups[self.first : self.first + count]:
            is_undecayed = not group.get("weight_decay", 1.0)
            kept = {k: group[k] for k in ("param_names",) if k in group}
            kept |= {"weight_decay": group["weight_decay"]} if is_undecayed else {}
            params = [number_of[id(p)] for p in group["params"]]
            groups.append({**settings, **kept, "params": params})
        return {**state, "param_groups": [*saved[: self.first], *groups, *rest]}

    def extend(self, optimizer: Optimizer, *unused: Any) -> None:
        """Give the schedulers an entry for each group; an optimizer's step pre-hook."""
        for scheduler in self.schedulers:
            _extend(scheduler, self.model, len(optimizer.param_groups))


def _of_type(node: Any, kind: type) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _of_type(value, kind)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _of_type(value, kind)


def _schedulers(result: Any) -> Iterator[Any]:
    for scheduler in _of_type(result, LRScheduler):
        yield from _flat(scheduler)


def _flat(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _flat(inner)


def _extend(scheduler: Any, index: int, count: int) -> None:
    """Give the last of `count` groups what the scheduler keeps for group `index`."""
    lists = [getattr(scheduler, name, None) for name in (*PER_GROUP, "_last_lr")]
    for kept in lists:
        if isinstance(kept, list) and index < len(kept) < count:
            kept.extend(kept[index] for _ in range(count - len(kept)))


# -- Attach the heads to a model whose training loop is the user's own ---------------------------


logger = logging.getLogger(__name__)

HEADS_WEIGHTS, HEADS_CONFIG = "lgvq_heads.safetensors", "lgvq_config.json"


def build_alignment(
    given: Mapping[str, Any] | None,
    quantizers: Mapping[str, nn.Module],
    grid: tuple[int, int] | None = None,
) -> tuple[Alignment, Tap]:
    """Build the heads for a quantizer, or several, from the `lgvq:` block, and listen to it.

    Raises:
        ConfigError: if the block is wrong, or a quantizer does not tell the width of a code.
    """
    config = parse(given)
    widths = {path: config.code_dim or code_width(each) for path, each in quantizers.items()}
    unknown = [type(quantizers[path]).__name__ for path, width in widths.items() if width is None]
    if unknown:
        raise ConfigError(
            f"lgvq.code_dim: {unknown[0]} does not tell the width of a code; set it to the number "
            "of channels of the vectors that it returns"
        )
    known = {path: width for path, width in widths.items() if width is not None}
    with torch.random.fork_rng(devices=[]):  # a guide may draw, and overwrite, initial weights
        guide = build_guide(config.guide)
    heads = Alignment(config, guide, code_dim=sum(known.values()), grid=grid)
    tap = Tap(config.grid or grid, config.gradient_ratio, config.layout)
    return heads, tap.install(quantizers, known)


class Handle:
    """What :func:`attach` returns: the heads of a model whose training loop is the user's own.

    Attributes:
        model: the host, unchanged but for one forward hook.
        heads: an `nn.Module` to optimize beside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | list[str],
        heads: Alignment,
        tap: Tap,
        optimizers: Any = None,
    ) -> None:
        self.model, self.path, self.heads, self._tap = model, path, heads, tap
        self._optimizers = optimizers
        self._step = 0

    def loss(
        self, captions: Captions, *, step: int | None = None, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, log) for the model's last forward pass; add the loss to the model's own.

        Args:
            captions: one entry an image: a string, a list of strings, or None.
            step: of the training; counted here if None.
            split: prefix of the log's keys; other than "train", nothing is trained.

        Raises:
            RuntimeError: if the model did not run since the last call, or after detach; if the
                codes carry no gradient although the model trains (a pass under torch.no_grad()
                came in between), or the quantizer ran twice.
            ConfigError: if the number of captions is wrong.
        """
        if not self._tap.enabled:
            return torch.zeros(()), {}
        codes = self._tap.take(host=self.model if split == "train" else None)
        if next(self.heads.parameters()).device != codes.codes.device:
            self.heads.to(codes.codes.device)
        now = self._step if step is None else step
        self._tap.set_scale(self.heads.scale(now))
        loss, log = self.heads(codes, captions, step=now, split=split)
        log |= self._tap.balance_log(split)
        if step is None and split == "train":
            self._step += 1
        return loss, log

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the heads' parameters, for an optimizer of the user's."""
        return self.heads.parameters()

    def trainable_parameters(self) -> str:
        """Return in a line how many parameters train: of the heads, of the host, of all."""
        heads = {id(p): p for p in self.heads.parameters()}
        host = [p for p in self.model.parameters() if id(p) not in heads]
        every = [*heads.values(), *host]
        trained = sum(p.numel() for p in every if p.requires_grad)
        count = sum(p.numel() for p in every)
        return (
            f"trainable params: {trained:,} || heads params: "
            f"{sum(p.numel() for p in heads.values()):,} || host params: "
            f"{sum(p.numel() for p in host):,} || all params: {count:,} || "
            f"trainable%: {100 * trained / count:.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT's models do."""
        print(self.trainable_parameters())

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return the heads as two groups for an optimizer of the user's, as `add_heads` does.

        Biases, norms, positions and the temperature are in the second one, without weight decay:

            AdamW([{"params": model.parameters()}, *handle.parameter_groups(weight_decay=0.05)])
        """
        exempt = {id(p) for p in undecayed_parameters(self.heads)}
        trained = [p for p in self.heads.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
        ]

    def disabled(self) -> AbstractContextManager[None]:
        """Train the model alone inside the context: `loss` gives 0."""
        return self._tap.paused()

    def status(self) -> dict[str, Any]:
        """Return what is attached where: quantizer, objectives and weights, parameters, guide."""
        return status(self.heads, self.path) | {"enabled": self._tap.enabled}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads alone, as `lgvq export --format heads` does."""
        save_heads(self.heads, Path(folder))

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what :meth:`save_pretrained` or `lgvq export --format heads` wrote.

        Raises:
            ConfigError: if it is missing or does not fit.
        """
        load_heads(self.heads, Path(folder))

    def detach(self) -> nn.Module:
        """Remove the hook; model and optimizer are as before. Returns the model."""
        self._tap.remove()
        remove_heads(self._optimizers, list(self.heads.parameters()))
        self._optimizers = None
        return self.model


def attach(
    model: nn.Module,
    quantizer: str | Sequence[str] | None = None,
    *,
    optimizer: Any = None,
    **options: Any,
) -> Handle:
    """Attach the three objectives to any tokenizer; its state dict and its code stay as they are.

    Args:
        model: the tokenizer.
        quantizer: path of its quantizer, found by name if None; a list for a model of several
            levels (VQ-VAE-2): one set of heads sees the codes of all of them side by side.
        optimizer: gets the heads as a new parameter group; with a scheduler on it already, give
            `[optimizer, scheduler]`. If None, optimize `handle.parameters()` beside the model.
        options: keys of the `lgvq:` block: recipe, objectives, guide, code_vit, ...

    In a LightningModule of your own, attach in `__init__` once the quantizer is there, and make
    the heads a submodule, so that they are moved, averaged, synchronized and saved with the rest:

        self.handle = attach(self, guide={"use": "micro_clip"})
        self.heads = self.handle.heads          # configure_optimizers: self.parameters() has them
        ...                                     # training_step, after the model ran:
        loss = loss + self.handle.loss(batch["caption"])[0]

    In a plain DistributedDataParallel script do the same with the model before wrapping it.

    Raises:
        ConfigError: for a wrong option, or if the quantizer cannot be found or has heads already.

    Example:
        >>> from lgvq_plugin.hosts.vqvae import VectorQuantizer
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))
        >>> handle = attach(model, "1", guide={"use": "micro_clip"})
        >>> _ = model(torch.randn(2, 3, 16, 16))
        >>> loss, log = handle.loss(["a red square", None])
        >>> loss.requires_grad, "train/lgvq/total" in log
        (True, True)
        >>> handle.detach() is model
        True
    """
    quantizers = find_quantizers(model, quantizer)
    for name, module in quantizers.items():
        if is_tapped(module):
            raise ConfigError(f"{type(model).__name__}.{name} has heads already; detach them first")
    path = [*quantizers] if len(quantizers) > 1 else next(iter(quantizers))
    heads, tap = build_alignment({**options, "quantizer": path}, quantizers)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        heads.to(parameter.device)
    if optimizer is not None:
        add_heads(
            optimizer,
            list(heads.parameters()),
            list(model.parameters()),
            undecayed=undecayed_parameters(heads),
        )
    handle = Handle(model, path, heads, tap, optimizer)
    logger.info("LG-VQ on %s.%s: %s", type(model).__name__, path, handle.trainable_parameters())
    return handle


def status(heads: Alignment, path: str | list[str]) -> dict[str, Any]:
    """Describe attached heads in plain values."""
    names = list(heads.objectives)
    return {
        "quantizer": path,
        "recipe": heads.config.recipe,
        "objectives": {name: heads.weight(name) for name in names},
        "gradient_ratio": heads.config.gradient_ratio,
        "guide": dict(heads.guide.config) | {"use": type(heads.guide).__name__},
        "parameters": sum(p.numel() for p in heads.parameters()),
        "truncated_captions": heads.guide.truncated,
    }


def save_heads(heads: Alignment, folder: Path) -> None:
    """Write the heads to `folder`; safetensors and the config they were built from."""
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in heads.state_dict().items()}
    write_bytes(folder / HEADS_WEIGHTS, save(state))  # save_file's files are their owner's alone
    write_json(folder / HEADS_CONFIG, {"lgvq": asdict(heads.config)})


def load_heads(heads: Alignment, folder: Path) -> None:
    """Read heads from `folder`.

    Raises:
        ConfigError: if the file is missing, or other heads lie in it.
    """
    from safetensors.torch import load_file

    path = folder / HEADS_WEIGHTS
    if not path.is_file():
        raise ConfigError(f"no heads at {path}; expected what save_pretrained wrote")
    try:
        heads.load_state_dict(load_file(str(path)))
    except RuntimeError as error:
        raise ConfigError(f"{path} holds other heads than these: {error}") from error


# -- The contract with a host: find its quantizer, tap its codes, encode, attach and detach ------


__all__ = [
    "HEADS_CONFIG",
    "HEADS_WEIGHTS",
    "NAMES",
    "Handle",
    "HostMethods",
    "Tap",
    "add_heads",
    "attach",
    "build_alignment",
    "code_width",
    "codebook_of",
    "decode",
    "encode",
    "find_quantizer",
    "find_quantizers",
    "gets_quantizer",
    "grid_of",
    "is_average_of_heads",
    "listen",
    "load_heads",
    "reconstruct",
    "replace_module",
    "save_heads",
    "status",
    "stop_listening",
    "tapped",
    "undecayed_parameters",
]


@contextmanager
def tapped(
    host: nn.Module, quantizer: str | Sequence[str] | None = None, layout: str | None = None
) -> Iterator[Tap]:
    """Listen to the host's quantizer inside the context; LGVQLoss knows which, if it is on it."""
    loss = getattr(host, "loss", None)
    known = getattr(loss, "quantizer_path", None)
    grid, told = getattr(loss, "reading", (None, None))
    quantizers = find_quantizers(host, quantizer or known)
    tap = Tap(grid, layout=layout or told).install(quantizers)
    try:
        yield tap
    finally:
        tap.remove()


@torch.no_grad()
def encode(
    host: nn.Module,
    images: Tensor,
    *,
    quantizer: str | Sequence[str] | None = None,
    layout: str | None = None,
) -> Codes:
    """Return the codes of images.

    Args:
        host: any tokenizer; its mode (train or eval) stays as it is.
        images: (B, 3, H, W) float32 in [-1, 1], on the host's device.
        quantizer: its path, if it is not found by name, or the paths of several levels.
        layout: channels_first or channels_last, if it cannot be decided.

    Raises:
        ConfigError: if the quantizer cannot be found.
        RuntimeError: if the host does not call it.
    """
    with tapped(host, quantizer, layout) as tap:
        encoder: Any = getattr(host, "encode", None)
        if encoder is not None:
            encoder(images)
        if tap.codes is None:
            host(images)
        return tap.take()


@torch.no_grad()
def reconstruct(host: nn.Module, images: Tensor) -> Tensor:
    """Return the host's reconstructions of images, (B, 3, H, W) near [-1, 1], not clamped."""
    output: Any = host(images)
    while isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def decode(host: Any, codes: Tensor) -> Tensor:
    """Return images of code grids (B, C, h, w).

    Raises:
        ConfigError: if the host has no `decode`.
    """
    if not hasattr(host, "decode"):
        raise ConfigError(f"{type(host).__name__} has no decode(codes): its codes stay unseen")
    if "force_not_quantize" in inspect.signature(host.decode).parameters:  # diffusers
        return host.decode(codes, force_not_quantize=True).sample
    output = host.decode(codes)
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
