"""Small parts of LGVQLoss: the check of the optimizer, a view of modules, adding terms."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .alignment import Alignment, Captions, zero_of
from .compat import build_loss
from .config import LGVQConfig, parse, require_finite_weights, to_plain
from .finite import MOST_SKIPPED, all_finite, nonfinite_gradients
from .functional import world_size
from .host import (
    HostMethods,
    Tap,
    add_heads,
    build_alignment,
    find_quantizers,
    gets_quantizer,
    grid_of,
    listen,
    replace_module,
    status,
    stop_listening,
    undecayed_parameters,
)
from .sockets import ConfigError, params_of

logger = logging.getLogger(__name__)

CAPTION_KEYS = ("caption", "captions", "text", "txt")


class Reference:
    """Holds a module without making it a submodule; survives copies and pickles."""

    def __init__(self, module: nn.Module):
        self.module = module


class Wrapper(nn.Module):
    """Stands for another module: its parameters, buffers, submodules and other attributes.

    Attributes set before :meth:`wrap` are the wrapper's own; all later ones are the other's.
    """

    def wrap(self, module: nn.Module) -> None:
        """Share the very dicts of `module`: whatever it or a host puts into one is in both."""
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = module.__dict__[name]
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self._base = Reference(module)

    @property
    def base_loss(self) -> nn.Module:
        """The host's own loss; its submodules are also this module's."""
        return self.__dict__["_base"].module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_base" not in self.__dict__:
                raise
            return getattr(self.base_loss, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_base" not in self.__dict__ or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.base_loss, name, value)

    def train(self, mode: bool = True) -> "Wrapper":
        """Set the mode of the base loss, its parts and ours."""
        super().train(mode)
        self.base_loss.training = mode
        return self


class OptimizerCheck:
    """Looks, once, whether the optimizers that step the host hold the heads too."""

    def __init__(self, heads: Iterable[nn.Parameter], host: Iterable[nn.Parameter]):
        self.heads = {id(p) for p in heads if p.requires_grad}
        self.host = {id(p) for p in host}
        self.stepped: set[int] = set()
        this = weakref.ref(self)  # torch's hook must keep no check alive
        self._hook: Any = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: _record(this(), optimizer)
        )
        weakref.finalize(self, self._hook.remove).atexit = False

    def remove(self) -> None:
        """Watch no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def raise_if_failed(self) -> None:
        """Called once a batch; settles the question after the first step that moved the host."""
        if self._hook is None or not self.stepped & (self.host | self.heads):
            return
        if not self.heads <= self.stepped:
            self.stepped = set()  # whoever mends it goes on
            raise RuntimeError(
                "the optimizer that trains the host does not hold the heads of LG-VQ, so they "
                "would never learn; call loss.add_heads(optimizer) after building it"
            )
        self.remove()


def _record(check: OptimizerCheck | None, optimizer: torch.optim.Optimizer) -> None:
    if check is not None:
        check.stepped |= {id(p) for group in optimizer.param_groups for p in group["params"]}


class GradientCheck:
    """Looks at the gradients of the optimizer that holds the heads, before each of its steps.

    A trainer with a GradScaler calls the step only with finite gradients: this then never acts.

    Args:
        host: names the parameters in messages.
        heads: of the host's loss.
        on_nonfinite: "raise", or "skip": leave the update out, MOST_SKIPPED in a row at the most.
    """

    def __init__(self, host: nn.Module, heads: nn.Module, on_nonfinite: str):
        self.host, self.on_nonfinite = host, on_nonfinite
        self.steps = self.skipped = 0
        self._heads = {id(p) for p in heads.parameters()}
        this = weakref.ref(self)  # torch's hook must keep no check alive
        self._hook: Any = register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: _look(this(), optimizer)
        )
        weakref.finalize(self, self._hook.remove).atexit = False

    def remove(self) -> None:
        """Watch no more."""
        self._hook.remove()

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise FloatingPointError, or drop all gradients, if one is not finite."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in self._heads for p in reversed(held)):
            return
        self.steps += 1
        if all_finite([p.grad for p in held if p.grad is not None]):
            self.skipped = 0
            return
        self.skipped += 1
        problem = f"update {self.steps}: the gradient is not finite in "
        problem += nonfinite_gradients(self.host, held)
        if self.on_nonfinite == "raise" or self.skipped >= MOST_SKIPPED:
            often = f" ({self.skipped} updates in a row)" if self.skipped > 1 else ""
            raise FloatingPointError(
                f"{problem}{often}; no weight was updated with it. Lower the learning rate or the "
                "weight of that term"
            )
        logger.warning("%s; this update is left out", problem)
        optimizer.zero_grad(set_to_none=True)


def _look(check: GradientCheck | None, optimizer: torch.optim.Optimizer) -> None:
    if check is not None:
        check.look(optimizer)


def captions_of(batch: Any, key: str | None) -> Captions | None:
    """Return the captions of a batch, at `key` or one of the usual keys; None if it has none.

    Raises:
        ConfigError: if the key is missing, or there is no list at it.
    """
    if not isinstance(batch, Mapping):
        if key is not None:
            raise ConfigError(
                f"lgvq.caption_key: {key!r} needs a batch with keys, got a {type(batch).__name__}"
            )
        return None
    if key is not None and key not in batch:
        raise ConfigError(
            f"lgvq.caption_key: the batch has no {key!r}; it has {', '.join(map(str, batch))}"
        )
    found = next((batch[k] for k in ((key,) if key else CAPTION_KEYS) if k in batch), None)
    if found is not None and (isinstance(found, str) or not hasattr(found, "__len__")):
        raise ConfigError(
            f"captions of a batch must be a list with an entry an image, got {found!r:.80}"
        )
    return found


def require_captions(batch: Any, key: str | None) -> None:
    """Raise ConfigError if `batch` has no place for captions."""
    if captions_of(batch, key) is None:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            f"a batch with no captions: expected one of {', '.join(CAPTION_KEYS)} among its keys, "
            f"got {keys}; name theirs with lgvq.caption_key, give --data FOLDER (images with "
            "captions; taming's own data sets have none), or train the host's own loss"
        )


def add_terms(result: Any, terms: Tensor, log: dict[str, Tensor]) -> Any:
    """Add to what a base loss returns: a scalar, (loss, log), more after these, {"loss": ...}.

    Example:
        >>> add_terms((torch.tensor(1.0), {"a": 2}), torch.tensor(3.0), {"b": 4})
        (tensor(4.), {'a': 2, 'b': 4})
    """
    if isinstance(result, Mapping):
        return {**result, "loss": result["loss"] + terms, **log}
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], Mapping):
        return (result[0] + terms, {**result[1], **log}, *result[2:])
    if isinstance(result, tuple):
        return (result[0] + terms, *result[1:])
    return result + terms


def is_on(config: LGVQConfig) -> bool:
    """Whether any objective has a weight."""
    objectives = config.objectives
    parts = (objectives.global_semantic, objectives.masked_text, objectives.relationship)
    return any(part.weight > 0 for part in parts)


def in_words(status: Mapping[str, Any]) -> str:
    """Return `LGVQLoss.status()` as a line to read.

    Example:
        >>> in_words({"recipe": "paper", "objectives": {"masked_text": 0.01}, "parameters": 15000,
        ...           "gradient_ratio": 4.0, "guide": {"use": "MicroCLIP"}})
        'masked_text x 0.01, gradient ratio 4, recipe paper, guide MicroCLIP, 15,000 parameters'
    """
    weights = [f"{name} x {weight:g}" for name, weight in status["objectives"].items()]
    guide, ratio = status.get("guide") or {}, status.get("gradient_ratio")
    weights += [f"gradient ratio {ratio:g}"] if ratio is not None else []
    rest = [f"recipe {status['recipe']}"] + ([f"guide {guide['use']}"] if guide.get("use") else [])
    return ", ".join([*weights, *rest, f"{status['parameters']:,} parameters"])


def forgive_missing_heads(module: nn.Module, incompatible: Any) -> None:
    """A host's own checkpoint has no heads: that is no error, also when loading strictly."""
    missing = incompatible.missing_keys
    heads = module._modules.get("lgvq")
    ours = [key for key in missing if ".lgvq." in f".{key}"]
    if heads is not None and len(ours) == len(heads.state_dict()):
        for key in ours:
            missing.remove(key)
        logger.info("the checkpoint has no LG-VQ heads; they start from their seed")


def bound_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Bind by the names of the base loss: hosts disagree on the positions.

    Example:
        >>> bound_arguments(lambda qloss, x, optimizer_idx, **more: 0, (0.1, 0.2, 1), {"step": 5})
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


def base_of(
    base: Mapping[str, Any] | None, kwargs: dict[str, Any], default: str
) -> tuple[str, dict[str, Any]]:
    """Return (target, params) of the base loss; `kwargs` go over the params of `base`.

    Raises:
        ConfigError: if `base` has no target.
    """
    if base is None:
        return default, kwargs
    if not isinstance(base, Mapping) or not isinstance(base.get("target"), str):
        raise ConfigError(f"base: expected a mapping with a `target:`, got {base!r}")
    return base["target"], {**to_plain(params_of(base, "base")), **kwargs}


def parameters_beside(host: nn.Module, loss: nn.Module) -> list[nn.Parameter]:
    """Return the host's parameters without those of its loss."""
    ours = {id(p) for p in loss.parameters()}
    return [p for p in host.parameters() if id(p) not in ours]


# -- LGVQLoss: the host's own loss, called as ever, plus the weighted objectives -----------------


BASE = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


class LGVQLoss(Wrapper):
    """The host's loss with the three objectives of LG-VQ on top.

    All parameters, buffers and submodules of the base loss are this module's own, under their
    own names (`discriminator`, `perceptual_loss`, ...), so a host's checkpoints, EMA copies and
    optimizers see no difference; ours lie under `lgvq.`. Other attributes are read from and
    written to the base loss.

    Args:
        args, kwargs: of the base loss.
        base: `{target, params}` of the base loss; taming's VQLPIPSWithDiscriminator if None.
        lgvq: the `lgvq:` block, see `config.LGVQConfig`.

    Attributes:
        latest: what our terms logged last.
        checks_gradients: whether gradients are checked before the optimizer's step; a trainer
            that checks them itself turns it off.

    Raises:
        ConfigError: for an unknown key under `lgvq:`, or a base loss that does not exist.

    Example:
        >>> loss = LGVQLoss(base={"target": "torch.nn.MSELoss"}, lgvq={"recipe": "paper"})
        >>> float(loss(torch.zeros(2), torch.ones(2)))  # no host: the base loss alone
        1.0
    """

    BASE_TARGET = BASE

    def __init__(
        self,
        *args: Any,
        base: Mapping[str, Any] | None = None,
        lgvq: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = to_plain(lgvq or {})
        config = parse(given)
        target, params = base_of(base, kwargs, self.BASE_TARGET)
        require_finite_weights(params, target.rpartition(".")[2])
        module = build_loss(target, args, params)
        super().__init__()
        self._config, self._given = config, given
        self._path: tuple[str, ...] = ()
        self._host: Reference | None = None
        self._ancestors: list[nn.Module] = []
        self._tap: Tap | None = None
        self._methods: HostMethods | None = None
        self._captions: Captions | None = None
        self._check: OptimizerCheck | None = None
        self._discriminator_first: dict[bool, bool] = {}
        self._is_confirmed, self._orphan_told, self._step = False, False, 0
        self._guard: GradientCheck | None = None
        self.latest: dict[str, Tensor] = {}
        self.checks_gradients = True
        self.register_load_state_dict_post_hook(forgive_missing_heads)
        self.wrap(module)
        listen(self, self._on_registration)

    @property
    def alignment(self) -> Alignment | None:
        """The heads, once a host has adopted this loss; None if all weights are 0."""
        return self._modules.get("lgvq")  # type: ignore[return-value]

    # -- adoption ----------------------------------------------------------------------------

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        """Torch's global hook: some module gets a submodule."""
        if child is self or any(child is known for known in self._ancestors):
            self._ancestors.append(parent)
        if not any(parent is known for known in self._ancestors):
            return
        view = gets_quantizer(parent, name, child, self._config.quantizer)
        if view is not None:
            self.adopt(parent, among=view)

    def adopt(self, host: nn.Module, *, among: nn.Module | None = None) -> None:
        """Tap `host`'s quantizer and build the heads; done by itself when a host takes this loss.

        Raises:
            ConfigError: if the quantizer cannot be found.
        """
        if self._host is not None:
            return
        if not is_on(self._config):
            self._host = Reference(host)
            stop_listening(self)
            return
        quantizers = find_quantizers(among or host, self._config.quantizer)
        self._path = (*quantizers,)
        stop_listening(self)
        self._host, self._ancestors = Reference(host), []
        grid = self._config.grid or grid_of(host)
        heads, self._tap = build_alignment(self._given, quantizers, grid)
        parameter = next((p for q in quantizers.values() for p in q.parameters()), None)
        self._modules["lgvq"] = heads.to(parameter.device) if parameter is not None else heads
        self._methods = HostMethods(host, self)
        path = ", ".join(self._path)
        logger.info("LG-VQ on %s.%s: %s", type(host).__name__, path, in_words(self.status()))

    def detach(self) -> nn.Module:
        """Give the host its own loss and methods back; returns that loss.

        The heads are gone from the host; an optimizer that holds them steps the host as before.
        """
        stop_listening(self)
        for part in (self._tap, self._check, self._guard, self._methods):
            if part is not None:
                part.remove()
        if self._host is not None:
            replace_module(self._host.module, self, self.base_loss)
        self._modules.pop("lgvq", None)
        self._tap = self._check = self._guard = self._captions = self._methods = None
        self._orphan_told = True
        return self.base_loss

    def disabled(self) -> AbstractContextManager[None]:
        """Compute the base loss alone inside the context."""
        return (self._tap or Tap()).paused()

    def __getstate__(self) -> dict[str, Any]:
        # No batch and no pending check in a copy or a file.
        return {**self.__dict__, "_captions": None, "_check": None, "_guard": None, "latest": {}}

    @property
    def on_nonfinite(self) -> str:
        """What a term, or a gradient, that is not finite does: "raise" or "skip"."""
        return self._config.on_nonfinite

    @property
    def quantizer_path(self) -> str | list[str] | None:
        """Where the host's quantizer is, or None before a host has adopted this loss."""
        return [*self._path] if len(self._path) > 1 else next(iter(self._path), None)

    @property
    def reading(self) -> tuple[tuple[int, int] | None, str | None]:
        """The config's grid and layout of the quantized vectors; None where they are read off."""
        return self._config.grid, self._config.layout

    def status(self) -> dict[str, Any]:
        """Return what is attached where, in plain values."""
        if self.alignment is None or self._tap is None:
            return {"quantizer": self.quantizer_path, "objectives": {}, "parameters": 0}
        return status(self.alignment, self.quantizer_path or "") | {"enabled": self._tap.enabled}

    # -- where the host's batches and optimizers pass by -------------------------------------

    def receive(self, batch: Any) -> None:
        """Take the captions out of a batch that the host is about to use.

        Raises:
            ConfigError: if there are captions, but no list with an entry an image.
        """
        self.follow()
        self.set_captions(captions_of(batch, self._config.caption_key))

    def follow(self) -> None:
        """Listen to the quantizer that the host has now: GumbelVQ, built on VQModel, swaps it."""
        if self._tap is None or self._host is None:
            return
        if not self._is_confirmed:
            self.require_host()
        self._tap.follow(self._host.module)

    def add_heads(self, optimizers: Any) -> Any:
        """Add the heads to the optimizer that trains the host; returns `optimizers`.

        Raises:
            ConfigError: if none of them does.
        """
        self.follow()
        if self.alignment is None:
            return optimizers
        return add_heads(
            optimizers,
            list(self.alignment.parameters()),
            self._host_parameters,
            undecayed=undecayed_parameters(self.alignment),
        )

    @property
    def _host_parameters(self) -> list[nn.Parameter]:
        return parameters_beside(self._host.module, self) if self._host is not None else []

    def set_captions(self, captions: Captions | None) -> None:
        """Give the captions of the batch that comes next; None for a batch without."""
        self._captions = captions

    # -- the loss ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the base loss returns, our terms added on the generator's pass.

        Raises:
            RuntimeError: if the quantizer did not run before, or no optimizer trains the heads.
            FloatingPointError: for a term that is not finite.
        """
        result = self.base_loss(*args, **kwargs)
        if self.alignment is None or self._tap is None:
            self._tell_orphan()
            return result
        if not self._tap.enabled:
            return result
        if not self._is_confirmed:
            self.require_host()
        called = bound_arguments(self.base_loss.forward, args, kwargs)
        is_generator = int(called.get("optimizer_idx", 0)) == 0
        is_training = self.training and torch.is_grad_enabled()
        discriminator_first = self._discriminator_first.setdefault(is_training, not is_generator)
        if is_generator:
            terms, self.latest = self._terms(called, is_training)
            return add_terms(result, terms, self.latest)
        if discriminator_first:
            self._tap.settle()
        else:  # its own forward pass recorded codes nobody will ask for
            self._tap.forget()
            self._captions = None
        if is_training and world_size() > 1:
            return add_terms(result, zero_of(self.alignment), {})
        return result

    def _terms(
        self, called: Mapping[str, Any], is_training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.alignment is not None
        assert self._tap is not None
        split = str(called.get("split", "train" if self.training else "val"))
        captions, self._captions = self._captions, None
        is_trained = is_training and captions is not None
        codes = self._tap.take(host=self._host.module if is_trained and self._host else None)
        if captions is None:
            captions = [None] * len(codes.codes)
        step = called.get("global_step")
        if step is None:
            step, self._step = self._step, self._step + (split == "train")
        if is_training:
            heads = self.alignment.parameters()
            self._check = self._check or OptimizerCheck(heads, self._host_parameters)
            self._check.raise_if_failed()
            if self.checks_gradients and self._guard is None:
                assert self._host is not None
                self._guard = GradientCheck(self._host.module, self.alignment, self.on_nonfinite)
        self._tap.set_scale(self.alignment.scale(int(step)))
        total, log = self.alignment(codes, captions, step=int(step), split=split)
        return total, log | self._tap.balance_log(split)

    def require_host(self) -> None:
        """Raise ConfigError if the host that took this loss has no quantizer that is found."""
        if is_on(self._config) and self._host is not None:
            find_quantizers(self._host.module, self._config.quantizer)  # now that it is complete
            if self._methods is not None:
                self._methods.find_averages()
            self._is_confirmed = True
        elif is_on(self._config) and self._ancestors:
            find_quantizers(self._ancestors[-1], self._config.quantizer)

    def require_captions(self, batch: Any) -> None:
        """Raise ConfigError if heads wait for captions and `batch` has no place for them."""
        if self.alignment is not None:
            require_captions(batch, self._config.caption_key)

    def _tell_orphan(self) -> None:
        """Refuse a host in which no quantizer was found; warn of a loss without any host."""
        if is_on(self._config) and not self._orphan_told:
            self._orphan_told = True
            self.require_host()
            stop_listening(self)
            logger.warning(
                "LGVQLoss has no host with a quantizer: it computes the base loss alone; "
                "name the quantizer (lgvq.quantizer: PATH), or call loss.adopt(model)"
            )
