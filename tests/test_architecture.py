"""The layout of the package: no import circles, few private files, heavy libraries where needed."""

import ast
import functools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import lgvq_plugin

ROOT = Path(lgvq_plugin.__path__[0])
FILES = sorted(ROOT.rglob("*.py"))
HOMES = {  # a heavy library is imported in these folders only
    "open_clip": {"guides"},
    "lightning": {"training", "checkpoints"},
    "torchmetrics": {"bench"},
    "torchvision": {"datasets", "bench", "guides", "training"},
    "transformers": {"guides", "bench"},
}
LIGHT = ["torch", "numpy", "lightning", "pytorch_lightning", "taming", "open_clip", "torchmetrics"]
MAX_FUNCTION = 60
MAX_CHAIN = 8


def module_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text())


@functools.cache
def imports_of(file, *, top_level=False):
    """The dotted names of the imports in a file; `top_level`: outside functions only."""
    return tuple(_imports_of(file, top_level=top_level))


def _imports_of(file, *, top_level):
    tree = tree_of(file)
    package = file.relative_to(ROOT.parent).parts[:-1]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            head = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            for alias in node.names:
                name = f"{head}.{alias.name}"
                yield name if name in MODULES else head
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph():
    """Return module -> modules of ours that it imports when it is imported."""
    return {
        module: {name for name in imports_of(file, top_level=True) if name in MODULES} - {module}
        for module, file in MODULES.items()
    }


@pytest.mark.slow
def test_there_is_no_import_circle():
    edges, done, path = graph(), set(), []

    def visit(module):
        assert module not in path, f"import circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        path.append(module)
        for other in edges[module]:
            visit(other)
        path.pop()
        done.add(module)

    for module in edges:
        visit(module)


@pytest.mark.slow
def test_the_chain_of_imports_in_the_core_is_short():
    edges = graph()
    core = {module for module in edges if module.count(".") == 1}

    @functools.cache
    def depth(module):
        return 1 + max((depth(other) for other in edges[module] & core), default=0)

    deepest = max(core - {"lgvq_plugin.cli"}, key=depth)
    assert depth(deepest) <= MAX_CHAIN, f"{deepest}: {depth(deepest)} files deep"


@pytest.mark.slow
def test_a_private_file_serves_several_files_of_its_folder():
    users = defaultdict(set)
    for file in FILES:
        for name in imports_of(file):
            users[name].add(file)
    for module, file in MODULES.items():
        if file.stem.startswith("_") and not file.stem.startswith("__"):
            here = {user for user in users[module] if user.parent == file.parent}
            assert len(here) > 1, f"{module} is used by {[user.name for user in here]} only"


def name_of(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_stay_small(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            docs = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            length = node.end_lineno - node.lineno + 1 - docs
            assert length <= MAX_FUNCTION, f"{node.name}: {length} lines"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_heavy_libraries_have_one_home(file):
    folder = file.relative_to(ROOT).with_suffix("").parts[0]
    for name in imports_of(file):
        library = name.partition(".")[0]
        assert folder in HOMES.get(library, {folder}), f"{folder} imports {library}"


def loaded_by(code, names):
    line = f"import sys; {code}; print([n for n in {names!r} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_by("import lgvq_plugin, lgvq_plugin.cli", LIGHT) == "[]"


@pytest.mark.slow
def test_the_loss_imports_neither_lightning_nor_open_clip_before_it_is_built():
    names = ["lightning", "pytorch_lightning", "taming", "open_clip"]
    code = "from lgvq_plugin import LGVQLoss, CodeViT, TextDecoder, attach, functional"
    assert loaded_by(code, names) == "[]"
