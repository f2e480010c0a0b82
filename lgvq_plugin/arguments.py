"""What commands share: configs, overrides, and the device."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .sockets import ConfigError

if TYPE_CHECKING:
    import torch

HEADS = (
    *("model", "data", "training", "lightning", "evaluation"),
    *("lgvq", "recipe", "objectives", "dataset"),
)
"""Where the key of an override begins: the sections of a config and the short forms."""
KEY = re.compile(r"[\w-]+(\.[\w-]+|\[\d+\])*")
FILES = (".yaml", ".yml", ".json", ".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def is_override(word: str) -> bool:
    """Tell whether a word is `key=value` and not the name of a file with "=" in it.

    >>> is_override("training.max_steps=5"), is_override("run/step=3.ckpt")
    (True, False)
    """
    key, equals, _ = word.partition("=")
    if not equals or not KEY.fullmatch(key) or os.path.exists(word):
        return False
    return _head(key) in HEADS or not word.endswith(FILES)


def add_shortcuts(parser: argparse.ArgumentParser, *, trained: Sequence[str] = ()) -> None:
    """Add `--data FOLDER`; where a command trains one of `trained`, `--max-steps`, `--train`."""
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="images with captions, in place of the config's data section; its batch_size stays",
    )
    if trained:
        parser.add_argument(
            "--max-steps", type=int, metavar="N", help="same as training.max_steps=N"
        )
        parser.add_argument(
            "--train",
            choices=trained,
            help="part that learns beside the heads (default: all); heads: nothing else, so that "
            "the tokenizer stays bit-identical; lora: low-rank adapters (training.lora)",
        )


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str], *keys: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parse argv with `key=value` words anywhere, also behind `-b a.yaml b.yaml`.

    The word right behind an option is always its value. Further words are values too, unless they
    are overrides: a path may hold "=", as Lightning's `epoch=3-step=900.ckpt` does.

    Args:
        parser: of the command.
        argv: its arguments.
        keys: options that take several paths. Behind other options only a dotted key of a known
            section makes an override, so that a label such as `step=3` remains one.

    Returns:
        What the parser made of it, and the key=value words, not checked yet.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("-b", "--base", nargs="+", action="extend", default=[])
    >>> given, overrides = parse_words(parser, ["-b", "a.yaml", "x=1", "lr=1.yaml"], "base")
    >>> given.base, overrides
    (['a.yaml', 'lr=1.yaml'], ['x=1'])
    """
    words: list[str] = []
    overrides: list[str] = []
    option = previous = ""
    for word in argv:
        is_first = previous.startswith("-") and "=" not in previous
        if word.startswith("-"):
            option = word.lstrip("-").partition("=")[0]
        takes_paths = any(key.startswith(option) for key in keys)
        is_dotted = "." in word.partition("=")[0] and _head(word) in HEADS
        is_free = not is_first and is_override(word) and (takes_paths or is_dotted)
        (overrides if is_free else words).append(word)
        previous = word
    given, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    last = {word: at for at, word in enumerate(argv)}  # the later of two equal keys wins
    return given, sorted(overrides + rest, key=last.__getitem__)


def choose_device(name: str | None = None) -> "torch.device":
    """Return the device of `--device`; None: a GPU if there is one.

    Raises:
        ConfigError: if torch knows no such device, or this machine has none.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r}: {cause}; `--device cpu` works everywhere") from error
    return device


def _head(key: str) -> str:
    return re.split(r"[.\[=]", key)[0]
