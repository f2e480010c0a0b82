"""LGVQLoss: the host's own loss plus the weighted objectives of LG-VQ."""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .alignment import Alignment, Captions, zero_of
from .compat import build_loss
from .config import LGVQConfig, parse, require_finite_weights, to_plain
from .encoder import encode_text
from .functional import (
    LARGEST_GRADIENT,
    MAX_SKIPPED,
    all_finite,
    drop_gradients,
    nonfinite_gradients,
    world_size,
)
from .host import (
    HostMethods,
    add_heads,
    await_host,
    build_alignment,
    encode_image,
    gets_quantizer,
    grid_of,
    progress_of,
    replace_module,
    status,
    stop_awaiting_host,
    undecayed_parameters,
)
from .quantizer_hook import QuantizerHook, require_quantizers
from .sockets import ConfigError, params_of

logger = logging.getLogger(__name__)

GUIDES = {"guide": "guide", "vision_guide": "image guide"}  # key of a status: in words
CAPTION_KEYS = ("caption", "captions", "text", "txt")


class BaseLossWrapper(nn.Module):
    """A module that stands in for another one, its base loss.

    Both share the dicts of parameters, buffers and submodules. Other attributes are read from the
    wrapper first, then from the base loss. An assignment reaches the base loss only if that has the
    name, or its code reads it, and neither this object nor its class has it: a host's
    `loss.disc_weight = 1` arrives, `self.new_state = 3` stays here.
    """

    def __init__(self, base_loss: nn.Module) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = base_loss.__dict__[name]
        self.__dict__["base_loss"] = base_loss  # no submodule: its parts are ours already

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_loss" not in self.__dict__:
                raise
            return getattr(self.base_loss, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base: Any = self.__dict__.get("base_loss")
        is_ours = base is None or name in self.__dict__ or hasattr(type(self), name)
        if not is_ours and (hasattr(base, name) or name in _names_in_code(base.__class__)):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "BaseLossWrapper":
        """Set the mode of the base loss, its parts and ours."""
        super().train(mode)
        self.base_loss.training = mode
        return self


@functools.cache
def _names_in_code(cls: type) -> frozenset[str]:
    """Return the names that the methods of a class mention, those of nn.Module excepted."""
    found: set[str] = set()
    methods = (m for c in cls.__mro__ if c not in nn.Module.__mro__ for m in vars(c).values())
    for code in (method.__code__ for method in methods if hasattr(method, "__code__")):
        strings = (each for each in code.co_consts if isinstance(each, str))
        found.update(code.co_names, filter(str.isidentifier, strings))  # getattr(self, "factor", 1)
    return frozenset(found)


class LGVQLoss(BaseLossWrapper):
    """The host's loss with the three objectives of LG-VQ on top.

    A host's checkpoints, EMA copies and optimizers see the base loss's parameters under their own
    names (`discriminator`, `perceptual_loss`, ...); the heads are under `lgvq.`.

    Args:
        args, kwargs: arguments of the base loss.
        base: `{target, params}` of the base loss; taming's VQLPIPSWithDiscriminator if None.
        lgvq: the `lgvq:` block, see `config.LGVQConfig`.

    Attributes:
        latest: what our terms logged last.
        checks_gradients: check gradients before each step of the optimizer; set to False by a
            trainer that does so itself.
        total_steps: length of the run, set by a trainer that is not Lightning's.

    Raises:
        ConfigError: for an unknown key under `lgvq:`, or a base loss that does not exist.

    >>> loss = LGVQLoss(base={"target": "torch.nn.MSELoss"}, lgvq={"recipe": "paper"})
    >>> float(loss(torch.zeros(2), torch.ones(2)))  # no host: the base loss alone
    1.0
    """

    BASE_TARGET = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"

    # Defaults are on the class, so that __setattr__ keeps assignments of these names on this
    # object even if the base loss has an attribute of the same name.
    latest: Mapping[str, Tensor] = {}
    checks_gradients = True
    total_steps: int | None = None
    _config = LGVQConfig()
    _block: Mapping[str, Any] = {}  # the config as given
    _ancestors: tuple[nn.Module, ...] = ()  # modules that contain this loss so far
    _host: nn.Module | None = None
    _hook: QuantizerHook | None = None
    _methods: HostMethods | None = None
    _path: tuple[str, ...] = ()
    _captions: Captions | None = None  # of the batch that comes next
    _step = 0  # counted here where the host's calls have no global_step
    _optimizer_check: "OptimizerCheck | None" = None
    _gradient_check: "GradientCheck | None" = None
    _discriminator_first: dict[bool, bool] = {}  # by is_training: validation may have another order
    _is_confirmed = False  # whether the complete host was searched for its quantizer
    _has_warned = False  # whether this loss without a host has said so

    def __init__(
        self,
        *args: Any,
        base: Mapping[str, Any] | None = None,
        lgvq: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        block = to_plain(lgvq or {})
        config = parse(block)
        target, params = base_of(base, kwargs, self.BASE_TARGET)
        require_finite_weights(params, target.rpartition(".")[2])
        super().__init__(build_loss(target, args, params))
        self._config, self._block = config, block
        self._discriminator_first = {}
        self.register_load_state_dict_post_hook(_allow_missing_heads)
        await_host(self, self._on_registration)

    @property
    def alignment(self) -> Alignment | None:
        """The heads, once a host has adopted this loss; None if all weights are 0."""
        return self._modules.get("lgvq")  # type: ignore[return-value]

    # -- the loss ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the base loss returns, our terms added on the generator's pass.

        Raises:
            RuntimeError: if the quantizer did not run before, or no optimizer trains the heads.
            FloatingPointError: for a term that is not finite.
        """
        result = self.base_loss(*args, **kwargs)
        heads, hook = self.alignment, self._hook
        if heads is None or hook is None:
            self._require_host_or_warn()
            return result
        if not hook.enabled:
            return result
        if not self._is_confirmed:
            self.require_host()
        call = _bound_arguments(self.base_loss.forward, args, kwargs)
        is_generator = int(call.get("optimizer_idx", 0)) == 0
        is_training = self.training and torch.is_grad_enabled()
        discriminator_first = self._discriminator_first.setdefault(is_training, not is_generator)
        if is_generator:
            terms, self.latest = self._terms(heads, hook, call, is_training)
            return _add_terms(result, terms, self.latest)
        if discriminator_first:  # the generator's loss follows, on a new forward pass
            hook.expect_new_pass()
        else:  # the discriminator's own forward pass recorded codes that nothing will use
            hook.forget()
            self._captions = None
        if is_training and world_size() > 1:
            return _add_terms(result, zero_of(heads), {})
        return result

    def _terms(
        self, heads: Alignment, hook: QuantizerHook, call: Mapping[str, Any], is_training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        split = str(call.get("split", "train" if self.training else "val"))
        captions, self._captions = self._captions, None
        needs_gradient = is_training and (captions is not None or heads.works_without_captions)
        codes = hook.take(host=self._host if needs_gradient else None)
        step = call.get("global_step")
        if step is None:
            step = self._step
            if split == "train":
                self._step += 1
        if is_training and self._host is not None:
            if self._optimizer_check is None:
                self._optimizer_check = OptimizerCheck(heads, self._host_parameters)
            self._optimizer_check.raise_if_failed()
            if self.checks_gradients and self._gradient_check is None:
                self._gradient_check = GradientCheck(heads, self._host, self.on_nonfinite)
        captions = [None] * len(codes.codes) if captions is None else captions
        total = self._config.total_steps or self.total_steps
        options: Any = {"step": int(step), "split": split, "balance": hook.balance}
        if heads.schedule.has_shares:
            options["progress"] = (int(step), total) if total else progress_of(self._host)
        images, reconstructions = call.get("inputs"), call.get("reconstructions")
        return heads(codes, captions, images=images, reconstructions=reconstructions, **options)

    def set_captions(self, captions: Captions | None) -> None:
        """Give the captions of the batch that comes next; None for a batch without."""
        self._captions = captions

    def disabled(self) -> AbstractContextManager[None]:
        """Compute the base loss alone inside the context."""
        return self._hook.paused() if self._hook is not None else nullcontext()

    def encode_image(self, images: Tensor) -> Tensor:
        """Return features of images in the guide's space, see :meth:`.host.Handle.encode_image`."""
        heads, hook, host = self._trained_heads()
        return encode_image(host, heads, images, quantizer=self.quantizer_path, hook=hook)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the guide's features of texts, see :meth:`.host.Handle.encode_text`."""
        return encode_text(self._trained_heads()[0], texts)

    def _trained_heads(self) -> tuple[Alignment, QuantizerHook, nn.Module]:
        heads, hook, host = self.alignment, self._hook, self._host
        if host is not None and heads is not None and hook is not None:
            return heads, hook, host
        if host is None and is_on(self._config):
            raise RuntimeError("no host has this loss yet, so there are no heads; build it first")
        raise ConfigError("no heads: all weights under lgvq.objectives are 0, or it is detached")

    # -- adoption ----------------------------------------------------------------------------

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        """Adopt the first module that contains both this loss and a quantizer."""
        if child is self or any(child is known for known in self._ancestors):
            self._ancestors = (*self._ancestors, parent)
        if any(parent is known for known in self._ancestors):
            complete = gets_quantizer(parent, name, child, self._config.quantizer)
            if complete is not None:
                self.adopt(parent, search_in=complete)

    def adopt(self, host: nn.Module, *, search_in: nn.Module | None = None) -> None:
        """Hook `host`'s quantizer and build the heads; automatic when a host takes this loss.

        Raises:
            ConfigError: if the quantizer cannot be found.
        """
        if self._host is not None:
            return
        is_active, path = is_on(self._config), self._config.quantizer
        quantizers = require_quantizers(search_in or host, path) if is_active else {}
        stop_awaiting_host(self)
        self.__dict__["_host"] = host  # no submodule: the host contains this loss
        self._ancestors, self._path = (), (*quantizers,)
        if not is_active:
            return
        grid = self._config.grid or grid_of(host)
        heads, self._hook = build_alignment(self._block, quantizers, grid)
        parameter = next((p for q in quantizers.values() for p in q.parameters()), None)
        self._modules["lgvq"] = heads.to(parameter.device) if parameter is not None else heads
        self._methods = HostMethods(host, self)
        where = f"{type(host).__name__}.{', '.join(self._path)}"
        logger.info("LG-VQ on %s: %s", where, in_words(self.status()))

    def detach(self) -> nn.Module:
        """Restore the host's own loss and methods; returns that loss.

        The heads are gone from the host; an optimizer that holds them steps the host as before.
        """
        stop_awaiting_host(self)
        for part in (self._hook, self._optimizer_check, self._gradient_check, self._methods):
            if part is not None:
                part.remove()
        if self._host is not None:
            replace_module(self._host, self, self.base_loss)
        for name in vars(self).keys() - vars(self.base_loss).keys() - {"base_loss"}:
            if not hasattr(type(self), name):  # the host gave it to its loss, which has gone
                setattr(self.base_loss, name, vars(self)[name])
        self._modules.pop("lgvq", None)
        self._hook = self._optimizer_check = self._gradient_check = self._methods = None
        self._captions, self._has_warned = None, True
        return self.base_loss

    def require_host(self) -> None:
        """Raise ConfigError if no quantizer is found in the host that has this loss."""
        if not is_on(self._config):
            return
        if self._host is not None:
            require_quantizers(self._host, self._config.quantizer)  # now that it is complete
            if self._methods is not None:
                self._methods.find_emas()
            self._is_confirmed = True
        elif self._ancestors:
            require_quantizers(self._ancestors[-1], self._config.quantizer)

    def _require_host_or_warn(self) -> None:
        if is_on(self._config) and not self._has_warned:
            self._has_warned = True
            self.require_host()
            stop_awaiting_host(self)
            logger.warning(
                "LGVQLoss has no host with a quantizer: it computes the base loss alone; "
                "name the quantizer (lgvq.quantizer: PATH), or call loss.adopt(model)"
            )

    # -- the host's batches and optimizers, see HostMethods ----------------------------------

    def receive(self, batch: Any) -> None:
        """Take the captions of a batch that the host is about to use; see `captions_of`."""
        self._follow()
        reads_text = self.alignment is None or self.alignment.guide is not None
        key = self._config.caption_key if reads_text else None
        self.set_captions(captions_of(batch, key))

    def require_captions(self, batch: Any) -> None:
        """Raise ConfigError if there are heads, and `batch` has no captions."""
        if self.alignment is not None and self.alignment.needs_captions:
            require_captions(batch, self._config.caption_key)

    def add_heads(self, optimizers: Any) -> Any:
        """Add the heads to the one of `optimizers` that trains the host, else ConfigError."""
        self._follow()
        heads, host = self.alignment, self._host_parameters
        if heads is None:
            return optimizers
        undecayed = undecayed_parameters(heads)
        return add_heads(optimizers, list(heads.parameters()), host, undecayed=undecayed)

    def _follow(self) -> None:
        """Hook the quantizer that the host has now: GumbelVQ, built on VQModel, replaces it."""
        if self._hook is not None and self._host is not None:
            if not self._is_confirmed:
                self.require_host()
            self._hook.follow(self._host)

    @property
    def _host_parameters(self) -> list[nn.Parameter]:
        ours = {id(p) for p in self.parameters()}
        host = self._host.parameters() if self._host is not None else ()
        return [p for p in host if id(p) not in ours]

    # -- what is attached --------------------------------------------------------------------

    @property
    def on_nonfinite(self) -> str:
        """What to do on NaN/inf in a term or a gradient: "raise" or "skip"."""
        return self._config.on_nonfinite

    @property
    def measured_ratio(self) -> Tensor | None:
        """Gradient ratio before rescaling in the last backward pass, which the next step logs."""
        balance = None if self._hook is None else self._hook.balance
        return None if balance is None else balance.measured

    @measured_ratio.setter
    def measured_ratio(self, value: Tensor | None) -> None:
        if self._hook is not None and self._hook.balance is not None:
            self._hook.balance.measured = value

    @property
    def quantizer_path(self) -> str | list[str] | None:
        """Path of the host's quantizer, or None before a host has adopted this loss."""
        return [*self._path] if len(self._path) > 1 else next(iter(self._path), None)

    @property
    def reading(self) -> tuple[tuple[int, int] | None, str | None]:
        """The configured grid and layout of the quantized vectors; None where detected."""
        return self._config.grid, self._config.layout

    def status(self) -> dict[str, Any]:
        """Return what is attached where, in plain values."""
        if self.alignment is None or self._hook is None:
            return {"quantizer": self.quantizer_path, "objectives": {}, "parameters": 0}
        path = self.quantizer_path or ""
        return status(self.alignment, path) | {"enabled": self._hook.enabled}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold no batch and no pending check.
        dropped = ("_captions", "_optimizer_check", "_gradient_check", "latest")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}


def captions_of(batch: Any, key: str | None) -> Captions | None:
    """Return the captions of a batch, at `key` or one of the usual keys; None if it has none.

    Raises:
        ConfigError: if `key` is missing, or there is no list at it.
    """
    if not isinstance(batch, Mapping):
        if key is None:
            return None
        kind = type(batch).__name__
        raise ConfigError(f"lgvq.caption_key: {key!r} needs a batch with keys, got a {kind}")
    if key is not None and key not in batch:
        known = ", ".join(map(str, batch))
        raise ConfigError(f"lgvq.caption_key: the batch has no {key!r}; it has {known}")
    found = next((batch[k] for k in ((key,) if key else CAPTION_KEYS) if k in batch), None)
    if found is not None and (isinstance(found, str) or not hasattr(found, "__len__")):
        raise ConfigError(
            f"captions of a batch must be a list with one entry per image, got {found!r:.80}"
        )
    return found


def require_captions(batch: Any, key: str | None) -> None:
    """Raise ConfigError if `batch` has no captions."""
    if captions_of(batch, key) is None:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            f"a batch with no captions: expected one of {', '.join(CAPTION_KEYS)} among its keys, "
            f"got {keys}; name theirs with lgvq.caption_key, give --data FOLDER (images with "
            "captions; taming's own data sets have none), or train the host's own loss"
        )


def is_on(config: LGVQConfig) -> bool:
    """Whether any objective has a weight."""
    return any(own.weight > 0 for _, own in config.objectives.items())


def in_words(status: Mapping[str, Any]) -> str:
    """Return `LGVQLoss.status()` as one line.

    >>> in_words({"recipe": "paper", "objectives": {"masked_text": 0.01}, "parameters": 15,
    ...           "gradient_ratio": 4.0, "every": 5, "guide": {"use": "CLIP"}})
    'masked_text x 0.01, gradient ratio 4, every 5 batches, recipe paper, guide CLIP, 15 parameters'
    """
    ratio = status["gradient_ratio"]
    return ", ".join([
        *(f"{name} x {weight:g}" for name, weight in status["objectives"].items()),
        *([] if ratio is None else [f"gradient ratio {ratio:g}"]),
        *([f"every {status['every']} batches"] if status["every"] > 1 else []),
        f"recipe {status['recipe']}",
        *(f"{words} {guide['use']}" for key, words in GUIDES.items() if (guide := status.get(key))),
        f"{status['parameters']:,} parameters",
    ])  # fmt: skip


def base_of(
    base: Mapping[str, Any] | None, kwargs: dict[str, Any], default: str
) -> tuple[str, dict[str, Any]]:
    """Return (target, params) of the base loss; `kwargs` override the params of `base`."""
    if base is None:
        return default, kwargs
    if not isinstance(base, Mapping) or not isinstance(base.get("target"), str):
        raise ConfigError(f"base: expected a mapping with a `target:`, got {base!r}")
    return base["target"], {**to_plain(params_of(base, "base")), **kwargs}


def _bound_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments by the names of the base loss: hosts disagree on the positions.

    >>> _bound_arguments(lambda qloss, x, optimizer_idx, **more: 0, (0.1, 0.2, 1), {"step": 5})
    {'qloss': 0.1, 'x': 0.2, 'optimizer_idx': 1, 'step': 5}
    """
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return dict(bound)


def _add_terms(result: Any, terms: Tensor, log: Mapping[str, Tensor]) -> Any:
    """Add to what a base loss returns: a scalar, (loss, log, ...), (loss, ...), {"loss": ...}.

    >>> _add_terms((torch.tensor(1.0), {"a": 2}), torch.tensor(3.0), {"b": 4})
    (tensor(4.), {'a': 2, 'b': 4})
    """
    if isinstance(result, Mapping):
        return {**result, "loss": result["loss"] + terms, **log}
    if not isinstance(result, tuple):
        return result + terms
    first, *rest = result
    if rest and isinstance(rest[0], Mapping):
        rest[0] = {**rest[0], **log}
    return (first + terms, *rest)


def _allow_missing_heads(module: nn.Module, incompatible: Any) -> None:
    """Accept a host's own checkpoint, which has no heads, also when loading strictly."""
    missing = incompatible.missing_keys
    heads = module._modules.get("lgvq")
    ours = [key for key in missing if ".lgvq." in f".{key}"]
    if heads is not None and len(ours) == len(heads.state_dict()):
        for key in ours:
            missing.remove(key)
        logger.info("the checkpoint has no LG-VQ heads; they start from their seed")


class StepCheck:
    """Sees every step of every optimizer, through torch's global hook, until it is removed."""

    def __init__(self, heads: nn.Module, register: Callable[..., Any]) -> None:
        self.heads = {id(p) for p in heads.parameters() if p.requires_grad}
        this = weakref.ref(self)  # torch's hook must not keep the check alive

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            check = this()
            if check is not None:
                check.see([p for group in optimizer.param_groups for p in group["params"]])

        self._handle: Any = register(hook)
        weakref.finalize(self, self._handle.remove).atexit = False

    def see(self, held: list[nn.Parameter]) -> None:
        """Look at one step of an optimizer that holds these parameters."""
        raise NotImplementedError

    def remove(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


class OptimizerCheck(StepCheck):
    """Checks, once, that the optimizers that step the host hold the heads too."""

    def __init__(self, heads: nn.Module, host: list[nn.Parameter]) -> None:
        super().__init__(heads, register_optimizer_step_post_hook)
        self.host = {id(p) for p in host}
        self.stepped: set[int] = set()

    def see(self, held: list[nn.Parameter]) -> None:
        """Remember which parameters were stepped."""
        self.stepped |= {id(p) for p in held}

    def raise_if_failed(self) -> None:
        """Raise RuntimeError if the first step that moved the host left out the heads."""
        if self._handle is None or not self.stepped & (self.host | self.heads):
            return
        if not self.heads <= self.stepped:
            self.stepped = set()  # so that training continues once it is fixed
            raise RuntimeError(
                "the optimizer that trains the host does not hold the heads of LG-VQ, so they "
                "would never learn; call loss.add_heads(optimizer) after building it"
            )
        self.remove()


class GradientCheck(StepCheck):
    """Checks the gradients of the optimizer that holds the heads, before each of its steps.

    A trainer with a GradScaler steps only with finite gradients: this check then never acts.

    Args:
        heads: those of the host's loss; their gradients are dropped before steps without a term.
        host: names the parameters in messages.
        on_nonfinite: "raise", or "skip": leave the update out, at most MAX_SKIPPED in a row.
    """

    def __init__(self, heads: Alignment, host: nn.Module, on_nonfinite: str) -> None:
        super().__init__(heads, register_optimizer_step_pre_hook)
        self.alignment, self.host, self.on_nonfinite = heads, host, on_nonfinite
        self.steps = self.skipped = 0

    def see(self, held: list[nn.Parameter]) -> None:
        """Raise FloatingPointError, or drop all gradients, if one is not finite."""
        if not any(id(p) in self.heads for p in reversed(held)):
            return
        self.steps += 1
        acted, self.alignment.acted = self.alignment.acted, False
        if not acted and world_size() > 1:  # zeros, by which momentum would move the heads
            drop_gradients(self.alignment)
        gradients = [p.grad for p in held if p.grad is not None]
        if all_finite(gradients, limit=LARGEST_GRADIENT):
            self.skipped = 0 if acted else self.skipped
            return
        self.skipped += 1
        problem = f"update {self.steps}: the gradient is {nonfinite_gradients(self.host, held)}"
        if self.on_nonfinite == "raise" or self.skipped >= MAX_SKIPPED:
            often = f" ({self.skipped} updates in a row)" if self.skipped > 1 else ""
            raise FloatingPointError(
                f"{problem}{often}; no weight was updated with it. Lower the learning rate or the "
                "weight of that term"
            )
        logger.warning("%s; this update is left out", problem)
        for parameter in held:
            parameter.grad = None
