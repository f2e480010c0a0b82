"""Language-guided codebooks (LG-VQ, NeurIPS 2024) for any VQ image tokenizer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat, moved

if TYPE_CHECKING:
    from . import functional
    from .guides.base import AbstractGuide as AbstractGuide
    from .heads import CodeViT as CodeViT
    from .heads import TextDecoder as TextDecoder
    from .host import Handle as Handle
    from .host import attach as attach
    from .loss import LGVQLoss as LGVQLoss
    from .objectives import AbstractObjective as AbstractObjective

__version__ = "0.1.0"

compat.install()  # finders that act once taming is imported; nothing is imported here
moved.install(moved.OldPaths)

_LAZY = {
    "AbstractGuide": "guides.base",
    "AbstractObjective": "objectives",
    "CodeViT": "heads",
    "Handle": "host",
    "LGVQLoss": "loss",
    "TextDecoder": "heads",
    "attach": "host",
}

__all__ = ["__version__", "functional", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that the package itself imports nothing heavy."""
    if name == "functional":
        return import_module(f"{__name__}.functional")
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
