"""The prefix form: `target: lgvq_plugin.over.<old target>` is LGVQLoss over that loss.

Resolved by plain `importlib` and `getattr`, so that every host's own `instantiate_from_config`
understands it: importing `lgvq_plugin.over.a.b` gives a module whose attribute `C` is a subclass
of LGVQLoss over `a.b.C`.
"""

import types
from importlib.machinery import ModuleSpec
from typing import Any

from .loss import LGVQLoss
from .moved import ModuleMaker, install
from .sockets import ConfigError, import_target

__path__: list[str] = []  # a package without files: its submodules come from the finder below


class _Finder(ModuleMaker):
    def makes(self, name: str) -> bool:
        return name.startswith(f"{__name__}.")

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Over(spec.name)


class _Over(types.ModuleType):
    """Module whose attributes are losses over those of the module of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        loss = over(f"{self.__name__.removeprefix(__name__ + '.')}.{name}")
        setattr(self, name, loss)
        return loss


def over(target: str) -> type[LGVQLoss]:
    """Return LGVQLoss over the loss class `target`; ConfigError if there is no such class.

    >>> over("torch.nn.MSELoss").__module__
    'lgvq_plugin.over.torch.nn'
    """
    loss = import_target(target)
    if not isinstance(loss, type):
        raise ConfigError(f"target {target!r} is no class, so it cannot be the base of LGVQLoss")
    module, _, name = target.rpartition(".")
    place = f"{__name__}.{module}"
    namespace = {"BASE_TARGET": target, "__module__": place, "__doc__": f"LGVQLoss over {target}."}
    return type(name, (LGVQLoss,), namespace)


install(_Finder)
