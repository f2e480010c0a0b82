"""How a loss meets the host that builds it: by torch's registration hook, then by stand-ins.

host.__init__: self.loss = LGVQLoss(...)   -> listen: who took me? has it a quantizer?
               self.quantize = ...         -> found: tap it, replace the methods below
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ._tap import find_quantizer

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
