"""Read a checkpoint file without running any code in it, and find the host's tensors in that.

.safetensors --> tensors only
a pickle     --> torch's weights_only --> the same + stand-ins for harmless classes --> refused
content --sort_tensors--> the host's tensors, without roots and prefixes; averaged ones; others
"""

import _compat_pickle
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..files import read_safetensors
from ..sockets import ConfigError, suggest

How = Literal["safetensors", "weights_only", "allow_list", "pickle"]
ROOTS = ("state_dict", "model", "vae", "ema")
AVERAGES = ("ema_state_dict", "ema", "averaging_state")
WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile
OWNERS = ("first_stage_model.", "model.")  # the tokenizer in a larger model's checkpoint
EMA = "model_ema."


def read_raw(path: Path, *, trust_pickle: bool = False) -> tuple[Any, How]:
    """Return the content of a file, on the CPU and in plain containers, and how it was read.

    Raises ConfigError if there is no such file, it is damaged, or it needs a full unpickle and
    `trust_pickle` is off; none of its code has run then.
    """
    if not path.is_file():
        raise ConfigError(f"no checkpoint {str(path)!r}")
    if path.suffix == ".safetensors":
        return read_safetensors(path), "safetensors"
    damaged = f"checkpoint {str(path)!r} cannot be read; it is damaged or no checkpoint"
    try:
        with suppress(pickle.UnpicklingError):  # it names classes
            return torch.load(path, map_location="cpu", weights_only=True), "weights_only"
        names = named_globals(path)
    except Exception as error:  # garbage can make the unpickler fail anywhere
        raise ConfigError(f"{damaged}: {_first_line(error)}") from error
    stand_ins: list[Any] = [made for name in sorted(names) if (made := stand_in(name)) is not None]
    try:
        with torch.serialization.safe_globals(stand_ins):
            raw = torch.load(path, map_location="cpu", weights_only=True)
        return plain(raw), "allow_list"
    except Exception as error:  # of a hostile or broken file
        if trust_pickle:
            return _read_pickle(path), "pickle"
        if not names:
            raise ConfigError(damaged) from error  # torch's own message advises a full unpickle
        raise ConfigError(_refusal(path, names, error)) from error


def named_globals(path: Path) -> set[str]:
    """Return the dotted names that the pickles in a checkpoint refer to; nothing is loaded."""
    names: set[str] = set()
    for stream in _pickles(path):
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    names.add(_modern(*str(argument).split(" ", 1)))
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    names.add(_modern(*strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:  # raw numbers follow the last pickle of an old file
            continue
    return names


def _pickles(path: Path) -> Iterator[Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield io.BytesIO(archive.read(name))
        return
    with path.open("rb") as file:  # torch < 1.6: magic number, protocol, system, object, keys
        for _ in range(5):
            yield file


def _modern(module: str, name: str) -> str:
    """Return a dotted name with Python 2's modules under their present names."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _read_pickle(path: Path) -> Any:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        failed = f"checkpoint {str(path)!r} cannot be unpickled: {type(error).__name__}: {error}"
        raise ConfigError(f"{failed}; a class that it names may have to be importable") from error
    return raw.state_dict() if isinstance(raw, nn.Module) else raw


def _refusal(path: Path, names: set[str], error: Exception) -> str:
    harmless = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode")
    strange = sorted(n for n in names if stand_in(n) is None and not n.startswith(harmless))
    reason = f"cannot be read safely ({_first_line(error)})"
    if strange:
        reason = f"asks for {', '.join(strange)}"
    return (
        f"checkpoint {str(path)!r} {reason}, which could run any code; nothing was run. If you "
        "trust the source of the file: --trust-pickle (trust_pickle=True)"
    )


def _first_line(error: Exception) -> str:
    """Return the cause, without torch's advice to unpickle everything that follows it."""
    text = str(error).partition("\n")[0].partition("(1) In PyTorch 2.6")[0].partition(". ")[0]
    return text.strip() or type(error).__name__


def plain(node: Any, depth: int = 0) -> Any:
    """Convert stand-ins to dicts, lists and scalars, OmegaConf's nodes to their values.

    Classes become their names: Lightning's callbacks are keys of a dict in old files.
    """
    if depth > 100:
        return None
    if isinstance(node, _Inert):
        state = {key: value for key, value in vars(node).items() if key != "args"}
        return plain(state.get("_content", state.get("_val", state)), depth + 1)
    if isinstance(node, dict):
        keys = [key if isinstance(key, tuple) else plain(key, depth + 1) for key in node]
        return dict(zip(keys, (plain(value, depth + 1) for value in node.values()), strict=True))
    if isinstance(node, list | tuple):
        return [plain(value, depth + 1) for value in node]
    return f"{node.__module__}.{node.__qualname__}" if isinstance(node, type) else node


def stand_in(name: str) -> "type[_Inert] | None":
    """Return an inert class that replaces the dotted `name`, or None if that is not harmless.

    >>> stand_in("pytorch_lightning.callbacks.ModelCheckpoint").__qualname__
    'ModelCheckpoint'
    >>> stand_in("os.system") is None
    True
    """
    for pattern, base in STAND_INS.items():
        if re.fullmatch(pattern, name):
            module, _, last = name.rpartition(".")
            return type(last, (base,), {"__module__": module, "__qualname__": last})
    return None


class _Inert:
    """Replaces a class named in a pickle; only keeps its arguments and its state."""

    args: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = object.__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})


class _InertDtype(_Inert):
    """numpy's dtype: a type such as "f8", and the byte order from the state."""

    order = "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


NUMBER = re.compile(r"b1|[iu][1248]|f[248]")
"""NumPy's types of numbers."""


def _number(dtype: Any = None, raw: Any = None, *rest: Any) -> Any:
    """Return numpy's scalar of (dtype, bytes) as Python's number, or None if it is no number."""
    if rest or not isinstance(dtype, _InertDtype) or not dtype.args:
        return None
    kind = str(dtype.args[0])
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not NUMBER.fullmatch(kind) or not isinstance(raw, bytes) or len(raw) != int(kind[1]):
        return None
    return np.frombuffer(raw, dtype.order + kind)[0].item()


def _becoming(make: Callable[..., Any]) -> Any:
    """Return an inert class that becomes what `make` returns for its arguments."""
    return type("_Plain", (_Inert,), {"__new__": lambda cls, *args, **kwargs: make(*args)})


# The unpickler fills the dicts and lists.
_InertDict = _becoming(lambda *args: dict(*(x for x in args[:1] if isinstance(x, dict | list))))
_InertList = _becoming(lambda *args: list(*(x for x in args[:1] if isinstance(x, list | tuple))))
_InertPath = _becoming(lambda *args: "/".join(map(str, args)).replace("//", "/"))


STAND_INS: dict[str, Any] = {
    r"typing\.(Any|Union|Optional)": _Inert,
    r"builtins\.(dict|object|int|float|str|bool|tuple|NoneType)": _Inert,
    r"builtins\.list": _InertList,
    r"collections\.defaultdict": _InertDict,
    r"collections\.deque": _InertList,
    r"argparse\.Namespace": _Inert,
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path": _InertPath,  # _local: Python 3.13
    r"omegaconf\.(dictconfig|listconfig|base|nodes)\.\w+": _Inert,
    r"numpy(\._?core)?\.dtype": _InertDtype,
    r"numpy\.(_core|core)\.multiarray\.scalar": _becoming(_number),
    # Lightning: callbacks are keys of a dict in files of 1.x; hyper-parameters are AttributeDicts.
    r"(pytorch_lightning|lightning(\.pytorch)?)\.callbacks(\.\w+)+": _Inert,
    r"(pytorch_lightning|lightning(\.pytorch)?)\.utilities\.parsing\.AttributeDict": _InertDict,
    r"lightning(_|\.)fabric\.utilities\.data\.AttributeDict": _InertDict,
    # The callbacks of taming's and latent-diffusion's own training scripts.
    r"(\w+\.)*main\.(SetupCallback|ImageLogger|CUDACallback)": _Inert,
}
"""Patterns of harmless names. None of them is imported: each gets an inert stand-in."""


# Where the host's tensors are


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensors of a checkpoint, sorted."""

    state_dict: dict[str, Tensor]
    """The host's tensors, without prefixes."""
    averaged: dict[str, Tensor] | None = None
    """Averaged (EMA) weights under the same names, or None."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """All other tensors, under their own names."""
    root: str = ""
    """Key that held the state dict; "" if the file is one itself."""
    prefix: str = ""
    """Prefix that was removed."""


def sort_tensors(raw: Any, *, root: str | None = None) -> Layout:
    """Find the host's state dict in a checkpoint's content: at `root`, or at one of ROOTS.

    Raises ConfigError if there are no tensors, or none at `root`.

    >>> import torch
    >>> found = sort_tensors({"model": {"module.weight": torch.zeros(1)}, "steps": 3})
    >>> found.root, found.prefix, list(found.state_dict)
    ('model', 'module.', ['weight'])
    """
    found, tensors = _choose_root(raw, root)
    tensors, wrapper = _strip_wrappers(tensors)
    tensors, aside, owner = _strip_owner(tensors)
    prefix = wrapper + owner
    copy, own = split(tensors, EMA)
    averaged = unflatten(copy, own) if copy else _averaged_elsewhere(raw, found)
    if copy and not own:  # nothing but averaged weights
        own = {key: copy[key] for key in copy if key not in ("decay", "num_updates")}
        copy, averaged, prefix = {}, None, prefix + EMA
    aside |= {EMA + key: value for key, value in copy.items()}
    return Layout(state_dict=own, averaged=averaged, aside=aside, root=found, prefix=prefix)


def split(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors below a prefix, without it, and the other ones."""
    inside = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    return inside, {key: tensors[key] for key in tensors if not key.startswith(prefix)}


def unflatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Restore the names of averaged weights; latent-diffusion's LitEma drops all dots.

    >>> import torch
    >>> list(unflatten({"ab": torch.zeros(1), "decay": torch.ones(1)}, ["a.b"]))
    ['a.b']
    """
    known = {name.replace(".", ""): name for name in names}
    flat = {key.replace(".", ""): value for key, value in tensors.items()}
    return {known[key]: value for key, value in flat.items() if key in known}


def _choose_root(raw: Any, root: str | None) -> tuple[str, dict[str, Tensor]]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"the checkpoint holds a {type(raw).__name__}, expected a state dict")
    if root is not None:
        if not _tensors(raw.get(root)):
            raise ConfigError(f"no tensors at {root!r}{suggest(root, [str(key) for key in raw])}")
        return root, _tensors(raw[root])
    if "state_dict" in raw and not _tensors(raw["state_dict"]):
        found = type(raw["state_dict"]).__name__
        raise ConfigError(f"its state_dict is a {found} without tensors; expected name: tensor")
    for name, node in [*((name, raw.get(name)) for name in ROOTS), ("", raw)]:
        if tensors := _tensors(node):
            return name, tensors
    expected = f"expected a state dict, alone or at one of {', '.join(ROOTS)}"
    keys = sorted(map(str, raw))[:10]
    raise ConfigError(f"no tensors in the checkpoint; {expected}; it has {keys}")


def _tensors(node: Any) -> dict[str, Tensor]:
    if not isinstance(node, Mapping):
        return {}
    return {str(key): value for key, value in node.items() if isinstance(value, Tensor)}


def _strip_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove what DDP and torch.compile put before (or, for compiled parts, within) the names."""
    removed = ""
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in tensors)), ""):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
        removed += wrapper
    if any("_orig_mod." in key for key in tensors):
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
        removed += "_orig_mod."
    return tensors, removed


def _strip_owner(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return the tokenizer's tensors, the other ones, and the prefix of the tokenizer's."""
    for owner in OWNERS:
        inside, aside = split(tensors, owner)
        if inside and (owner == OWNERS[0] or not aside):
            return inside, aside, owner
    return tensors, {}, ""


def _averaged_elsewhere(raw: Mapping[Any, Any], root: str) -> dict[str, Tensor] | None:
    for name in AVERAGES:
        if name != root and (tensors := _tensors(raw.get(name))):
            return _strip_owner(_strip_wrappers(tensors)[0])[0]
    return None
