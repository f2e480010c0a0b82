"""Language-guided codebooks (LG-VQ, NeurIPS 2024) for any VQ image tokenizer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compat import install

if TYPE_CHECKING:
    from . import functional as functional
    from .guides.base import AbstractGuide as AbstractGuide
    from .heads.code_vit import CodeViT as CodeViT
    from .heads.text_decoder import TextDecoder as TextDecoder
    from .hosts.base import attach as attach
    from .loss import LGVQLoss as LGVQLoss
    from .objectives.base import AbstractObjective as AbstractObjective

__version__ = "0.1.0"

install()  # finders that act once taming is imported; nothing is imported here

_LAZY = {
    "AbstractGuide": "guides.base",
    "AbstractObjective": "objectives.base",
    "CodeViT": "heads.code_vit",
    "LGVQLoss": "loss",
    "TextDecoder": "heads.text_decoder",
    "attach": "hosts.base",
}

__all__ = [
    "AbstractGuide",
    "AbstractObjective",
    "CodeViT",
    "LGVQLoss",
    "TextDecoder",
    "__version__",
    "attach",
    "functional",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: the package itself imports nothing."""
    if name == "functional":
        return import_module(f"{__name__}.functional")
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
