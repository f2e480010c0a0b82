"""LGVQLoss: the host's own loss, called as ever, plus the weighted objectives.

__init__     builds the host's loss; waits until a host takes it as a submodule and has a quantizer
adoption     tap on the quantizer, heads built, captions taken where the host takes its images,
             heads added to the optimizer that `configure_optimizers` returns
forward      base loss with the host's arguments, untouched; our terms on the generator's pass only
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ._fields import to_plain
from ._loss_parts import (
    GradientCheck,
    OptimizerCheck,
    Reference,
    Wrapper,
    add_terms,
    base_of,
    bound_arguments,
    captions_of,
    forgive_missing_heads,
    in_words,
    is_on,
    parameters_beside,
    require_captions,
)
from .alignment import Alignment, Captions, zero_of
from .compat import build_loss
from .config import parse, require_finite_weights
from .dist import world_size
from .hosts.base import (
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

logger = logging.getLogger(__name__)

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
