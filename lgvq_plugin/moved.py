"""Old dotted paths of modules that have moved still work, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MOVED = {
    "ablation": "bench.ablate",
    "ablation.base": "bench.records",
    "ablation.run": "bench.jobs",
    "checkpoints.base": "checkpoints.load",
    "data_tools": "datasets.commands",
    "data_tools.cache": "datasets.cache",
    "data_tools.data": "datasets.commands",
    "datasets.celeba_hq": "datasets.pickled",
    "datasets.cocoqa": "datasets.coco",
    "datasets.cub200": "datasets.pickled",
    "datasets.list_file": "datasets.folder",
    "datasets.pairs_table": "datasets.folder",
    "datasets.tables": "datasets.folder",
    "datasets.textcaps": "datasets.pickled",
    "datasets.vqa2": "datasets.coco",
    "demo": "bench.demo",
    "dist": "functional",
    "evaluation": "bench.evaluation",
    "evaluation.base": "bench.evaluation",
    "evaluation.run": "bench.evaluate",
    "grains": "functional",
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
    "probes.questions": "bench.probes.vqa",
    "training.base": "training.build",
}
"""Old module: new one, both relative to this package."""


SPLIT = {"training.base": ("training.config", "training.settings")}
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
        return f"{package}.bench.{'' if folder == 'ablation' else folder + '.'}{module}"
    return None


class _OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: an old module forwards every attribute to the new one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if new_module(name) is None:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = str(new_module(spec.name))
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        old = spec.name.partition(".")[2]
        paths = [new, *(f"{__package__}.{path}" for path in SPLIT.get(old, ()))]
        modules = [importlib.import_module(path) for path in paths]

        def find(name: str) -> Any:
            if name.startswith("__"):  # with the new module's __path__ it would be imported twice
                raise AttributeError(name)
            owner = next((each for each in modules if hasattr(each, name)), modules[0])
            return getattr(owner, name)

        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = find
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Install the finder; idempotent. `import lgvq_plugin` calls it."""
    if not any(type(finder).__name__ == "_OldPaths" for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
