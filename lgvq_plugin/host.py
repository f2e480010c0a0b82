"""Connect LG-VQ with a host: attach to a model, or be adopted by the host that builds the loss.

`attach` returns a Handle for training loops of your own. LGVQLoss is adopted instead:
  self.loss = LGVQLoss(...)   -> await_host: which module gets me, and has it a quantizer?
  self.quantize = ...         -> it has now: hook it, and intercept the methods in HostMethods
"""

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .alignment import Alignment, Captions, build_guides
from .config import parse
from .encoder import SavedHeads, encode_codes, encode_text, evaluating, load_heads
from .guides.base import AbstractFrozenModel
from .quantizer_hook import (
    QuantizerHook,
    code_width,
    find_quantizer,
    is_hooked,
    require_quantizers,
)
from .sockets import ConfigError
from .types import Codes

logger = logging.getLogger(__name__)


# -- attach and detach ---------------------------------------------------------------------------


def attach(
    model: nn.Module,
    quantizer: str | Sequence[str] | None = None,
    *,
    optimizer: Any = None,
    **options: Any,
) -> "Handle":
    """Attach the objectives to any tokenizer, whose state dict and code stay unchanged.

    Args:
        model: the tokenizer.
        quantizer: path of its quantizer, found by name if None; a list for a model of several
            levels (VQ-VAE-2), whose codes one set of heads then sees side by side.
        optimizer: gets the heads as a new parameter group; if a scheduler is on it already, give
            `[optimizer, scheduler]`. If None, optimize `handle.parameters()` with the model.
        options: keys of the `lgvq:` block: recipe, objectives, guide, guides, code_vit, ...

    In your own LightningModule, attach in `__init__` once the quantizer exists, and make the heads
    a submodule, so that they are moved, averaged, synchronized and saved with the rest:

        self.handle = attach(self, guide={"use": "micro_clip"})
        self.heads = self.handle.heads          # configure_optimizers: self.parameters() has them
        ...                                     # training_step, after the model ran:
        loss = loss + self.handle.loss(batch["caption"])[0]

    In a plain DistributedDataParallel script do the same with the model before wrapping it.

    Raises:
        ConfigError: for a wrong option, or if the quantizer cannot be found or has heads already.

    >>> from lgvq_plugin.hosts.vqvae import VectorQuantizer
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))
    >>> handle = attach(model, "1", guide={"use": "micro_clip"})
    >>> _ = model(torch.randn(2, 3, 16, 16))
    >>> loss, log = handle.loss(["a red square", None])
    >>> loss.requires_grad, "train/lgvq/total" in log, handle.detach() is model
    (True, True, True)
    """
    quantizers = require_quantizers(model, quantizer)
    for name, module in quantizers.items():
        if is_hooked(module):
            raise ConfigError(f"{type(model).__name__}.{name} has heads already; detach them first")
    path = [*quantizers] if len(quantizers) > 1 else next(iter(quantizers))
    heads, hook = build_alignment({**options, "quantizer": path}, quantizers)
    host = list(model.parameters())
    if host:
        heads.to(host[0].device)
    if optimizer is not None:
        undecayed = undecayed_parameters(heads)
        add_heads(optimizer, list(heads.parameters()), host, undecayed=undecayed)
    handle = Handle(model, path, heads, hook, optimizer)
    logger.info("LG-VQ on %s.%s: %s", type(model).__name__, path, handle.trainable_parameters())
    return handle


class Handle:
    """What :func:`attach` returns: the heads of a model that you train in your own loop.

    Attributes:
        model: the host, unchanged but for one forward hook.
        heads: an `nn.Module` to optimize with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | list[str],
        heads: Alignment,
        hook: QuantizerHook,
        optimizers: Any = None,
    ) -> None:
        self.model, self.path, self.heads = model, path, heads
        self._hook, self._optimizers, self._step = hook, optimizers, 0

    def loss(
        self,
        captions: Captions | None,
        *,
        step: int | None = None,
        split: str = "train",
        images: Tensor | None = None,
        reconstructions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, log) for the model's last forward pass; add the loss to the model's own.

        Args:
            captions: one entry per image: a string, a list of strings, or None. None or [] if no
                objective needs captions.
            step: training step; counted here if None.
            split: prefix of the log's keys; nothing is trained unless it is "train".
            images: (B, 3, H, W) in [-1, 1], for `vision_alignment` and objectives of yours.
            reconstructions: (B, 3, H, W), for objectives of yours that read them.

        Raises:
            RuntimeError: see :meth:`QuantizerHook.take`; also after detach.
            ConfigError: if the number of captions is wrong, or images are needed and not given.
        """
        if not self._hook.enabled:
            return torch.zeros(()), {}
        codes = self._hook.take(host=self.model if split == "train" else None)
        if next(self.heads.parameters()).device != codes.codes.device:
            self.heads.to(codes.codes.device)
        now = self._step if step is None else step
        options: Any = {"step": now, "split": split, "balance": self._hook.balance}
        if self.heads.schedule.has_shares:
            total = self.heads.config.total_steps
            options["progress"] = (now, total) if total else progress_of(self.model)
        result = self.heads(
            codes, captions, images=images, reconstructions=reconstructions, **options
        )
        if step is None and split == "train":
            self._step += 1
        return result

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the heads' parameters, for your own optimizer."""
        return self.heads.parameters()

    def trainable_parameters(self) -> str:
        """Return one line: how many parameters train, and how many heads and host have."""
        heads = list(self.heads.parameters())
        ours = {id(p) for p in heads}
        host = [p for p in self.model.parameters() if id(p) not in ours]
        trained = sum(p.numel() for p in [*heads, *host] if p.requires_grad)
        of_heads, of_host = (sum(p.numel() for p in part) for part in (heads, host))
        return (
            f"trainable params: {trained:,} || heads params: {of_heads:,} || "
            f"host params: {of_host:,} || all params: {of_heads + of_host:,} || "
            f"trainable%: {100 * trained / (of_heads + of_host):.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT's models do."""
        print(self.trainable_parameters())

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return the heads as two groups for your own optimizer.

        Biases, norms, position embeddings and the temperature are in the second, without decay:

            AdamW([{"params": model.parameters()}, *handle.parameter_groups(weight_decay=0.05)])
        """
        exempt = {id(p) for p in undecayed_parameters(self.heads)}
        trained = [p for p in self.heads.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
        ]

    def disabled(self) -> AbstractContextManager[None]:
        """Train the model alone inside the context: `loss` returns 0."""
        return self._hook.paused()

    def status(self) -> dict[str, Any]:
        """Return what is attached where: quantizer, objectives and weights, parameters, guides."""
        return status(self.heads, self.path) | {"enabled": self._hook.enabled}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads alone with their config, as `lgvq export --format heads` does.

        Raises:
            ConfigError: if a weight is not finite; nothing is written.
        """
        SavedHeads.of(self.heads).write(folder)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what :meth:`save_pretrained` wrote; ConfigError if it is missing or other heads."""
        load_heads(self.heads, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        quantizer: str | Sequence[str] | None = None,
        **options: Any,
    ) -> "Handle":
        """Attach saved heads to the tokenizer they were trained with, as an encoder of it.

        Args:
            model: that tokenizer.
            folder: what :meth:`save_pretrained` or `lgvq export --format heads` wrote, or a
                repository `organization/name` of the Hugging Face hub.
            quantizer: path of its quantizer; None: the one that the heads had, or found by name.
            options: keys of the `lgvq:` block that replace the saved ones, such as `guide`.

        Raises:
            ConfigError: if the heads are missing, or do not fit the tokenizer.
        """
        return attach_saved(model, SavedHeads.read(folder), quantizer, **options)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return features of images in the guide's sentence space, as `global_semantic` has them.

        Nothing is trained, and codes that wait for :meth:`loss` are not touched.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, Ds) float32, of length 1.

        Raises:
            ConfigError: if there is no head of `global_semantic` (its weight is 0).
        """
        return encode_image(self.model, self.heads, images, quantizer=self.path, hook=self._hook)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the guide's features of B texts, (B, Ds) float32, of length 1.

        Their products with those of :meth:`encode_image` are cosines. Raises ConfigError as it
        does.
        """
        return encode_text(self.heads, texts)

    def detach(self) -> nn.Module:
        """Remove hook and heads from the model and the optimizer; returns the model."""
        self._hook.remove()
        remove_heads(self._optimizers, list(self.heads.parameters()))
        self._optimizers = None
        return self.model


def attach_saved(
    model: nn.Module,
    saved: SavedHeads,
    quantizer: str | Sequence[str] | None = None,
    **options: Any,
) -> Handle:
    """Attach heads with their tensors; ConfigError if they do not fit the tokenizer."""
    if saved.block is None:
        raise ConfigError(
            f"{saved.where}: the `lgvq:` block of its heads is unknown; attach(model, guide=..., "
            "...) with their settings, then load_pretrained"
        )
    block = {**saved.block, **options}
    quantizers = require_quantizers(model, quantizer or block.get("quantizer"))
    widths = [code_width(module) for module in quantizers.values()]
    width = None if None in widths else sum(width or 0 for width in widths)
    if width not in (None, saved.code_dim):
        where = f"{type(model).__name__}.{', '.join(quantizers)}"
        raise ConfigError(
            f"{saved.where}: its heads read codes of width {saved.code_dim}, those of {where} have "
            f"width {width}: they belong to another tokenizer, or to another of its quantizers "
            "(quantizer=PATH)"
        )
    if width is None and len(quantizers) == 1:
        block["code_dim"] = saved.code_dim
    block["grid"] = options.get("grid") or saved.grid_on(grid_of(model))
    block.pop("quantizer", None)
    handle = attach(model, [*quantizers], **block)
    try:
        saved.load_into(handle.heads)
    except ConfigError:
        handle.detach()
        raise
    return handle


def build_alignment(
    block: Mapping[str, Any] | None,
    quantizers: Mapping[str, nn.Module],
    grid: tuple[int, int] | None = None,
) -> tuple[Alignment, QuantizerHook]:
    """Build the heads for one or several quantizers from the `lgvq:` block, and hook those.

    Raises:
        ConfigError: if the block is wrong, or the width of a quantizer's codes is unknown.
    """
    config = parse(block)
    widths: dict[str, int] = {}
    for path, module in quantizers.items():
        width = config.code_dim or code_width(module)
        if width is None:
            raise ConfigError(
                f"lgvq.code_dim: the width of {type(module).__name__}'s codes is unknown; set it "
                "to the number of channels of the vectors that it returns"
            )
        widths[path] = width
    guide, vision = build_guides(config)
    heads = Alignment(config, guide, code_dim=sum(widths.values()), grid=grid, vision=vision)
    ratio, layout = config.gradient_ratio, config.layout
    return heads, QuantizerHook(
        quantizers, widths=widths, grid=config.grid or grid, ratio=ratio, layout=layout
    )


def progress_of(host: nn.Module | None) -> tuple[int, int] | None:
    """Return (steps done, steps in all) that a host's Lightning trainer counts.

    None if the host has no trainer, or one of unknown length.
    """
    trainer: Any = getattr(host, "_trainer", None)  # `trainer` raises where there is none
    if trainer is None:
        return None
    most: Any = getattr(trainer, "max_steps", -1)
    if most is not None and most > 0:
        return int(trainer.global_step), int(most)
    epochs, batches = getattr(trainer, "max_epochs", None), trainer.num_training_batches
    if epochs is None or epochs < 1 or not math.isfinite(batches) or batches < 1:
        return None
    # Optimizers count steps each, and accumulation spares some: batches are counted instead.
    done = trainer.current_epoch * batches + trainer.fit_loop.batch_idx
    return int(done), int(epochs * batches)


def status(heads: Alignment, path: str | list[str]) -> dict[str, Any]:
    """Describe attached heads in plain values."""
    return {
        "quantizer": path,
        "recipe": heads.config.recipe,
        "objectives": {name: heads.weight(name) for name in heads.objectives},
        "gradient_ratio": heads.config.gradient_ratio,
        "every": heads.config.every,
        "guide": _described(heads.guide),
        "vision_guide": _described(heads.vision),
        "parameters": sum(p.numel() for p in heads.parameters()),
        "truncated_captions": heads.guide.truncated if heads.guide else 0,
    }


def _described(guide: AbstractFrozenModel | None) -> dict[str, Any] | None:
    return None if guide is None else dict(guide.config) | {"use": type(guide).__name__}


# -- use any host --------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    host: nn.Module,
    images: Tensor,
    *,
    quantizer: str | Sequence[str] | None = None,
    layout: str | None = None,
    grid: tuple[int, int] | None = None,
) -> Codes:
    """Return the codes of images.

    Args:
        host: any tokenizer; its mode (train or eval) is not changed.
        images: (B, 3, H, W) float32 in [-1, 1], on the host's device.
        quantizer: its path, or paths of several levels; None asks the host's LGVQLoss, then
            searches by name.
        layout: channels_first or channels_last, if it cannot be decided.
        grid: (h, w), for a host whose codes are rows of another grid than a square.

    Raises:
        ConfigError: if the quantizer cannot be found; RuntimeError if the host does not call it.
    """
    loss = getattr(host, "loss", None)
    known_grid, configured = getattr(loss, "reading", (None, None))
    quantizers = require_quantizers(host, quantizer or getattr(loss, "quantizer_path", None))
    hook = QuantizerHook(quantizers, grid=grid or known_grid, layout=layout or configured)
    try:
        if hasattr(host, "encode"):
            host.encode(images)  # type: ignore[operator]
        if hook.codes is None:
            host(images)
        return hook.take()
    finally:
        hook.remove()


def encode_image(
    host: nn.Module,
    heads: Alignment,
    images: Tensor,
    *,
    quantizer: str | Sequence[str] | None,
    hook: QuantizerHook,
) -> Tensor:
    """Return features of images, (B, Ds), see :meth:`Handle.encode_image`.

    The host runs in evaluation mode, and gets its own mode back. Its codes are not recorded by
    `hook`, and torch's generators are left as they were.
    """
    if not (isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()):
        kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else images
        raise ConfigError(f"encode_image: expected floats (B, 3, H, W) in [-1, 1], got {kind!r}")
    like = next(host.parameters(), next(heads.parameters()))
    devices = [like.device] if like.device.type == "cuda" else []
    layout, grid = heads.config.layout, heads.config.grid
    with hook.paused(), evaluating(host), torch.random.fork_rng(devices):
        codes = encode(host, images.to(like), quantizer=quantizer, layout=layout, grid=grid)
    return encode_codes(heads, codes)


@torch.no_grad()
def reconstruct(host: nn.Module, images: Tensor) -> Tensor:
    """Return the host's reconstructions of images, (B, 3, H, W) near [-1, 1], not clamped."""
    output: Any = host(images)
    while isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def decode(host: Any, codes: Tensor) -> Tensor:
    """Return images of code grids (B, C, h, w); ConfigError if the host has no `decode`."""
    if not hasattr(host, "decode"):
        raise ConfigError(f"{type(host).__name__} has no decode(codes), so codes cannot be shown")
    if "force_not_quantize" in inspect.signature(host.decode).parameters:  # diffusers
        return host.decode(codes, force_not_quantize=True).sample
    output = host.decode(codes)
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


# -- be adopted ----------------------------------------------------------------------------------

# Torch has one hook for registrations of all modules; these losses wait for a host.
_WAITING: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod]" = weakref.WeakKeyDictionary()
_TORCH_HOOK: list[Any] = []


def await_host(loss: nn.Module, method: Callable[..., None]) -> None:
    """Call `method(parent, name, child)` whenever a module gets a submodule, while `loss` lives."""
    weakref.finalize(loss, _remove_if_unused).atexit = False  # before the entry: it runs after it
    _WAITING[loss] = weakref.WeakMethod(method)
    if not _TORCH_HOOK:
        _TORCH_HOOK.append(register_module_module_registration_hook(_on_registration))


def stop_awaiting_host(loss: nn.Module) -> None:
    """Unregister; remove the global hook when unused."""
    _WAITING.pop(loss, None)
    _remove_if_unused()


def _remove_if_unused() -> None:
    if not _WAITING and _TORCH_HOOK:
        _TORCH_HOOK.pop().remove()


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    for method in [reference() for reference in _WAITING.values()]:
        if method is not None:
            method(parent, name, child)


def gets_quantizer(
    parent: nn.Module, name: str, child: nn.Module | None, path: str | Sequence[str] | None
) -> nn.Module | None:
    """Return what `parent` will hold once `child` is in, if that includes the quantizer."""
    view = nn.Module()
    view._modules.update({**parent._modules, name: child})
    if path is None:
        return view if find_quantizer(view) else None
    roots = {each.split(".")[0] for each in ([path] if isinstance(path, str) else path)}
    return view if roots <= view._modules.keys() else None


def grid_of(host: nn.Module) -> tuple[int, int] | None:
    """Return (h, w) of the codes as a taming-style decoder knows it, else None."""
    shape = getattr(getattr(host, "decoder", None), "z_shape", None)
    if shape is None or len(shape) != 4 or min(shape[-2:]) < 1:
        return None
    return int(shape[-2]), int(shape[-1])


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `root` has `old`."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


LIGHTNING_STEPS = ("training_step", "validation_step", "test_step")


class HostMethods:
    """Stand-ins for methods of the host, through which batches and optimizers pass.

    They are partials of bound methods, as attributes of the instance: these survive copy.deepcopy
    and pickle.
    """

    def __init__(self, host: nn.Module, loss: Any):
        self.host, self.loss = host, loss
        names = ("get_input",) if hasattr(host, "get_input") else LIGHTNING_STEPS
        self.names = [n for n in (*names, "configure_optimizers") if hasattr(host, n)]
        for name in self.names:
            own = self._with_heads if name == "configure_optimizers" else self._with_batch
            setattr(host, name, partial(own, name))
        self.emas: list[HostEMA] = []
        # The host may build its EMA after its loss, so it is looked for whenever keys matter.
        self._hooks: list[Any] = [
            host.register_state_dict_pre_hook(self.find_emas),
            host.register_load_state_dict_pre_hook(self._drop_averaged_heads),
        ]

    def remove(self) -> None:
        """Restore the methods of the host and of its EMA."""
        self.find_emas()
        for part in (*self._hooks, *self.emas):
            part.remove()
        self.emas = []
        for name in self.names:
            own = getattr(vars(self.host).get(name), "func", None)
            if getattr(own, "__self__", None) is self:
                delattr(self.host, name)

    def find_emas(self, *unused: Any) -> None:
        """Keep the heads out of the EMAs that the host has of itself by now."""
        known = {id(ema.module) for ema in self.emas}
        for module in self.host.modules():
            if isinstance(vars(module).get("m_name2s_name"), dict) and id(module) not in known:
                self.emas.append(HostEMA(module, self.host, self.loss))

    def _drop_averaged_heads(
        self, host: nn.Module, state: dict[str, Any], prefix: str, *unused: Any
    ) -> None:
        """Accept early checkpoints, whose `model_ema.*` included the heads."""
        self.find_emas()
        for key in [k for k in state if is_average_of_heads(k.removeprefix(prefix))]:
            del state[key]

    def _with_batch(self, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.find_emas()
        self.loss.receive(batch)
        own = getattr(type(self.host), name).__get__(self.host)
        return _call_as_declared(own, batch, *args, **kwargs)

    def _with_heads(self, name: str) -> Any:
        self.find_emas()
        return self.loss.add_heads(getattr(type(self.host), name)(self.host))


def _call_as_declared(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Drop arguments that `method` does not take.

    Lightning passes a batch index only if the signature has one; our stand-in takes everything.
    """
    parameters = inspect.signature(method).parameters
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        taken = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        args = args[: sum(kind in taken for kind in kinds)]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        kwargs = {key: value for key, value in kwargs.items() if key in parameters}
    return method(*args, **kwargs)


def is_average_of_heads(key: str) -> bool:
    """Whether a host's EMA of itself (LitEma) has a head at `key`; it leaves the dots out.

    >>> is_average_of_heads("model_ema.losslgvqcode_vitcls"), is_average_of_heads("loss.lgvq.a")
    (True, False)
    """
    return key.startswith("model_ema.") and "losslgvq" in key.replace(".", "")


class HostEMA:
    """Stand-ins for methods of a LitEma, which see the host without our heads.

    LitEma is latent-diffusion's, and SEED-Voken's and others': `m_name2s_name` maps names of
    parameters to those of buffers; `forward(model)` and `copy_to(model)` iterate over
    `model.named_parameters()`. Its buffers for the heads, `loss.lgvq`, are removed.
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
                setattr(module, name, partial(self._without_heads, name))

    def remove(self) -> None:
        """Restore the EMA's own methods."""
        for name in self.METHODS:
            vars(self.module).pop(name, None)

    def _without_heads(self, name: str, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modules = self.loss._modules if model is self.host else {}
        kept = dict(modules)
        modules.pop("lgvq", None)
        try:
            return getattr(type(self.module), name)(self.module, model, *args, **kwargs)
        finally:
            modules.clear()
            modules.update(kept)


# -- the heads' parameter group ------------------------------------------------------------------

# Attributes of schedulers that hold one entry per parameter group.
PER_GROUP = (
    *("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"),
    "_last_lr",
)


def add_heads(
    result: Any,
    heads: Sequence[nn.Parameter],
    host: Sequence[nn.Parameter],
    *,
    undecayed: Iterable[nn.Parameter] = (),
) -> Any:
    """Add `heads` to the optimizer in `result` that trains most of `host`.

    Their group copies the group that holds most of the host: learning rate, weight decay and
    schedule. If that one has a weight decay, `undecayed` go into a second group without. Optimizer
    states saved without the heads, or with all heads in one group, still load; schedulers restored
    from such a state get the missing entries at the next step.

    Args:
        result: what `configure_optimizers` returns: an optimizer, a list, a dict, (list, list);
            it is changed in place and returned.
        heads: parameters of the heads; those that an optimizer already has are skipped.
        host: parameters of quantizer, encoder and decoder.
        undecayed: those of `heads` without weight decay, see :func:`undecayed_parameters`.

    Raises:
        ConfigError: if no optimizer trains the host, or a scheduler that is not in `result`
            already drives the one that does.
    """
    optimizers = list(_of_type(result, Optimizer))
    wanted = {id(p) for p in host}
    held = [sum(_share(optimizer, wanted)) for optimizer in optimizers]
    if not any(held):
        raise ConfigError(
            f"no optimizer among {len(optimizers)} trains the host's parameters, so the heads "
            "would never learn; pass the heads' parameters to your optimizer yourself"
        )
    optimizer = optimizers[held.index(max(held))]
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    fresh = [p for p in heads if p.requires_grad and id(p) not in known]
    if not fresh:
        return result
    schedulers = [s for s in _of_type(result, LRScheduler) if s.optimizer is optimizer]
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            "a learning rate scheduler already drives the optimizer, and would not know the new "
            "group; add the heads before building it, or give both: [optimizer, scheduler]"
        )
    shares, first = _share(optimizer, wanted), len(optimizer.param_groups)
    index, exempt = shares.index(max(shares)), {id(p) for p in undecayed}
    model = optimizer.param_groups[index]
    names = {id(p): f"lgvq.{i}" for i, p in enumerate(fresh)}
    is_decayed = bool(model.get("weight_decay"))
    for is_spared in (False, True):
        part: list[Any] = [p for p in fresh if (is_decayed and id(p) in exempt) == is_spared]
        own = {"weight_decay": 0.0} if is_spared else {}
        if "param_names" in model:
            part = [(names[id(p)], p) for p in part]
        if part:
            optimizer.add_param_group({**_settings(model), **own, "params": part})
    older = OlderStates(first, index, heads=fresh, exempt=exempt, schedulers=schedulers)
    optimizer.register_load_state_dict_pre_hook(older.accept)
    if schedulers:
        optimizer.register_step_pre_hook(older.extend)
        older.extend(optimizer)
    return result


def remove_heads(result: Any, heads: Sequence[nn.Parameter]) -> None:
    """Remove the heads; under a scheduler, which counts groups, an empty group stays."""
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
        of_states = optimizer._optimizer_load_state_dict_pre_hooks
        for hooks in (of_states, optimizer._optimizer_step_pre_hooks):
            for key, hook in [*hooks.items()]:
                if isinstance(getattr(hook, "__self__", None), OlderStates):
                    del hooks[key]


def undecayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that weight decay would only distort.

    These are biases, norms and temperatures (fewer than two dimensions), and learned tokens:
    position embeddings, [CLS], mask tokens (first dimension 1) and embeddings.

    >>> layers = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> [tuple(p.shape) for p in undecayed_parameters(layers)]
    [(2,), (2,), (2,)]
    """
    return [
        parameter
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if parameter.ndim < 2
        or isinstance(part, nn.Embedding)
        or (parameter.ndim >= 3 and parameter.shape[0] == 1)
    ]


def _share(optimizer: Optimizer, wanted: set[int]) -> list[int]:
    """Count the wanted parameters in each group."""
    return [sum(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group, including those that a scheduler keeps there."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


class OlderStates:
    """Restores optimizer and schedulers from a run with other groups of heads, or none.

    Args:
        first: index of the heads' first group.
        model: index of the host's group that the heads' groups follow.
        heads: in the order of earlier runs, which had them in one group.
        exempt: ids of those without weight decay.
        schedulers: those of the optimizer.
    """

    def __init__(
        self, first: int, model: int, *, heads: Any, exempt: set[int], schedulers: list[Any]
    ) -> None:
        self.first, self.model, self.schedulers = first, model, schedulers
        self.one_group = [id(p) for p in heads]
        self.two_groups = sorted(self.one_group, key=lambda each: each in exempt)  # stable

    def accept(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Give a saved state the groups of `optimizer`; a load_state_dict pre-hook."""
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
            kept = {k: group[k] for k in ("param_names",) if k in group}
            if not group.get("weight_decay", 1.0):
                kept["weight_decay"] = group["weight_decay"]
            params = [number_of[id(p)] for p in group["params"]]
            groups.append({**settings, **kept, "params": params})
        return {**state, "param_groups": [*saved[: self.first], *groups, *rest]}

    def extend(self, optimizer: Optimizer, *unused: Any) -> None:
        """Give the schedulers an entry for each group; an optimizer's step pre-hook."""
        count = len(optimizer.param_groups)
        for scheduler in self.schedulers:
            for name in PER_GROUP:
                kept = getattr(scheduler, name, None)
                if isinstance(kept, list) and self.model < len(kept) < count:
                    kept.extend(kept[self.model] for _ in range(count - len(kept)))


def _of_type(node: Any, kind: type) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
        node = getattr(node, "_schedulers", ())  # SequentialLR, ChainedScheduler
    if isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _of_type(value, kind)
