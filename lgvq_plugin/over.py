"""The prefix form: `target: lgvq_plugin.over.<old target>` is LGVQLoss over that loss.

Resolved by plain `importlib` and `getattr`, so that every host's own `instantiate_from_config`
understands it: importing `lgvq_plugin.over.a.b` gives a module whose attribute `C` is a subclass
of LGVQLoss over `a.b.C`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

from .loss import LGVQLoss
from .sockets import ConfigError, import_target

__path__: list[str] = []  # a package without files: its submodules come from the finder below


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `lgvq_plugin.over.<module>` for every module that exists."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Over(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


class _Over(types.ModuleType):
    """Module whose attributes are losses over those of the module of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        loss = over(f"{self.__name__.removeprefix(__name__ + '.')}.{name}")
        setattr(self, name, loss)
        return loss


def over(target: str) -> type[LGVQLoss]:
    """Return LGVQLoss over the loss class `target`.

    Raises:
        ConfigError: if it does not exist.

    Example:
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


if not any(
    (type(finder).__module__, type(finder).__name__) == (__name__, "_Finder")
    for finder in sys.meta_path
):
    sys.meta_path.append(_Finder())
