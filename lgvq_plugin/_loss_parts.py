"""Small parts of LGVQLoss: the check of the optimizer, a view of modules, adding terms."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ._fields import to_plain
from ._finite import MOST_SKIPPED, all_finite, nonfinite_gradients
from .alignment import Captions
from .config import LGVQConfig
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
