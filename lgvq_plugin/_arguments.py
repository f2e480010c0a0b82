"""What commands that take configs and overrides share."""

import argparse
from collections.abc import Sequence


def add_shortcuts(parser: argparse.ArgumentParser, *, steps: bool = False) -> None:
    """Add `--data FOLDER`, and `--max-steps N` where a command trains."""
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="images with captions, in place of the config's data section; its batch_size stays",
    )
    if steps:
        parser.add_argument(
            "--max-steps", type=int, metavar="N", help="same as training.max_steps=N"
        )


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str], *keys: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parse argv with `key=value` words anywhere, also behind `-b a.yaml b.yaml`.

    Args:
        parser: of the command.
        argv: its arguments.
        keys: options that take several words; theirs lose their key=value words.

    Returns:
        What the parser made of it, and the key=value words, not checked yet.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("-b", "--base", nargs="+", action="extend", default=[])
        >>> given, overrides = parse_words(parser, ["-b", "a.yaml", "x=1"], "base")
        >>> given.base, overrides
        (['a.yaml'], ['x=1'])
    """
    given, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    overrides: list[str] = []
    for key in keys:
        words = getattr(given, key)
        overrides += [word for word in words if "=" in word]
        setattr(given, key, [word for word in words if "=" not in word])
    return given, overrides + rest
