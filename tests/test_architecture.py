"""The house plan: imports flow down, neighbours are strangers, heavy libraries have one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lgvq_plugin

ROOT = Path(lgvq_plugin.__path__[0])
FLOORS = [  # top floor first; a module may import only from floors below its own
    {"__init__", "__main__"},
    {"cli"},
    {"demo"},
    {"ablation"},
    {"evaluation", "data_tools", "doctor"},
    {"checkpoints"},
    {"probes", "training"},
    {"over"},
    {"loss"},
    {"_loss_parts"},
    {"hosts"},
    {"alignment"},
    {"objectives"},
    {"heads", "guides", "datasets", "metrics"},
    {"grains"},
    {"functional"},
    {"config"},
    {"compat"},
    {"_fields", "_device", "_files", "_finite", "_safe_load"},
    {"types", "sockets", "dist", "_arguments"},
]
FLOOR = {name: len(FLOORS) - i for i, names in enumerate(FLOORS) for name in names}
SOCKETS = {"objectives", "guides", "hosts", "datasets", "probes"}  # members: named by config only
HOMES = {  # a heavy library is imported in these rooms only
    "open_clip": {"guides"},
    "lightning": {"training", "checkpoints"},
    "torchmetrics": {"metrics"},
    "torchvision": {"datasets", "metrics"},
    "transformers": {"guides", "metrics"},
}
LIGHT = ["torch", "numpy", "lightning", "pytorch_lightning", "taming", "open_clip", "torchmetrics"]
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file):
    return str(file.relative_to(ROOT))


def all_imports(file):
    """Yield (line, full dotted names) of every import, inside functions too."""
    package = (ROOT.name, *file.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            head = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((node.lineno, (*head, a.name)) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(a.name.split("."))) for a in node.names)


def own_imports(file):
    """Yield (line, room, member) of every import of our own package."""
    for line, name in all_imports(file):
        if name[0] == ROOT.name:
            yield line, *(*name[1:], "", "")[:2]


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent != ROOT or f.stem != "__init__"], ids=name_of
)
def test_imports_flow_down(file):
    room, *rest = file.relative_to(ROOT).with_suffix("").parts
    member = rest[0] if rest else ""
    assert room in FLOOR, f"{room} has no floor: give it one in FLOORS"
    for line, other, other_member in own_imports(file):
        where = f"{file.name}:{line}"
        if other == "" or (other not in FLOOR and room in ("cli", "__main__")):
            continue  # the bare package: its name, not its content
        assert other in FLOOR, f"{where} imports {other!r} from the package root; name the module"
        if other == room:  # neighbours in one room share only base and private files
            shared = member == "__init__" or other_member in ("", "base") or other_member[0] == "_"
            is_module = (ROOT / room / f"{other_member}.py").exists()
            assert shared or not is_module, f"{where} {member} imports its neighbour {other_member}"
        else:
            assert FLOOR[other] < FLOOR[room], f"{where} {room} must not import {other}"
            named = other in SOCKETS and (ROOT / other / f"{other_member}.py").exists()
            assert not named or other_member == "base", f"{where} names a member of {other}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_stay_small(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - told <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_heavy_libraries_have_one_home(file):
    room = file.relative_to(ROOT).with_suffix("").parts[0]
    for line, name in all_imports(file):
        assert room in HOMES.get(name[0], {room}), f"{file.name}:{line} {room} imports {name[0]}"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        f"import sys, lgvq_plugin, lgvq_plugin.cli; print([n for n in {LIGHT} if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_loss_imports_neither_lightning_nor_open_clip_before_it_is_built():
    code = (
        "import sys; from lgvq_plugin import LGVQLoss, CodeViT, TextDecoder, attach, functional;"
        "print([n for n in ('lightning', 'pytorch_lightning', 'taming', 'open_clip') "
        "if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
