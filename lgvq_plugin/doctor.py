"""`lgvq doctor`: what is installed, which taming that is, what is missing, and how to fix it.

Every check is a function that returns findings; one that fails is a finding itself.
"""

import argparse
import ast
import importlib.util
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from . import compat

EXTRAS = {  # distribution: what it is for
    "transformers": "guides huggingface and huggingface_vision",
    "diffusers": "lgvq export --format diffusers",
    "webdataset": "tests of tar shards",
    "datasets": "data sets of the Hugging Face hub",
    "torch-fidelity": "FID",
    "pycocoevalcap": "BLEU, ROUGE-L, CIDEr-D",
    "nltk": "WUPS",
}
CLIP = ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
INSTALL_VGG = "python -c \"import torchvision as t; t.models.vgg16(weights='IMAGENET1K_V1')\""
Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level  # note: something works without it
    what: str  # the subject
    told: str  # what was found
    command: str = ""  # the one command that fixes it


def examine(*, full: bool = False) -> list[Finding]:
    """Return all findings; nothing here raises. `full` also imports what training imports."""
    found: list[Finding] = []
    for check in (stack, taming, supplied, devices, weights, *([imports] if full else [])):
        try:
            found += check()
        except Exception as error:  # a broken installation can fail in any way
            found.append(Finding("problem", check.__name__, f"{type(error).__name__}: {error}"))
    return found


def requirements() -> dict[str, list[str]]:
    """Return extra -> "name>=version" of each requirement in pyproject.toml; "" without an extra.

    >>> "jinja2>=3.1" in requirements()["bench"]
    True
    """
    found: dict[str, list[str]] = {}
    for line in metadata.requires("lgvq_plugin") or []:
        wish, _, condition = (part.strip() for part in line.partition(";"))
        extra = re.search(r"extra == [\"'](\w+)", condition)
        if not re.match("lgvq[_-]plugin", wish):
            found.setdefault(extra[1] if extra else "", []).append(wish)
    return found


def required() -> list[str]:
    """Return the requirements of the commands; `taming` examines taming-transformers itself."""
    wishes = [wish for extra in ("", "train", "bench") for wish in requirements().get(extra, [])]
    return [wish for wish in wishes if not wish.startswith("taming")]


def extra_of(module: str) -> str | None:
    """Return the extra that installs a module, None if none does.

    >>> extra_of("pytorch_lightning"), extra_of("taming"), extra_of("numpy")
    ('train', 'train', None)
    """
    names = {"PIL": "pillow", "taming": "taming-transformers"}
    name = names.get(module, module).replace("_", "-")
    for extra in ("train", "bench", "eval", "data", "hf", "diffusers"):
        wishes = requirements().get(extra, [])
        if name in {re.split(r"[><=]", wish)[0].replace("_", "-") for wish in wishes}:
            return extra
    return None


def stack() -> list[Finding]:
    """Compare installed versions with those that are needed."""
    found = [Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")]
    for wish in required():
        name, _, oldest = wish.partition(">=")
        version = compat.version_of(name)
        is_new = version is not None and _numbers(version) >= _numbers(oldest)
        text, command = f"{version or 'not installed'}, needed: {wish}", f"pip install '{wish}'"
        found.append(_either(is_new, name, str(version), text, command, level="problem"))
    for name, purpose in EXTRAS.items():
        version, text = compat.version_of(name), f"not installed: {purpose}"
        is_here = version is not None
        found.append(_either(is_here, name, f"{version} ({purpose})", text, f"pip install {name}"))
    return found


def _either(
    is_fine: bool, what: str, found: str, otherwise: str, command: str, level: Level = "note"
) -> Finding:
    return Finding("ok", what, found) if is_fine else Finding(level, what, otherwise, command)


def taming() -> list[Finding]:
    """Report which `taming` an import would give, and whether it can be imported."""
    installed = compat.taming_wheels()
    spec = importlib.util.find_spec("taming")
    if spec is None and installed:
        text = f"{installed[0]} is installed without its files (a clone with no __init__.py)"
        source = _source_of(installed[0].split()[0])
        command = f"export PYTHONPATH={source}:$PYTHONPATH" if source else compat.TAMING_CLONE
        return [Finding("problem", "taming", text, command)]
    if spec is None:
        return [Finding("problem", "taming", "not found", "pip install taming-transformers")]
    place = Path(next(iter(spec.submodule_search_locations or [""])))
    kind = "wheel" if {"site-packages", "dist-packages"} & {*place.parts} else "clone"
    files = {"VectorQuantizer2": "modules/vqvae/quantize.py", "GumbelVQ": "models/vqgan.py"}
    has = {name: _mentions(place / file, f"class {name}") for name, file in files.items()}
    text = f"{kind} at {place}"
    if installed:
        text += f", used before {installed[0]}" if kind == "clone" else f" ({installed[0]})"
    parts = (f"{name}: {'yes' if found else 'no'}" for name, found in has.items())
    return [Finding("ok", "taming", f"{text}; {', '.join(parts)}"), *_unusable(place, kind, has)]


def _unusable(place: Path, kind: str, has: Mapping[str, bool]) -> list[Finding]:
    """Return what keeps the `taming` at `place`, or latent-diffusion over it, from working."""
    found = []
    ldm = importlib.util.find_spec("ldm")
    if ldm is not None and not has["VectorQuantizer2"]:
        where = next(iter(ldm.submodule_search_locations or [""]))
        text = f"ldm ({where}) imports VectorQuantizer2, which the {kind} of taming lacks"
        found.append(Finding("problem", "ldm", text, compat.TAMING_CLONE))
    if not _mentions(place / "models/vqgan.py", "from main import"):
        return found
    text = "its models import main.py, which "
    if importlib.util.find_spec("main") is None:
        command = f"export PYTHONPATH={place.parent}:$PYTHONPATH"
        found.append(Finding("problem", "taming", f"{text}is not on the path", command))
    elif missing := _missing(place.parent / "main.py"):
        text += f"needs {', '.join(missing)}"
        found.append(Finding("problem", "taming", text, f"pip install {' '.join(missing)}"))
    return found


def _missing(file: Path) -> list[str]:
    """Return the packages that a script imports at its top and that are not installed."""
    modules: list[str] = []
    for node in ast.parse(file.read_text(errors="replace")).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.append(node.module)
    roots = sorted({module.split(".")[0] for module in modules})
    return [name for name in roots if importlib.util.find_spec(name) is None]


def _source_of(distribution: str) -> str | None:
    """Return the folder that `pip install -e` was run in, if it was."""
    try:
        text = metadata.distribution(distribution).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = json.loads(text or "{}").get("url", "")
    return unquote(urlparse(url).path) if url.startswith("file:") else None


def supplied() -> list[Finding]:
    """Report what old code misses in today's stack, and compat supplies at run time."""
    found = []
    for module in compat.SUPPLIED:
        owner = module.split(".")[0].replace("_", "-")
        if compat.version_of(owner):
            file = metadata.distribution(owner).locate_file(f"{module.replace('.', '/')}.py")
            if not Path(str(file)).is_file():
                text = f"supplies {module} after `import lgvq_plugin`"
                found.append(Finding("ok", "compat", text))
    return found


def devices() -> list[Finding]:
    """List the accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("ok", "cpu", f"{cores} cores, {torch.get_num_threads()} threads of torch")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        found.append(Finding("ok", f"gpu {index}", text))
    if torch.backends.mps.is_available():
        found.append(Finding("ok", "gpu", "Apple's (mps)"))
    if len(found) == 1 and Path("/proc/driver/nvidia/version").is_file():
        text = "none that torch can use, though there is a driver"
        found.append(Finding("problem", "gpu", text, "pip install --force-reinstall torch"))
    elif len(found) == 1:
        found.append(Finding("note", "gpu", "none that torch can use"))
    return found


def weights() -> list[Finding]:
    """Report which frozen weights are on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    clip = try_to_load_from_cache(*CLIP)
    embedded = next((Path(__file__).parent / "guides").glob("*micro_clip/*.safetensors"), None)
    size = embedded.stat().st_size / 1e6 if embedded else 0.0
    vgg = compat.vgg_path()
    return [
        _either(
            isinstance(clip, str),
            "guide open_clip",
            f"ViT-B-32/openai: {clip}",
            "CLIP ViT-B-32/openai is not here: it is downloaded at first use (605 MB), or give a "
            "file: guide: {use: open_clip, pretrained: PATH}",
            f"hf download {' '.join(CLIP)}",
        ),
        _either(
            embedded is not None,
            "guide micro_clip",
            f"embedded, {size:.1f} MB",
            "its weights are not in this installation",
            "pip install --force-reinstall --no-deps lgvq_plugin",
            level="problem",
        ),
        _either(
            vgg.is_file(),
            "LPIPS",
            f"VGG16's weights: {vgg}",
            f"VGG16's weights are not at {vgg}: downloaded at first use (528 MB), or set "
            "perceptual_weight: 0",
            INSTALL_VGG,
        ),
    ]


def imports() -> list[Finding]:
    """Import what training imports, with compat's help."""
    compat.patch()
    found = []
    for name in ("taming.models.vqgan", "lightning.pytorch", "open_clip", "torchmetrics"):
        try:
            import_module(name)
            found.append(Finding("ok", f"import {name}", "works"))
        except Exception as error:  # whatever its module level does
            missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
            command = f"pip install {missing.split('.')[0]}" if missing else ""
            text = f"{type(error).__name__}: {error}"
            found.append(Finding("problem", f"import {name}", text, command))
    return found


def report(found: Sequence[Finding]) -> str:
    """Return the findings as text, problems last, each with its command.

    >>> print(report([Finding("ok", "torch", "2.9"), Finding("problem", "x", "gone", "get x")]))
      torch             2.9
    <BLANKLINE>
    1 problem:
    1. x: gone
         get x
    """
    lines = [f"  {f.what:<17} {f.told}" for f in found if f.level == "ok"]
    for level, title in (("note", "works without"), ("problem", "problem")):
        chosen = [f for f in found if f.level == level]
        plural = "s" if level == "problem" and len(chosen) > 1 else ""
        lines += ["", f"{len(chosen)} {title}{plural}:"] if chosen else []
        for number, finding in enumerate(chosen, 1):
            lines.append(f"{number}. {finding.what}: {finding.told}")
            lines += [f"     {finding.command}"] if finding.command else []
    if not any(f.level == "problem" for f in found):
        lines += ["", "no problem found"]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `lgvq doctor`; the exit code is 1 if there is a problem to fix. Notes are none."""
    parser = argparse.ArgumentParser(
        prog="lgvq doctor",
        description="Report what is installed, which taming is found, and how to fix what is not. "
        "Exit code 1: there is a problem.",
    )
    parser.add_argument("--full", action="store_true", help="also import all of it (slower)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    given = parser.parse_args(argv)
    found = examine(full=given.full)
    print(json.dumps([asdict(f) for f in found], indent=2) if given.json else report(found))
    return int(any(finding.level == "problem" for finding in found))


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 10, 1) of "2.10.1+cu128"."""
    head = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in head[0].split(".")) if head else (0,)


def _mentions(file: Path, word: str) -> bool:
    return file.is_file() and word in file.read_text(errors="replace")
