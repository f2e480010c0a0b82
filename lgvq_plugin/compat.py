"""What taming-transformers needs and today's stack no longer has, supplied at run time.

Nothing is touched that exists: a module is added to `sys.modules` only where importing it
fails, and only the names that taming reads are in it. `patches/` holds the same mends as diffs.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

_SUPPLIED: dict[str, str] = {}


def patch() -> dict[str, str]:
    """Make `taming` importable; idempotent.

    Returns:
        What was supplied so far: module name -> why.
    """
    # taming 0.0.1 and HEAD import rank_zero_only from here; gone since Lightning 1.8.
    _supply(
        "pytorch_lightning.utilities.distributed",
        "removed in Lightning 1.8",
        parent="pytorch_lightning.utilities",
        attributes=lambda: {
            "rank_zero_only": importlib.import_module(
                "pytorch_lightning.utilities.rank_zero"
            ).rank_zero_only
        },
    )
    # taming.data.utils (HEAD) reads string_classes from torch._six; gone since torch 2.0.
    _supply(
        "torch._six",
        "removed in torch 2.0",
        parent="torch",
        attributes=lambda: {
            "string_classes": (str, bytes),
            "int_classes": int,
            "inf": float("inf"),
        },
    )
    return dict(_SUPPLIED)


def _supply(name: str, why: str, *, parent: str, attributes: Any) -> None:
    if name in sys.modules or importlib.util.find_spec(parent) is None:
        return
    if importlib.util.find_spec(name) is not None:
        return
    module = types.ModuleType(name, f"Supplied by lgvq_plugin.compat: {why}.")
    module.__dict__.update(attributes())
    sys.modules[name] = module
    setattr(importlib.import_module(parent), name.rpartition(".")[2], module)
    _SUPPLIED[name] = why
