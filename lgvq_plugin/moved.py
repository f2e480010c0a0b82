"""Old dotted paths of modules that have moved still work, with a DeprecationWarning."""

import sys
import types
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

MOVED = {
    "ablation": "bench.ablate",
    "ablation.base": "bench.records",
    "ablation.run": "bench.jobs",
    "bench.metrics.clip_score": "bench.metrics.perceptual",
    "bench.probes.attributes": "bench.probes.ridge",
    "bench.probes.captioning": "bench.probes.language",
    "bench.probes.image_judge": "bench.probes.classifiers",
    "bench.probes.masked_words": "bench.probes.language",
    "bench.probes.retrieval": "bench.probes.ridge",
    "bench.probes.synthesis": "bench.probes.text_to_image",
    "bench.probes.vqa": "bench.probes.language",
    "bench.synthesis": "bench.measures",
    "checkpoints.base": "checkpoints.load",
    "checkpoints.diffusers": "checkpoints.export",
    "checkpoints.layout": "checkpoints.read",
    "checkpoints.side_by_side": "checkpoints.retrofit",
    "data_tools": "datasets.commands",
    "data_tools.cache": "datasets.cache",
    "data_tools.data": "datasets.commands",
    "datasets.celeba_hq": "datasets.pickled",
    "datasets.cocoqa": "datasets.coco",
    "datasets.convert": "datasets.commands",
    "datasets.cub200": "datasets.pickled",
    "datasets.list_file": "datasets.folder",
    "datasets.pairs_table": "datasets.folder",
    "datasets.tables": "datasets.folder",
    "datasets.textcaps": "datasets.pickled",
    "datasets.vqa2": "datasets.coco",
    "datasets.workers": "datasets.base",
    "demo": "bench.demo",
    "dist": "functional",
    "device": "arguments",
    "evaluation": "bench.evaluation",
    "evaluation.base": "bench.evaluation",
    "evaluation.run": "bench.evaluate",
    "finite": "functional",
    "grains": "functional",
    "guides.huggingface_vision": "guides.huggingface",
    "guides.open_clip_vision": "guides.open_clip",
    "heads.code_vit": "heads",
    "heads.text_decoder": "heads",
    "hosts.base": "host",
    "metrics": "bench.metrics",
    "metrics.code_geometry": "bench.metrics.codebook",
    "objectives.base": "objectives",
    "objectives.global_semantic": "objectives",
    "objectives.masked_text": "objectives",
    "objectives.relationship": "objectives",
    "probes": "bench.probes",
    "probes.base": "bench.probes.features",
    "probes.questions": "bench.probes.language",
    "training.base": "training.build",
    "training.loggers": "training.callbacks",
    "training.misfit": "training.driver",
}
"""Old module: new one, both relative to this package."""
SPLIT = {
    "training.base": ("training.config", "training.settings"),
    "training.loggers": ("training.settings",),
}
"""Old modules whose names are now in further ones."""


def new_module(name: str) -> str | None:
    """Return where the module `name` is now, None if it has not moved.

    >>> new_module("lgvq_plugin.metrics.retrieval")
    'lgvq_plugin.bench.metrics.retrieval'
    """
    package, _, old = name.partition(".")
    if package != __package__ or not old:
        return None
    if old in MOVED:
        return f"{package}.{MOVED[old]}"
    folder, _, module = old.partition(".")
    if module and folder in ("ablation", "metrics", "probes"):
        now = f"bench.{module}" if folder == "ablation" else f"bench.{old}"
        return f"{package}.{MOVED.get(now, now)}"
    return None


class ModuleMaker(MetaPathFinder, Loader):
    """A finder of modules without a file; it comes after all others."""

    def makes(self, name: str) -> bool:
        """Whether the module `name` comes from here."""
        raise NotImplementedError

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is made here; importlib calls it."""
        return ModuleSpec(name, self, is_package=True) if self.makes(name) else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: `create_module` has filled it."""


def install(finder: type[MetaPathFinder], *, first: bool = False) -> None:
    """Put a finder on `sys.meta_path` unless one of its name, also of a reloaded module, is there.

    Args:
        finder: its class.
        first: before all others; else after them.
    """
    known = {(type(each).__module__, type(each).__name__) for each in sys.meta_path}
    if (finder.__module__, finder.__name__) not in known:
        sys.meta_path.insert(0 if first else len(sys.meta_path), finder())


class OldPaths(ModuleMaker):
    """Makes old modules, which forward every attribute to the new ones."""

    def makes(self, name: str) -> bool:
        """Whether the module has moved."""
        return new_module(name) is not None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Return the old module, with a warning."""
        new = str(new_module(spec.name))
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        split = SPLIT.get(spec.name.partition(".")[2], ())
        modules = [import_module(path) for path in (new, *(f"{__package__}.{s}" for s in split))]

        def find(name: str) -> Any:
            if name.startswith("__"):  # with the new module's __path__ it would be imported twice
                raise AttributeError(name)
            owner = next((each for each in modules if hasattr(each, name)), modules[0])
            return getattr(owner, name)

        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = find
        return module
