"""Resolve names in configs to classes; the only dynamic imports of the package."""

import difflib
import importlib
import inspect
import linecache
import os
import re
import traceback
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from .moved import new_module


class ConfigError(ValueError):
    """The user's input is wrong; the message says what, where and how to fix it."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        # A DataLoader re-raises a worker's error with a traceback as its message.
        if text.startswith("Caught ") and "Traceback (most recent call last)" in text:
            text = re.split(rf"^[\w.]*\b{type(self).__name__}: ", text, flags=re.M)[-1].strip()
        super().__init__(text)


class MissingError(ConfigError):
    """Part of the user's input is missing; what was given may be right."""


class Problems:
    """Collects errors in the user's input, so that one message names all of them.

    >>> problems = Problems()
    >>> for name in ("a", "b"):
    ...     with problems.collecting():
    ...         raise ConfigError(f"{name} is missing")
    >>> problems.raise_any()
    Traceback (most recent call last):
    ...
    lgvq_plugin.sockets.ConfigError: 2 things are missing or wrong:
      1. a is missing
      2. b is missing
    """

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return bool(self.errors)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a ConfigError that is raised inside the context, without repeats."""
        try:
            yield
        except ConfigError as error:
            if not any(str(error) in str(known) for known in self.errors):
                self.errors.append(error)

    def raise_wrong(self) -> None:
        """Raise if something is wrong and not only missing: the rest need not be built."""
        if not all(isinstance(error, MissingError) for error in self.errors):
            self.raise_any()

    def raise_any(self) -> None:
        """Raise one ConfigError with all messages, if there are any."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = [f"\n  {number}. {error}" for number, error in enumerate(self.errors, 1)]
            count = f"{len(lines)} things are missing or wrong:"
            raise ConfigError(count + "".join(lines)) from self.errors[0]


def suggest(name: object, known: Iterable[object]) -> str:
    """Return the end of a message: the nearest known name, if any, and a list of all.

    >>> suggest("wieght", ["weight", "start"])
    "; did you mean 'weight'? Known: start, weight"
    """
    names = sorted(str(n) for n in known)
    if not names:
        return ""
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(names)}"


def require_known(names: Iterable[object], known: Iterable[object], problem: str) -> None:
    """Raise ConfigError with a problem such as "no key {!r}" for the first name not known.

    >>> require_known(["weight", "wieght"], ["weight", "start"], "no key {!r}")
    Traceback (most recent call last):
    ...
    lgvq_plugin.sockets.ConfigError: no key 'wieght'; did you mean 'weight'? Known: start, weight
    """
    names, known = [*names], [*known]
    for name in names:
        if name not in known:
            raise ConfigError(f"{problem.format(name)}{suggest(name, known)}")


@contextmanager
def as_config_error(problem: str, *kinds: type[Exception], hint: str = "") -> Iterator[None]:
    """Turn exceptions of some kinds, any by default, into a ConfigError about a `problem`.

    A ConfigError passes as it is, unless it is among the kinds.

    >>> with as_config_error("data.size", ValueError, hint="; give a number"):
    ...     int("large")
    Traceback (most recent call last):
    ...
    lgvq_plugin.sockets.ConfigError: data.size: invalid literal for int()...; give a number
    """
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, ConfigError) and ConfigError not in kinds
        if is_told or not isinstance(error, kinds or Exception):
            raise
        raise ConfigError(f"{problem}: {error}{hint}") from error


def import_target(path: str) -> Any:
    """Return the object at "package.module.Class" or "package.module:Class".

    Raises:
        ConfigError: if the path has no dot, or the module or the attribute does not exist.
    """
    parts = path.replace(":", ".").split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"target {path!r} is no dotted path; expected 'package.module.Class'")
    module_name, attribute = ".".join(parts[:-1]), parts[-1]
    if (moved := new_module(module_name)) is not None:
        message = f"{module_name} has moved to {moved}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module_name = moved
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Distinguish a module that is missing inside the target's own imports.
        missing = error.name or ""
        if not (module_name == missing or module_name.startswith(missing + ".")):
            raise ConfigError(f"target {path!r} needs {missing!r}, not installed") from error
        owner = _try_attribute(module_name)
        if owner is None or not hasattr(owner, attribute):
            raise ConfigError(
                f"target {path!r} does not exist: no module named {missing!r}; "
                "check the spelling, or install the package that holds it"
            ) from error
    except ImportError as error:  # a name that another version of a package has
        raise ConfigError(f"target {path!r} cannot be imported: {error}") from error
    if not hasattr(owner, attribute):
        raise ConfigError(
            f"target {path!r} does not exist: module {module_name!r} has no "
            f"{attribute!r}{suggest(attribute, _defined_in(owner))}"
        )
    return getattr(owner, attribute)


def _defined_in(module: types.ModuleType) -> list[str]:
    """Return the public names that a module defines, not those that it imports."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    home = f"{module.__name__}."  # a package re-exports its submodules' names
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and f"{getattr(value, '__module__', None)}.".startswith(home)
    ]


def _try_attribute(path: str) -> Any:
    """Return what is at `path` if that is no module but, say, a class in one; else None."""
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name, None) if module_name else None
    except ModuleNotFoundError:
        return None


def resolve(socket: str, name: str) -> Any:
    """Return the member `name` of a socket ("guides", "hosts", ...), or any dotted path.

    Raises:
        ConfigError: if the name is neither a member nor a dotted path that exists.
    """
    return import_target(path_of(socket, name))


def path_of(socket: str, name: str) -> str:
    """Return the dotted path that :func:`resolve` imports, without importing it.

    Other packages add members by an entry point of the group "lgvq_plugin.<socket>".

    Raises:
        ConfigError: if the name is neither a member nor a dotted path.

    >>> path_of("hosts", "vqvae")
    'lgvq_plugin.hosts.vqvae.VQVAE'
    """
    members = importlib.import_module(f"{__package__}.{socket}").MEMBERS
    if not isinstance(name, str):
        raise ConfigError(f"a member of {socket} is named by a string, got {name!r}")
    if name in members:
        return f"{__package__}.{socket}.{members[name]}"
    if "." in name or ":" in name:
        return name
    others = registered(socket)
    if name in others:
        return others[name]
    near = suggest(name, [*members, *others])
    raise ConfigError(f"unknown member of {socket}: {name!r}{near}; or give 'pkg.module:Class'")


def registered(socket: str) -> dict[str, str]:
    """Return the dotted paths of the members that other packages add to a socket, by name."""
    return {entry.name: entry.value for entry in entry_points(group=f"{__package__}.{socket}")}


def instantiate(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `{"target": path, "params": {...}}`, as taming does.

    Raises:
        ConfigError: if `target` is missing or does not exist, or its constructor does not take
            the params; what the constructor itself raises is not caught.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        got = f"keys {[*config]}" if isinstance(config, Mapping) else repr(config)
        raise ConfigError(f"expected a mapping with a `target:`, got {got}")
    target = import_target(config["target"])
    params = params_of(config, str(config["target"]))
    check_call(config["target"], target, (), {**params, **extra})
    return target(**params, **extra)


def params_of(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the `params:` of a config, {} for none; ConfigError if they are no mapping."""
    params = {} if config.get("params") is None else config["params"]
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise ConfigError(f"{where}: `params:` must be a mapping, got {params!r}")
    return params


def check_call(
    name: str, target: Any, args: Sequence[Any], params: Mapping[str, Any], *, hint: str = ""
) -> None:
    """Check that `target`, called `name` in messages, takes these arguments, without calling it.

    Raises:
        ConfigError: for missing or unknown arguments; `hint` ends the message about the latter.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins have none
        return
    known = signature.parameters.values()
    names = [one.name for one in known if one.kind in (one.KEYWORD_ONLY, POSITIONAL)]
    strange = [key for key in params if key not in names]
    if strange and not any(one.kind is one.VAR_KEYWORD for one in known):
        unknown = ", ".join(map(repr, strange))
        raise ConfigError(
            f"{name}: unexpected keyword argument {unknown}{suggest(strange[0], names)}; "
            f"given params: {sorted(params)}{hint}"
        )
    with as_config_error(name, TypeError, hint=f"; given params: {sorted(params)}"):
        signature.bind(*args, **params)


POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
FLOAT32 = 3.4028234e38


def check_numbers(where: str, target: Any, params: Mapping[str, Any]) -> None:
    """Raise ConfigError for a numeric param of a loss that is not a finite float32 number."""
    try:
        defaults = {p.name: p.default for p in inspect.signature(target).parameters.values()}
    except (TypeError, ValueError):
        defaults = {}
    for key, value in params.items():
        default = defaults.get(key)
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if not (is_number or key.endswith(("_weight", "_factor", "_start"))):
            continue
        if not isinstance(value, int | float) or not abs(value) <= FLOAT32:
            raise ConfigError(f"{where}.{key}: expected a finite number, got {value!r}")


@contextmanager
def building(where: str, target: str, params: Any) -> Iterator[None]:
    """Turn any exception of a constructor into a ConfigError that names place and key.

    `where` is a section of the config, such as model; the key is searched in `params`.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        message = str(error).strip()
        if "weights_only" in message:  # torch advises to unpickle everything
            message = "a file of weights is damaged, or no checkpoint that can be read safely"
        keys = _suspect_keys(message, frames, dict(_nodes(params, f"{where}.params")))
        looked = f"; look at {', '.join(keys)}" if keys else ""
        last = frames[-1]
        raise ConfigError(
            f"{where}.target: {target} could not be built with these params: "
            f"{type(error).__name__}{': ' if message else ''}{message}, raised in "
            f"{last.filename}:{last.lineno}{looked}; --debug shows the traceback"
        ) from error


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key != "target":
                yield from _nodes(value, f"{path}.{key}")


def _suspect_keys(
    message: str, frames: Sequence[traceback.FrameSummary], nodes: Mapping[str, Any]
) -> list[str]:
    """Return "path: value" of the keys that an exception seems to be about.

    These are the keys whose value (a file) or whose name the message quotes; else those that the
    innermost line of code names, outside of torch and importlib.
    """
    quoted = set(re.findall(r"'(\w+)'", message))
    files = {key: value for key, value in nodes.items() if isinstance(value, str)}
    found = [key for key, value in files.items() if len(value) > 3 and value in message]
    found = found or [key for key in nodes if key.rpartition(".")[2] in quoted]
    outside = (f"{os.sep}torch{os.sep}", f"{os.sep}importlib{os.sep}")
    for frame in reversed(frames):
        if found or any(folder in frame.filename for folder in outside):
            continue
        first = frame.lineno or 0
        last = getattr(frame, "end_lineno", None) or first
        code = " ".join(linecache.getline(frame.filename, n) for n in range(first, last + 1))
        words = set(re.findall(r"\w+", code)) - {"params"}
        found = [key for key in nodes if key.rpartition(".")[2] in words]
    is_inner = {key: isinstance(nodes[key], Mapping) and bool(nodes[key]) for key in found}
    return [key if is_inner[key] else f"{key}: {nodes[key]!r}" for key in found[:3]]
