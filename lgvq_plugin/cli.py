"""The command `lgvq`: a table of commands and their error handling; no logic."""

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from types import ModuleType

from .compat import version_of
from .sockets import ConfigError

COMMANDS = {  # name: ("module:function of argv", what it does)
    "demo": ("bench.demo:main", "a baseline and LG-VQ side by side, on embedded data, in minutes"),
    "train": ("training.run:main", "train a tokenizer from configs"),
    "ablate": ("bench.ablate:main", "train variants over seeds and report what differs"),
    "inspect": ("bench.ablate:inspect", "look at a codebook: its patches, words and places"),
    "eval": ("bench.evaluate:main", "measure checkpoints on held-out images, side by side"),
    "retrofit": ("checkpoints.retrofit:main", "turn an old checkpoint into an LG-VQ run"),
    "export": ("checkpoints.export:main", "write a checkpoint for others to load"),
    "bench": ("bench.speed:main", "time a training step with and without LG-VQ"),
    "configs": ("shipped:main", "list or copy the configs that come with the package"),
    "doctor": ("doctor:main", "report what is installed, what is missing, how to fix it"),
    "data": ("datasets.commands:main", "check a data set, or convert it for fast reading"),
    "cache": ("datasets.cache:main", "encode all captions once, so that training needs no guide"),
}
"""Resolved below this package, and only when called: `lgvq --help` imports no torch."""

PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors about a path the user chose."""


def main(argv: list[str] | None = None) -> int:
    """Run `lgvq`.

    Returns:
        0 success; 2 wrong input; 1 internal failure; 130 interrupted.
    """
    if argv is None:
        _add_working_folder()
    options, command, rest = _parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="lgvq: %(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.DEBUG if options.debug else logging.INFO)
    try:
        module, _, function = COMMANDS[command][0].partition(":")
        return getattr(_import(f"{__package__}.{module}"), function)(rest)
    except KeyboardInterrupt as interrupt:
        default = "interrupted; resume with: lgvq train ... --name RUN --resume auto"
        print(f"lgvq: {str(interrupt) or default}", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, options.debug)


def _report(error: Exception, debug: bool) -> int:
    """Print an error; return 2 if it is about the user's input, 1 otherwise."""
    code, text = 1, f"failed: {type(error).__name__}: {error}"
    if isinstance(error, ConfigError):
        code, text = 2, f"error: {error}"
    elif isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error)):
        text = f"error: {error.name} is not installed: pip install 'lgvq_plugin[{extra}]'"
        code = 2
    elif isinstance(error, FloatingPointError):  # a run that diverged: the message says where
        text = f"failed: {error}"
    elif isinstance(error, BrokenPipeError):  # `lgvq ... | head`: nobody reads on
        text = "the output was closed before its end"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at exit
    elif isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        code, text = 2, (
            f"error: {str(error.filename)!r}: {error.strerror}; check the path and its "
            "permissions, or give another place (-o, --output, --logdir)"
        )  # fmt: skip
    else:
        debug = True
    if debug and not isinstance(error, BrokenPipeError):
        traceback.print_exception(error)
    print(f"lgvq: {text}", file=sys.stderr)
    return code


def _extra_of(error: ModuleNotFoundError) -> str | None:
    from .doctor import extra_of

    return extra_of((error.name or "").partition(".")[0])


def _add_working_folder() -> None:
    """Put the working folder on the path, as `python -m` does: a checkout there is importable."""
    here = os.getcwd()
    if not getattr(sys.flags, "safe_path", False) and not {"", here} & {*sys.path}:
        sys.path.insert(0, here)


def _import(module: str) -> ModuleType:
    """Import a command's module; Ctrl-C meanwhile ends the process at once.

    Libraries drop a KeyboardInterrupt during their imports, and stay half imported.
    """
    if threading.current_thread() is not threading.main_thread():
        return importlib.import_module(module)
    before = signal.signal(signal.SIGINT, _exit)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(number: int, frame: object) -> None:
    os.write(2, b"lgvq: interrupted; nothing was started\n")
    os._exit(130)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Split argv into lgvq's own options, the command, and the command's arguments."""
    lines = "\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lgvq",
        usage="lgvq [-V] [--debug] COMMAND ...",
        description="Language-guided codebooks (LG-VQ) for VQ image tokenizers.",
        epilog=f"commands:\n{lines}\n\n`lgvq COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="store_true", help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    own = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv)) + 1
    rest = [word for word in argv[own:] if word != "--debug"]
    options = parser.parse_args(argv[:own] + ["--debug"] * ("--debug" in argv[own:]))
    if options.version:
        version = version_of("lgvq_plugin") or "(not installed: run from a checkout)"
        print(f"lgvq {version}")
        parser.exit()
    if options.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return options, options.command, rest
