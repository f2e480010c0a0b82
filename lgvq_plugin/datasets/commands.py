"""Commands around data: `lgvq data check`, `lgvq data convert`, `lgvq cache`."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, path_of, suggest
from . import MEMBERS

FORMATS = ("webdataset", "folder")


def check_settings(format: str, **sizes: int) -> None:
    """Check what `lgvq data convert` shall write; raises ConfigError."""
    if format not in FORMATS:
        raise ConfigError(f"--format: {format!r}{suggest(format, FORMATS)}")
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value}")


# -- The command `lgvq data check|convert PATH`; torch is imported once its arguments are checked --


def main(argv: list[str]) -> int:
    """Run `lgvq data`.

    Args:
        argv: `check PATH [...]` or `convert PATH OUT [...]`.

    Returns:
        0; 2 if a data set was recognized but cannot be used.

    Raises:
        ConfigError: for wrong input.
    """
    parser = argparse.ArgumentParser(prog="lgvq data", description="Look at captioned images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|convert")
    _check_options(commands)
    _convert_options(commands)
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise ConfigError(f"--workers must be >= 1, got {options.workers}")
    if not options.path.expanduser().exists():
        raise ConfigError(f"{options.path} does not exist; expected a folder of images or a table")
    if options.member is not None:
        path_of("datasets", options.member)
    return options.run(options)


def _check_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="tell what lies at a path and whether it can be trained on",
        description="Recognize a data set, decode every image, measure every caption. Nothing "
        "is written without -o. Exit code 2: it cannot be used.",
    )
    _shared_options(parser)
    parser.add_argument(
        "-o", "--out", type=Path, help="write problems.txt, report.json and contact sheets there"
    )
    parser.add_argument(
        "--guide", default="micro_clip", help="whose tokens captions are counted in"
    )
    parser.add_argument("--max-length", type=int, help="tokens a caption is cut at (default: 30)")
    parser.set_defaults(run=_check)


def _convert_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a smaller copy that trains faster",
        description="Shrink every image to `--size` (shorter side) and write tar shards or a "
        "folder. Run it again after a kill: what is done stays. Files that cannot be read are "
        "left out and named in OUT/problems.txt.",
    )
    _shared_options(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--format", default="webdataset", metavar="|".join(FORMATS))
    parser.add_argument("--size", type=int, default=256, help="shorter side (default: 256)")
    parser.add_argument("--square", action="store_true", help="cut the square in the middle too")
    parser.add_argument("--shard-size", type=int, default=1000, help="images of a shard")
    parser.set_defaults(run=_convert)


def _shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="folder, table or list of paths")
    parser.add_argument("--as", dest="member", metavar="NAME", help=f"one of {', '.join(MEMBERS)}")
    parser.add_argument("--split", help="this split only")
    parser.add_argument("--encoding", help="of the files with captions (default: utf-8)")
    parser.add_argument("--file-key", help="the column with the images' paths")
    parser.add_argument("--caption-key", help="the column with the captions")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _check(options: argparse.Namespace) -> int:
    path_of("guides", options.guide)
    from .check import as_text, check

    guide: dict[str, Any] = {"use": options.guide}
    if options.max_length is not None:
        guide["max_length"] = options.max_length
    result = check(
        options.path,
        options.out,
        member=options.member,
        split=options.split,
        guide=guide,
        workers=options.workers,
        progress=not options.no_progress,
        **_dataset_options(options),
    )
    print(as_text(result))
    return 0 if result.is_usable else 2


def _dataset_options(options: argparse.Namespace) -> dict[str, str]:
    given = {name: getattr(options, name) for name in ("encoding", "file_key", "caption_key")}
    return {name: value for name, value in given.items() if value is not None}


def _convert(options: argparse.Namespace) -> int:
    check_settings(options.format, size=options.size, shard_size=options.shard_size)
    from .convert import Settings, convert

    result = convert(
        options.path,
        options.out,
        Settings(
            format=options.format,
            size=options.size,
            square=options.square,
            shard_size=options.shard_size,
        ),
        member=options.member,
        split=options.split,
        workers=options.workers,
        progress=not options.no_progress,
        **_dataset_options(options),
    )
    for split, count in result.written.items():
        print(f"{split}: {count:,} images")
    if result.resumed:
        print(f"{result.resumed:,} of them were there from an earlier run")
    if result.problems:
        print(f"{len(result.problems):,} files left out, named in {result.out / 'problems.txt'}")
    member = "folder" if options.format == "folder" else "webdataset"
    print(f"wrote {result.out}; in a config: target: {member}, params: {{root: {result.out}}}")
    return 0 if all(result.written.values()) else 2
