"""Names in YAML become classes here: the only dynamic import of the package."""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class ConfigError(ValueError):
    """The user's input is wrong; the message says what, where and how to mend it.

    A DataLoader raises a worker's error again with the worker's traceback as its message; only
    the message proper is kept of that.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if text.startswith("Caught ") and "Traceback (most recent call last)" in text:
            text = re.split(rf"^[\w.]*\b{type(self).__name__}: ", text, flags=re.M)[-1].strip()
        super().__init__(text)


class Problems:
    """Collects errors of the user's input, so that one message names all of them.

    Example:
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
        """Keep a ConfigError that is raised inside the context, unless it is known already."""
        try:
            yield
        except ConfigError as error:
            if not any(str(error) in str(known) for known in self.errors):
                self.errors.append(error)

    def raise_any(self) -> None:
        """Raise one ConfigError with all messages; nothing if there is none."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = [f"  {number}. {error}" for number, error in enumerate(self.errors, 1)]
            count = f"{len(lines)} things are missing or wrong:"
            raise ConfigError("\n".join([count, *lines])) from self.errors[0]


def suggest(name: object, known: Iterable[object]) -> str:
    """Return the end of a message: the nearest known name, if one is near, and a list of all.

    Example:
        >>> suggest("wieght", ["weight", "start"])
        "; did you mean 'weight'? Known: start, weight"
    """
    names = sorted(str(n) for n in known)
    if not names:
        return ""
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(names)}"


def import_target(path: str) -> Any:
    """Return the object at "package.module.Class" or "package.module:Class".

    Raises:
        ConfigError: if the path has no dot, or the module or the attribute does not exist.

    Example:
        >>> import_target("collections.OrderedDict").__name__
        'OrderedDict'
    """
    parts = path.replace(":", ".").split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"target {path!r} is no dotted path; expected 'package.module.Class'")
    module_name, attribute = ".".join(parts[:-1]), parts[-1]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is missing *inside* the target's own imports is another story: tell it.
        missing = error.name or ""
        if not (module_name == missing or module_name.startswith(missing + ".")):
            raise ConfigError(f"target {path!r} needs {missing!r}, not installed") from error
        outer, _, name = module_name.rpartition(".")
        owner = _try_attribute(outer, name)
        if owner is None or not hasattr(owner, attribute):
            raise ConfigError(
                f"target {path!r} does not exist: no module named {missing!r}; "
                "check the spelling, or install the package that holds it"
            ) from error
        return getattr(owner, attribute)
    except ImportError as error:  # a name that another version of a package has
        raise ConfigError(f"target {path!r} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f"target {path!r} does not exist: module {module_name!r} has no "
            f"{attribute!r}{suggest(attribute, [n for n in dir(module) if n[0] != '_'])}"
        )
    return getattr(module, attribute)


def _try_attribute(module_name: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module_name), name, None) if module_name else None
    except ModuleNotFoundError:
        return None


def resolve(socket: str, name: str) -> Any:
    """Return the member `name` of a socket ("guides", "hosts", ...), or any dotted path.

    Raises:
        ConfigError: if the name is neither a member nor a dotted path that exists.

    Example:
        >>> resolve("hosts", "vqvae").__name__
        'VQVAE'
    """
    return import_target(path_of(socket, name))


def path_of(socket: str, name: str) -> str:
    """Return the dotted path that :func:`resolve` imports, without importing it.

    Raises:
        ConfigError: if the name is neither a member nor a dotted path.

    Example:
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
    raise ConfigError(
        f"unknown member of {socket}: {name!r}{suggest(name, members)}; or give 'pkg.module:Class'"
    )


def instantiate(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `{"target": path, "params": {...}}`, taming's convention.

    Raises:
        ConfigError: without a `target`, with one that does not exist, or if its constructor
            does not take the given params.
        TypeError: one that the constructor itself raised.

    Example:
        >>> instantiate({"target": "fractions.Fraction", "params": {"numerator": 3}})
        Fraction(3, 1)
    """
    if not isinstance(config, Mapping) or "target" not in config:
        got = f"keys {[*config]}" if isinstance(config, Mapping) else repr(config)
        raise ConfigError(f"expected a mapping with a `target:`, got {got}")
    target = import_target(config["target"])
    params = config.get("params") or {}
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise ConfigError(f"{config['target']}: `params:` must be a mapping, got {params!r}")
    try:
        return target(**params, **extra)
    except TypeError as error:
        if "argument" not in str(error) or (error.__traceback__ and error.__traceback__.tb_next):
            raise
        raise ConfigError(f"{config['target']}: {error}; given params: {sorted(params)}") from error
