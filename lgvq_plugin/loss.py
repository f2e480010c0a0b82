"""LGVQLoss: the host's own loss, called as ever, plus the weighted objectives.

__init__     builds the host's loss; waits until a host takes it as a submodule and has a quantizer
adoption     tap on the quantizer, heads built, captions taken where the host takes its images,
             heads added to the optimizer that `configure_optimizers` returns
forward      base loss with the host's arguments, untouched; our terms on the generator's pass only
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ._loss_parts import (
    OptimizerCheck,
    Reference,
    View,
    add_terms,
    captions_of,
    forgive_missing_heads,
    grid_of,
    plain,
)
from .alignment import Alignment, Captions
from .compat import build_loss
from .config import parse
from .hosts.base import Tap, add_heads, build_alignment, find_quantizer, status
from .sockets import ConfigError

logger = logging.getLogger(__name__)

BASE = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


class LGVQLoss(nn.Module):
    """The host's loss with the three objectives of LG-VQ on top.

    All parameters, buffers and submodules of the base loss are this module's own, under their
    own names (`discriminator`, `perceptual_loss`, ...), so a host's checkpoints, EMA copies and
    optimizers see no difference; ours lie under `lgvq.`. Other attributes are read from and
    written to the base loss.

    Args:
        args, kwargs: of the base loss.
        base: `{target, params}` of the base loss; taming's VQLPIPSWithDiscriminator if None.
        lgvq: the `lgvq:` block, see `config.LGVQConfig`.

    Raises:
        ConfigError: for an unknown key under `lgvq:`, or a base loss that does not exist.

    Example:
        >>> loss = LGVQLoss(base={"target": "torch.nn.MSELoss"}, lgvq={"recipe": "paper"})
        >>> float(loss(torch.zeros(2), torch.ones(2)))  # no host: the base loss alone
        1.0
    """

    BASE_TARGET = BASE
    _OWN = frozenset(
        {
            "training",
            "_base",
            "_config",
            "_given",
            "_host",
            "_ancestors",
            "_tap",
            "_path",
            "_captions",
        }
        | {"_registration", "_check", "_discriminator_first", "_orphan_told", "_step"}
    )

    def __init__(
        self,
        *args: Any,
        base: Mapping[str, Any] | None = None,
        lgvq: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = plain(lgvq or {})
        config = parse(given)
        if base is not None:
            if "target" not in base:
                raise ConfigError(f"base: expected a mapping with a `target:`, got {sorted(base)}")
            kwargs = {**plain(base.get("params") or {}), **kwargs}
        target = base["target"] if base is not None else self.BASE_TARGET
        module = build_loss(target, args, kwargs)
        super().__init__()
        # The very dicts of the base loss: whatever it or a host puts into one is in both.
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = module.__dict__[name]
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self._base = Reference(module)
        self._config, self._given = config, given
        self._host: Reference | None = None
        self._ancestors: list[nn.Module] = []
        self._tap: Tap | None = None
        self._path = ""
        self._captions: Captions | None = None
        self._check: Any = None
        self._discriminator_first: bool | None = None
        self._orphan_told = False
        self._step = 0
        self.register_load_state_dict_post_hook(forgive_missing_heads)
        self._registration: Any = register_module_module_registration_hook(self._on_registration)

    # -- what belongs to the base loss -------------------------------------------------------

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
        if name in self._OWN or "_base" not in self.__dict__ or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.base_loss, name, value)

    def train(self, mode: bool = True) -> "LGVQLoss":
        """Set the mode of the base loss, its parts and the heads."""
        super().train(mode)
        self.base_loss.training = mode
        return self

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
        siblings = {**parent._modules, name: child}
        wanted = self._config.quantizer
        at = wanted.split(".")[0] if wanted else None
        if name == at or (at is None and find_quantizer(View(siblings), required=False)):
            # The child is not in yet: look it up in what the parent will have in a moment.
            self.adopt(parent, among=View(siblings))

    def adopt(self, host: nn.Module, *, among: nn.Module | None = None) -> None:
        """Tap `host`'s quantizer and build the heads; done by itself when a host takes this loss.

        Raises:
            ConfigError: if the quantizer cannot be found.
        """
        if self._tap is not None or not self._is_on():
            self._stop_listening()
            return
        found = find_quantizer(among or host, self._config.quantizer)
        assert found is not None
        self._path, quantizer = found
        self._stop_listening()
        self._host, self._ancestors = Reference(host), []
        grid = self._config.grid or grid_of(host)
        heads = build_alignment(self._given, quantizer, grid)
        parameter = next(quantizer.parameters(), None)
        self._modules["lgvq"] = heads.to(parameter.device) if parameter is not None else heads
        self._tap = Tap(grid).install(quantizer)
        # Bound methods as attributes of the instance: they survive copy.deepcopy and pickle.
        if hasattr(host, "get_input"):
            host.get_input = self._get_input
        else:
            for name in ("training_step", "validation_step"):
                if hasattr(host, name):
                    setattr(host, name, getattr(self, f"_{name}"))
        if hasattr(host, "configure_optimizers"):
            host.configure_optimizers = self._configure_optimizers
        logger.info("LG-VQ on %s.%s: %s", type(host).__name__, self._path, self.status())

    def _is_on(self) -> bool:
        objectives = self._config.objectives
        parts = (objectives.global_semantic, objectives.masked_text, objectives.relationship)
        return any(part.weight > 0 for part in parts)

    def _stop_listening(self) -> None:
        if self._registration is not None:
            self._registration.remove()
            self._registration = None

    def __del__(self) -> None:
        registration = self.__dict__.get("_registration")
        if registration is not None:
            registration.remove()

    def __getstate__(self) -> dict[str, Any]:
        # No global hook, no batch and no pending check in a copy or a file.
        return {**self.__dict__, "_registration": None, "_captions": None, "_check": None}

    def status(self) -> dict[str, Any]:
        """Return what is attached where, in plain values."""
        if self.alignment is None:
            return {"quantizer": self._path or None, "objectives": {}, "parameters": 0}
        return status(self.alignment, self._path)

    # -- what the host calls instead of its own methods ---------------------------------------

    def _own_method(self, name: str) -> Any:
        host = self._host.module  # type: ignore[union-attr]
        return getattr(type(host), name).__get__(host)

    def _get_input(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.set_captions(captions_of(batch, self._config.caption_key))
        return self._own_method("get_input")(batch, *args, **kwargs)

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.set_captions(captions_of(batch, self._config.caption_key))
        return self._own_method("training_step")(batch, *args, **kwargs)

    def _validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.set_captions(captions_of(batch, self._config.caption_key))
        return self._own_method("validation_step")(batch, *args, **kwargs)

    def _configure_optimizers(self) -> Any:
        result = self._own_method("configure_optimizers")()
        return self.add_heads(result)

    def add_heads(self, optimizers: Any) -> Any:
        """Add the heads to the optimizer that trains the host; returns `optimizers`.

        Raises:
            ConfigError: if none of them does.
        """
        if self.alignment is None:
            return optimizers
        return add_heads(optimizers, list(self.alignment.parameters()), self._host_parameters())

    def _host_parameters(self) -> list[nn.Parameter]:
        ours = {id(p) for p in self.parameters()}
        host = self._host.module  # type: ignore[union-attr]
        return [p for p in host.parameters() if id(p) not in ours]

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
        called = self._arguments(args, kwargs)
        is_generator = int(called.get("optimizer_idx", 0)) == 0
        is_training = self.training and torch.is_grad_enabled()
        if is_training and self._discriminator_first is None:
            self._discriminator_first = not is_generator
        if not is_generator:
            if not self._discriminator_first:
                self._tap.codes = None  # its own forward pass recorded codes nobody will ask for
            return result
        terms, log = self._terms(called)
        return add_terms(result, terms, log)

    def _terms(self, called: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.alignment is not None
        assert self._tap is not None
        split = str(called.get("split", "train" if self.training else "val"))
        codes = self._tap.take()
        captions, self._captions = self._captions, None
        if captions is None:
            captions = [None] * len(codes.codes)
        step = called.get("global_step")
        if step is None:
            step = self._step
            self._step += split == "train"
        if self.training and torch.is_grad_enabled():
            self._watch_optimizer()
        return self.alignment(codes, captions, step=int(step), split=split)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """Bind by the names of the base loss: hosts disagree on the positions."""
        try:
            return inspect.signature(self.base_loss.forward).bind(*args, **kwargs).arguments
        except TypeError:
            return kwargs

    def _tell_orphan(self) -> None:
        """Refuse a host in which no quantizer was found; warn of a loss without any host."""
        if self._is_on() and not self._orphan_told:
            self._orphan_told = True
            self.require_host()
            self._stop_listening()
            logger.warning(
                "LGVQLoss has no host with a quantizer: it computes the base loss alone; "
                "name the quantizer (lgvq.quantizer: PATH), or call loss.adopt(model)"
            )

    def require_host(self) -> None:
        """Raise ConfigError if the host that took this loss has no quantizer that is found."""
        if self._is_on() and self._tap is None and self._ancestors:
            find_quantizer(self._ancestors[-1], self._config.quantizer)

    def _watch_optimizer(self) -> None:
        """At the first update of the host's weights: are the heads updated with them?"""
        if self._check is None:
            assert self.alignment is not None
            self._check = OptimizerCheck(self.alignment.parameters(), self._host_parameters())
        self._check.raise_if_failed()
