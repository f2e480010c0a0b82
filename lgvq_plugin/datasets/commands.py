"""`lgvq data check|convert PATH`; torch is imported once the arguments are checked."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, path_of, suggest
from . import MEMBERS

FORMATS = ("webdataset", "folder")


def main(argv: list[str]) -> int:
    """Run `lgvq data check PATH [...]` or `lgvq data convert PATH OUT [...]`.

    Returns 0, or 2 if a data set was recognized but cannot be used; wrong input is a ConfigError.
    """
    given = _parser().parse_args(argv)
    if given.workers < 1:
        raise ConfigError(f"--workers must be >= 1, got {given.workers}")
    if not given.path.expanduser().exists():
        raise ConfigError(f"{given.path} does not exist; expected a folder of images or a table")
    if given.member is not None:
        path_of("datasets", given.member)
    shared: dict[str, Any] = {"progress": not given.no_progress}
    for name in ("member", "split", "workers", "encoding", "file_key", "caption_key"):
        if (value := getattr(given, name)) is not None:
            shared[name] = value
    return given.run(given, shared)


def check_settings(format: str, **sizes: int) -> None:
    """Raise ConfigError for a format or size that `lgvq data convert` cannot write."""
    if format not in FORMATS:
        raise ConfigError(f"--format: {format!r}{suggest(format, FORMATS)}")
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lgvq data", description="Work with captioned images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|convert")
    check = commands.add_parser(
        "check",
        help="report what a path holds and whether it can be trained on",
        description="Recognize a data set, decode every image, measure every caption. Nothing "
        "is written without -o. Exit code 2: it cannot be used.",
    )
    convert = commands.add_parser(
        "convert",
        help="write a smaller copy that trains faster",
        description="Shrink every image to `--size` (shorter side) and write tar shards or a "
        "folder. Run it again to resume after a kill. Files that cannot be read are "
        "left out and named in OUT/problems.txt.",
    )
    for command, run in ((check, _check), (convert, _convert)):
        add = command.add_argument
        add("path", type=Path, metavar="PATH", help="folder, table or list of paths")
        add("--as", dest="member", metavar="NAME", help=f"one of {', '.join(MEMBERS)}")
        add("--split", help="this split only")
        add("--encoding", help="of the files with captions (default: utf-8)")
        add("--file-key", help="the column with the images' paths")
        add("--caption-key", help="the column with the captions")
        add("--workers", type=int, default=os.cpu_count() or 1, help="threads")
        add("--no-progress", action="store_true", help="no progress bar")
        command.set_defaults(run=run)
    written = "write problems.txt, report.json and contact sheets there"
    check.add_argument("-o", "--out", type=Path, help=written)
    check.add_argument(
        "--guide", default="micro_clip", help="count captions in this guide's tokens"
    )
    check.add_argument("--max-length", type=int, help="tokens per caption (default: 30)")
    add = convert.add_argument
    add("out", type=Path, metavar="OUT", help="a new folder")
    add("--format", default="webdataset", metavar="|".join(FORMATS))
    add("--size", type=int, default=256, help="shorter side (default: 256)")
    add("--square", action="store_true", help="also cut the square in the middle")
    add("--shard-size", type=int, default=1000, help="images per shard")
    return parser


def _check(given: argparse.Namespace, shared: dict[str, Any]) -> int:
    path_of("guides", given.guide)
    from .check import as_text, check

    guide = {"use": given.guide}
    if given.max_length is not None:
        guide["max_length"] = given.max_length
    result = check(given.path, given.out, guide=guide, **shared)
    print(as_text(result))
    return 0 if result.is_usable else 2


def _convert(given: argparse.Namespace, shared: dict[str, Any]) -> int:
    sizes = {"size": given.size, "shard_size": given.shard_size}
    check_settings(given.format, **sizes)
    from .convert import Settings, convert

    settings = Settings(format=given.format, square=given.square, **sizes)
    result = convert(given.path, given.out, settings, **shared)
    for split, count in result.written.items():
        print(f"{split}: {count:,} images")
    if result.resumed:
        print(f"{result.resumed:,} of them were written by an earlier run")
    if result.problems:
        print(f"{len(result.problems):,} files left out, named in {result.out / 'problems.txt'}")
    where = f"target: {given.format}, params: {{root: {result.out}}}"
    print(f"wrote {result.out}; in a config: {where}")
    return 0 if all(result.written.values()) else 2
