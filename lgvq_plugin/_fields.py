"""Plain YAML values -> frozen dataclasses: types checked, unknown keys refused by name."""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from .sockets import FLOAT32, ConfigError, suggest

T = TypeVar("T")
LARGEST = {float: FLOAT32, int: 2**31 - 1}  # what float32 tensors and sizes can hold
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}


def require(holds: bool, key: str, expected: str, got: Any) -> None:
    """Raise a ConfigError that names the key and what it should hold, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def to_plain(value: Any) -> Any:
    """Turn OmegaConf's (or any) mappings and sequences into dicts and lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [to_plain(inner) for inner in value]
    return value


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` merged over it, key by key, all the way down.

    Example:
        >>> laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        is_both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[key] = laid_over(inner, value) if is_both else value  # type: ignore[arg-type]
    return merged


def differing(old: Any, new: Any) -> list[str]:
    """Return what differs between two configs, each as "key: old then, new now".

    Example:
        >>> differing({"a": {"b": 1, "c": (2,)}}, {"a": {"b": 3, "c": [2]}})
        ['a.b: 1 then, 3 now']
    """
    then, now = _flat(old), _flat(new)
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: to_plain(node)}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def build(cls: type[T], given: Any, path: str) -> T:
    """Build a dataclass from a mapping.

    Args:
        cls: whose field types are numbers, booleans, strings, Literals, pairs, mappings, None
            or dataclasses of the same kind.
        given: the mapping; a missing key, and None for a dataclass, means the default.
        path: where it stands in the config, for messages.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type, by its path.
    """
    require(isinstance(given, Mapping), path, f"a mapping of {_names(cls)}", given)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}{suggest(key, known)}")
    hints = get_type_hints(cls)
    values = {key: read(value, hints[key], f"{path}.{key}") for key, value in given.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # from __post_init__, which knows the key but not the path
        raise ConfigError(f"{path}.{error}") from error


def read(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the type `hint` says; numbers may be strings (YAML 1.1 reads 1e-3 so).

    Raises:
        ConfigError: if it is of another type.

    Example:
        >>> read("1e-3", float, "weight"), read([1, 2], tuple[int, int] | None, "grid")
        (0.001, (1, 2))
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hints = [h for h in inner if h is not type(None)]
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        # `str | tuple[str, ...]`: one or a list of them.
        hint = next((h for h in hints if (get_origin(h) is tuple) == is_list), hints[0])
        return read(value, hint, path)
    if is_dataclass(hint):
        return build(hint, {} if value is None else value, path)  # type: ignore[arg-type]
    if origin is Literal:
        require(value in inner, path, " or ".join(map(repr, inner)), value)
        return value
    if origin is tuple and inner[-1] is Ellipsis:
        return tuple(read(each, inner[0], f"{path}[{i}]") for i, each in enumerate(value))
    if origin is tuple:
        example = "[16, 16]" if inner[0] is int else "[0.1, 0.5]"
        expected = f"{len(inner)} values, each {WORDS[inner[0]]}, like {example}"
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        require(is_list and len(value) == len(inner), path, expected, value)
        try:
            return tuple(read(v, h, path) for v, h in zip(value, inner, strict=True))
        except ConfigError:
            raise ConfigError(f"{path}: expected {expected}, got {value!r}") from None
    if hint in (float, int):
        return _number(value, hint, path)
    if hint in (bool, str):
        require(isinstance(value, hint), path, WORDS[hint], value)
    elif origin is not None:
        require(isinstance(value, Mapping), path, "a mapping", value)
    return value


def _number(value: Any, hint: type, path: str) -> float | int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    holds = abs(number) <= LARGEST[hint] and (hint is float or number.is_integer())
    limit = "" if math.isnan(number) else f" of at most {LARGEST[hint]:.3g}"
    require(holds, path, f"{WORDS[hint]}{limit}", value)
    return number if hint is float else int(number)


def _names(cls: type) -> str:
    return ", ".join(f.name for f in fields(cls))


def verify(value: Any, hint: Any, key: str) -> None:
    """Check plain JSON against a type, all the way down; nothing is converted.

    Args:
        value: what `json.loads` returned.
        hint: a number, string, boolean, Literal, list, tuple, dict, TypedDict, dataclass, or any
            of them or None. A JSON list serves as a tuple, whose length is checked.
        key: where it stands in the file, for messages.

    Raises:
        ConfigError: for a value of another type, a missing key or, in a dataclass, an unknown one.

    Example:
        >>> verify({"values": [1, "2"]}, dict[str, list[float]], "row")
        Traceback (most recent call last):
        lgvq_plugin.sockets.ConfigError: row.values[1]: expected a number, got '2'
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is not None or type(None) not in inner:
            verify(value, next(h for h in inner if h is not type(None)), key)
    elif origin is Literal:
        known = isinstance(value, str) and value in inner
        require(known, key, " or ".join(map(repr, inner)), value)
    elif origin in (list, tuple, Sequence):
        require(isinstance(value, list | tuple), key, "a list", value)
        is_fixed = origin is tuple and inner[-1] is not Ellipsis
        require(not is_fixed or len(value) == len(inner), key, f"{len(inner)} values", value)
        for i, part in enumerate(value):
            verify(part, inner[i if is_fixed else 0], f"{key}[{i}]")
    elif origin in (dict, Mapping):
        require(isinstance(value, Mapping), key, "a mapping", value)
        for name, part in value.items():
            verify(name, str, f"{key}: a key")
            verify(part, inner[1], f"{key}.{name}" if key else name)
    elif is_dataclass(hint) or is_typeddict(hint):
        _verify_record(value, hint, key)
    elif hint in (float, int, bool, str):
        require(_is_a(value, hint), key, WORDS[hint], value)


def _verify_record(value: Any, cls: type, key: str) -> None:
    hints = get_type_hints(cls)
    require(isinstance(value, Mapping), key, f"a mapping of {', '.join(hints)}", value)
    needed = getattr(cls, "__required_keys__", ())
    if is_dataclass(cls):
        needed = [f.name for f in fields(cls) if MISSING is f.default is f.default_factory]
        for name in value:
            at = f"{key}.{name}" if key else name
            require(name in hints, at, f"one of {', '.join(hints)}", name)
    for name in sorted(needed):
        require(name in value, key, f"a mapping with {name!r}", [*value])
    for name in hints.keys() & value.keys():
        verify(value[name], hints[name], f"{key}.{name}" if key else name)


def _is_a(value: Any, hint: type) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is str:  # half a surrogate pair, which JSON can hold, can be written to no file
        return isinstance(value, str) and not any(
            "\ud800" <= letter <= "\udfff" for letter in value
        )
    if isinstance(value, int):
        return abs(value) < 2**63
    return hint is float and isinstance(value, float)
