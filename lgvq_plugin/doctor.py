"""`lgvq doctor`: what is installed, which taming that is, what is missing, and how to mend it.

Every check is a function that returns findings; one that fails is a finding itself.
"""

import argparse
import ast
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from . import compat

EXTRAS = {  # distribution: what it is for
    "transformers": "guide: {use: huggingface}",
    "diffusers": "lgvq export --format diffusers",
    "webdataset": "tests of tar shards",
    "datasets": "data sets of the Hugging Face hub",
    "torch-fidelity": "FID",
    "pycocoevalcap": "BLEU, ROUGE-L, CIDEr-D",
    "nltk": "WUPS",
}
CLIP = ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        level: ok, note (something works without it) or problem.
        what: the subject.
        told: what was found.
        command: the one command that mends it, or "".
    """

    level: Level
    what: str
    told: str
    command: str = ""


def examine(*, full: bool = False) -> list[Finding]:
    """Return all findings; nothing here raises.

    Args:
        full: also import what training imports, which takes some seconds.
    """
    checks: list[Callable[[], list[Finding]]] = [stack, taming, supplied, devices, weights]
    if full:
        checks.append(imports)
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a broken installation can fail in any way
            found.append(Finding("problem", check.__name__, f"{type(error).__name__}: {error}"))
    return found


def required() -> list[str]:
    """Return what pyproject.toml requires, as "name>=version", without the extras and taming.

    >>> "jinja2>=3.1" in required()
    True
    """
    wishes = (line.partition(";") for line in metadata.requires("lgvq_plugin") or [])
    return [
        wish.strip()
        for wish, _, condition in wishes
        if "extra" not in condition and not wish.startswith("taming")  # `taming` looks closer
    ]


def stack() -> list[Finding]:
    """Compare installed versions with those that are needed."""
    found = [Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")]
    for wish in required():
        name, _, oldest = wish.partition(">=")
        version = _version(name)
        told = version or "not installed"
        if version is None or _numbers(version) < _numbers(oldest):
            told += f", needed: {wish}"
            found.append(Finding("problem", name, told, f"pip install '{wish}'"))
        else:
            found.append(Finding("ok", name, told))
    for name, purpose in EXTRAS.items():
        version = _version(name)
        if version is None:
            found.append(Finding("note", name, f"not installed: {purpose}", f"pip install {name}"))
        else:
            found.append(Finding("ok", name, f"{version} ({purpose})"))
    return found


def taming() -> list[Finding]:
    """Tell which `taming` an import would give, and whether it can be imported."""
    installed = [f"{name} {_version(name)}" for name in compat.TAMING_WHEELS if _version(name)]
    spec = importlib.util.find_spec("taming")
    if spec is None:
        if installed:
            told = f"{installed[0]} is installed without its files (a clone with no __init__.py)"
            source = _source_of(installed[0].split()[0])
            command = f"export PYTHONPATH={source}:$PYTHONPATH" if source else compat.TAMING_CLONE
            return [Finding("problem", "taming", told, command)]
        return [Finding("problem", "taming", "not found", "pip install taming-transformers")]
    place = Path(next(iter(spec.submodule_search_locations or [""])))
    kind = "wheel" if {"site-packages", "dist-packages"} & {*place.parts} else "clone"
    has = {
        name: _mentions(place / file, f"class {name}")
        for name, file in (
            ("VectorQuantizer2", "modules/vqvae/quantize.py"),
            ("GumbelVQ", "models/vqgan.py"),
        )
    }
    told = f"{kind} at {place}"
    if installed:
        told += f", used before {installed[0]}" if kind == "clone" else f" ({installed[0]})"
    parts = (f"{name}: {'yes' if found else 'no'}" for name, found in has.items())
    return [Finding("ok", "taming", f"{told}; {', '.join(parts)}"), *_unusable(place, kind, has)]


def _unusable(place: Path, kind: str, has: Mapping[str, bool]) -> list[Finding]:
    """Return what keeps the `taming` at `place`, or latent-diffusion over it, from working."""
    found = []
    ldm = importlib.util.find_spec("ldm")
    if ldm is not None and not has["VectorQuantizer2"]:
        where = next(iter(ldm.submodule_search_locations or [""]))
        told = f"ldm ({where}) imports VectorQuantizer2, which the {kind} of taming lacks"
        found.append(Finding("problem", "ldm", told, compat.TAMING_CLONE))
    if _mentions(place / "models/vqgan.py", "from main import"):
        if importlib.util.find_spec("main") is None:
            told = "its models import main.py, which is not on the path"
            command = f"export PYTHONPATH={place.parent}:$PYTHONPATH"
            return [*found, Finding("problem", "taming", told, command)]
        missing = _missing(place.parent / "main.py")
        if missing:
            told = f"its models import main.py, which needs {', '.join(missing)}"
            found.append(Finding("problem", "taming", told, f"pip install {' '.join(missing)}"))
    return found


def _missing(file: Path) -> list[str]:
    """Return the packages that a script imports at its top and that are not installed."""
    roots: set[str] = set()
    for node in ast.parse(file.read_text(errors="replace")).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return sorted(name for name in roots if importlib.util.find_spec(name) is None)


def _source_of(distribution: str) -> str | None:
    """Return the folder that `pip install -e` was run in, if it was."""
    try:
        text = metadata.distribution(distribution).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = json.loads(text or "{}").get("url", "")
    return unquote(urlparse(url).path) if url.startswith("file:") else None


def supplied() -> list[Finding]:
    """Tell what old code misses in today's stack, and compat supplies at run time."""
    lightning, torch = _folder("pytorch-lightning"), _folder("torch")
    gone = []
    if lightning and not (lightning / "pytorch_lightning/utilities/distributed.py").is_file():
        gone.append("pytorch_lightning.utilities.distributed")
    if torch and not (torch / "torch/_six.py").is_file():
        gone.append("torch._six")
    return [Finding("ok", "compat", f"supplies {name} after `import lgvq_plugin`") for name in gone]


def devices() -> list[Finding]:
    """List the accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("ok", "cpu", f"{cores} cores, {torch.get_num_threads()} threads of torch")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        told = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        found.append(Finding("ok", f"gpu {index}", told))
    if torch.backends.mps.is_available():
        found.append(Finding("ok", "gpu", "Apple's (mps)"))
    if len(found) == 1:
        driver = Path("/proc/driver/nvidia/version").is_file()
        told = "none that torch can use" + (", though there is a driver" if driver else "")
        level: Level = "problem" if driver else "note"
        command = "pip install --force-reinstall torch" if driver else ""
        found.append(Finding(level, "gpu", told, command))
    return found


def weights() -> list[Finding]:
    """Tell which frozen weights lie on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    found = []
    cached = try_to_load_from_cache(*CLIP)
    if isinstance(cached, str):
        found.append(Finding("ok", "guide open_clip", f"ViT-B-32/openai: {cached}"))
    else:
        told = "CLIP ViT-B-32/openai is not here: it is downloaded at first use (605 MB), or "
        told += "give a file: guide: {use: open_clip, pretrained: PATH}"
        command = f"hf download {CLIP[0]} {CLIP[1]}"
        found.append(Finding("note", "guide open_clip", told, command))
    embedded = sorted((Path(__file__).parent / "guides").glob("*micro_clip/*.safetensors"))
    if embedded:
        size = embedded[0].stat().st_size / 1e6
        found.append(Finding("ok", "guide micro_clip", f"embedded, {size:.1f} MB"))
    else:
        told = "its weights are not in this installation"
        command = "pip install --force-reinstall --no-deps lgvq_plugin"
        found.append(Finding("problem", "guide micro_clip", told, command))
    vgg = compat.vgg_path()
    if vgg.is_file():
        found.append(Finding("ok", "LPIPS", f"VGG16's weights: {vgg}"))
    else:
        told = f"VGG16's weights are not at {vgg}: downloaded at first use (528 MB), or set "
        told += "perceptual_weight: 0"
        command = "python -c \"import torchvision as t; t.models.vgg16(weights='IMAGENET1K_V1')\""
        found.append(Finding("note", "LPIPS", told, command))
    return found


def imports() -> list[Finding]:
    """Import what training imports, with compat's help."""
    compat.patch()
    found = []
    for name in ("taming.models.vqgan", "lightning.pytorch", "open_clip", "torchmetrics"):
        try:
            import_module(name)
            found.append(Finding("ok", f"import {name}", "works"))
        except Exception as error:  # whatever its module level does
            told = f"{type(error).__name__}: {error}"
            missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
            command = f"pip install {missing.split('.')[0]}" if missing else ""
            found.append(Finding("problem", f"import {name}", told, command))
    return found


def report(found: Sequence[Finding]) -> str:
    """Return the findings as text, problems last, each with its command.

    Example:
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
        if not chosen:
            continue
        plural = "s" if level == "problem" and len(chosen) > 1 else ""
        lines += ["", f"{len(chosen)} {title}{plural}:"]
        for number, finding in enumerate(chosen, 1):
            lines.append(f"{number}. {finding.what}: {finding.told}")
            lines += [f"     {finding.command}"] if finding.command else []
    if not any(f.level == "problem" for f in found):
        lines += ["", "no problem found"]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `lgvq doctor`.

    Args:
        argv: `[--full] [--json]`.

    Returns:
        0 if there is no problem to mend, else 1; notes are none.
    """
    parser = argparse.ArgumentParser(
        prog="lgvq doctor",
        description="Tell what is installed, which taming is found, and how to mend what is not. "
        "Exit code 1: there is a problem.",
    )
    parser.add_argument("--full", action="store_true", help="also import all of it (slower)")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(argv)
    found = examine(full=given.full)
    print(json.dumps([asdict(f) for f in found], indent=2) if given.json else report(found))
    return int(any(finding.level == "problem" for finding in found))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    Example:
        >>> _numbers("2.10.1+cu128") > _numbers("2.5")
        True
    """
    head = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in head[0].split(".")) if head else (0,)


def _folder(distribution: str) -> Path | None:
    try:
        return Path(str(metadata.distribution(distribution).locate_file("")))
    except metadata.PackageNotFoundError:
        return None


def _mentions(file: Path, word: str) -> bool:
    return file.is_file() and word in file.read_text(errors="replace")
