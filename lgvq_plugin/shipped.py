"""`lgvq configs`: list the configs that come with the package, or copy them to edit and train."""

import argparse
import shutil
from pathlib import Path

from .sockets import ConfigError, require_known

FOLDER = Path(__file__).parent / "configs"


def shipped() -> dict[str, Path]:
    """Return name -> file of every config of the package, such as "ablation/winner".

    >>> shipped()["paper"].name
    'paper.yaml'
    """
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in files}


def title(path: Path) -> str:
    """Return the first sentence of the comment at the top of a config, "" if it has none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return " ".join(lines).partition(". ")[0].partition("; ")[0].rstrip(".:")


def copy(names: list[str], folder: Path, *, force: bool = False) -> list[Path]:
    """Copy configs into `folder`, keeping their subfolders; no names: all of them.

    Raises ConfigError for an unknown name, or a file that exists already (unless `force`).
    """
    known = shipped()
    chosen = [name.removesuffix(".yaml") for name in names] or [*known]
    require_known(chosen, known, "no config {!r}")
    targets = {folder / f"{name}.yaml": known[name] for name in chosen}
    existing = [str(target) for target in targets if target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ConfigError(f"{existing[0]!r}{more} exists; use --force, or another folder for -o")
    for target, source in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return [*targets]


def main(argv: list[str]) -> int:
    """Run `lgvq configs`; the exit code is 0."""
    parser = argparse.ArgumentParser(prog="lgvq configs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="configs to copy; default: all")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="copy them to this folder")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    given = parser.parse_args(argv)
    if given.output is None:
        if given.names:
            parser.error("give -o DIR to copy configs")
        width = max(map(len, shipped()))
        for name, path in shipped().items():
            print(f"{name:<{width}}  {title(path)}".rstrip())
        print("\nCopy them with: lgvq configs -o configs")
        return 0
    for path in copy(given.names, given.output, force=given.force):
        print(path)
    return 0
