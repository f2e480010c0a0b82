"""What taming-transformers needs and today's stack no longer has, supplied when it is imported.

`import lgvq_plugin` installs two finders, which act only once somebody imports these names:

    pytorch_lightning.utilities.distributed, torch._six   supplied where nobody else has them
    taming                                                a clone on the path, before the wheel

so that `from taming.models.vqgan import VQModel` works after it. Nothing that exists is replaced.
`patches/` holds the same fixes as diffs.
"""

import importlib
import inspect
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from . import moved
from .sockets import ConfigError, check_call, check_numbers, import_target

logger = logging.getLogger(__name__)

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
TAMING_WHEELS = ("taming-transformers", "taming-transformers-rom1504", "taming")
TAMING_CLONE = (
    "git clone https://github.com/CompVis/taming-transformers && "
    "export PYTHONPATH=$PWD/taming-transformers:$PYTHONPATH"
)
"""The command that gets a complete taming: VectorQuantizer2, GumbelVQ, taming.data."""
ONLY_IN_CLONE = ("VectorQuantizer2", "GumbelVQ", "taming.data", "taming.modules.misc")
LPIPS_NAMES = re.compile(
    r"(\w*_)?LPIPS(Loss)?|LearnedPerceptualImagePatchSimilarity|Perceptual(Loss|Network)",
    re.IGNORECASE,
)
"""What loss modules call the network."""
LPIPS_WEIGHTS = re.compile(r"(perceptual|lpips)\w*(weight|coeff?|lambda)|lambda_(perceptual|lpips)")


def _rank_zero_only() -> dict[str, Any]:
    rank_zero = importlib.import_module("pytorch_lightning.utilities.rank_zero")
    return {"rank_zero_only": rank_zero.rank_zero_only}


SUPPLIED: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    # module: (why it is missing, the names in it that taming reads)
    "pytorch_lightning.utilities.distributed": ("removed in Lightning 1.8", _rank_zero_only),
    "torch._six": (
        "removed in torch 2.0",
        lambda: {"string_classes": (str, bytes), "int_classes": int, "inf": float("inf")},
    ),
}


def install() -> None:
    """Install the two finders; idempotent. `import lgvq_plugin` calls it."""
    moved.install(_CloneFirst, first=True)
    moved.install(_Supplier)


def patch() -> dict[str, str]:
    """Import now what the finders would supply on demand, and return it: module -> why."""
    install()
    supplied = {}
    for name, (why, _) in SUPPLIED.items():
        if find_spec(name.partition(".")[0]) is not None:
            spec = importlib.import_module(name).__spec__
            if spec is not None and isinstance(spec.loader, _Supplier):
                supplied[name] = why
    return supplied


class _Supplier(moved.ModuleMaker):
    """Makes the modules of :data:`SUPPLIED` that no other finder found."""

    def makes(self, name: str) -> bool:
        return name in SUPPLIED

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        why, names = SUPPLIED[spec.name]
        module = types.ModuleType(spec.name, f"Supplied by lgvq_plugin.compat: {why}.")
        vars(module).update(names())
        return module


class _CloneFirst(MetaPathFinder):
    """The first finder: `import taming` means a clone on the path, if there is one.

    Python itself prefers the wheel, wherever it is on the path, because a clone has no
    `taming/__init__.py`; and the wheel lacks VectorQuantizer2, GumbelVQ and half of taming.data.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        folder = _clone() if name == "taming" else None
        if folder is None:
            return None
        if wheels := taming_wheels():
            message = "taming: the clone in %s is used, not the installed %s"
            logger.info(message, folder.parent, wheels[0])
        if (init := folder / "__init__.py").is_file():
            return spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec


def _clone() -> Path | None:
    """Return the first `taming` on `sys.path`, outside site-packages, that is a clone."""
    for place in (Path(entry or ".").absolute() for entry in sys.path):
        is_installed = {"site-packages", "dist-packages"} & {*place.parts}
        if not is_installed and (place / "taming" / "models" / "vqgan.py").is_file():
            return place / "taming"
    return None


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def taming_wheels() -> list[str]:
    """Return name and version of the installed distributions of taming."""
    return [f"{name} {version}" for name in TAMING_WHEELS if (version := version_of(name))]


def explain_import(error: BaseException | None) -> str:
    """Return the fix for an ImportError that the wheel of taming causes; "" for any other."""
    if isinstance(error, ImportError) and any(name in str(error) for name in ONLY_IN_CLONE):
        return f"; the wheel of taming-transformers lacks it, a clone has it: {TAMING_CLONE}"
    return ""


def build_loss(target: str, args: tuple[Any, ...], params: Mapping[str, Any]) -> Any:
    """Build the loss class at `target`; its LPIPS network only if the weight is not 0.

    Raises:
        ConfigError: if it does not exist or does not take the params, or weights are missing.
    """
    loss = import_target(target)
    check_loss(target, loss, args, params)
    with lpips_only_if_used(perceptual_weight_of(target, params), target):
        return loss(*args, **params)


def check_loss(
    target: str, loss: Any, args: Sequence[Any], params: Mapping[str, Any], where: str = ""
) -> None:
    """Check the params of a base loss at `where` in the config.

    Raises:
        ConfigError: if the class does not take them, or a weight is no finite number.
    """
    hint = (
        "; if they are another loss's, name it: target: lgvq_plugin.over.<its target>, or "
        "params.base: {target: <its target>}"
    )
    check_call(f"{where}: {target}" if where else target, loss, args, params, hint=hint)
    check_numbers(where or target, loss, params)


def perceptual_weight_of(target: str | None, params: Mapping[str, Any] | None) -> float:
    """Return the weight of LPIPS in `params`, else the loss class's own default, else 1."""
    given = {key: value for key, value in (params or {}).items() if LPIPS_WEIGHTS.fullmatch(key)}
    try:
        if not given and target:
            signature = inspect.signature(import_target(target)).parameters.items()
            named = {key: entry.default for key, entry in signature if LPIPS_WEIGHTS.fullmatch(key)}
            given = {k: v for k, v in named.items() if v is not inspect.Parameter.empty}
        return max((abs(float(value)) for value in given.values()), default=1.0)
    except (ConfigError, TypeError, ValueError):
        return 1.0


@contextmanager
def lpips_only_if_used(perceptual_weight: float, target: str | None = None) -> Iterator[None]:
    """Inside the context the loss class `target` builds no LPIPS network if its weight is 0.

    This holds for the loss's own network, that of `lpips` and that of torchmetrics. With a weight
    above 0 taming's linear heads come from torchmetrics, which carries the very file that would
    be downloaded; ConfigError if VGG16's weights are missing and cannot be downloaded.
    """
    with ExitStack() as stack:
        for network in _lpips_classes(target):
            build = _no_lpips if perceptual_weight == 0 else _reporting(network.__init__)
            stack.enter_context(_replaced(network, "__init__", build))
            owner = sys.modules[network.__module__]
            if perceptual_weight != 0 and hasattr(owner, "get_ckpt_path"):
                heads = _heads_path(owner.get_ckpt_path)
                stack.enter_context(_replaced(owner, "get_ckpt_path", heads))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute inside the context; afterwards it is as before, or inherited again."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _lpips_classes(target: str | None) -> list[Any]:
    """Return the LPIPS networks named in the module of a loss class, or of a base of it."""
    loss = import_target(target) if target else None
    if not isinstance(loss, type) or loss.__module__.startswith(f"{__package__}."):
        return []  # LGVQLoss builds its base by `build_loss`
    from torch import nn

    found: dict[Any, None] = {}  # in order, without repeats
    for module in {sys.modules.get(cls.__module__) for cls in loss.__mro__}:
        values = list(vars(module).values()) if module else []
        for inner in [value for value in values if isinstance(value, types.ModuleType)]:
            values += [v for k, v in vars(inner).items() if LPIPS_NAMES.fullmatch(k)]
        classes = (v for v in values if isinstance(v, type) and issubclass(v, nn.Module))
        found |= dict.fromkeys(cls for cls in classes if LPIPS_NAMES.fullmatch(cls.__name__))
    return [cls for cls in found if cls not in loss.__mro__]


def _no_lpips(self: Any, *args: Any, **kwargs: Any) -> None:
    """Replace a network's `__init__`: it becomes a module without parameters, of distance 0."""
    from torch import nn

    nn.Module.__init__(self)
    self.__class__ = nn.Identity  # nothing of the network's own class reads what was not built
    self.forward = _zero_distance


def _zero_distance(inputs: Any, *args: Any, **kwargs: Any) -> Any:
    return inputs.new_zeros(inputs.shape[0], 1, 1, 1)


def _reporting(build: Callable[..., None]) -> Callable[..., None]:
    """Return a network's `__init__` that reports which weights could not be loaded."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():  # `pretrained=` is torchvision's old name for weights
                warnings.simplefilter("ignore", UserWarning)
                build(self, *args, **kwargs)
        except OSError as error:  # URLError, timeouts and requests' errors are all OSErrors
            raise ConfigError(
                f"perceptual_weight > 0 needs VGG16's weights: {VGG_FILE}, from {VGG_URL}, "
                f"to {vgg_path()}; that failed ({error}). Copy the file there, or set "
                "perceptual_weight: 0 to train without LPIPS"
            ) from error

    return __init__


def vgg_path() -> Path:
    """Return where torchvision looks for VGG16's weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _heads_path(fallback: Callable[..., str]) -> Callable[..., str]:
    """Return a replacement for taming's get_ckpt_path that finds torchmetrics' copy of the file."""
    spec = find_spec("torchmetrics")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    bundled = root / "functional" / "image" / "lpips_models" / "vgg.pth"

    def path(name: str, *args: Any, **kwargs: Any) -> str:
        is_there = name == "vgg_lpips" and bundled.is_file()
        return str(bundled) if is_there else fallback(name, *args, **kwargs)

    return path
