"""The command `lgvq`: a table of commands and what to do with their errors; no logic."""

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from importlib import metadata
from types import ModuleType

from .sockets import ConfigError

COMMANDS = {  # name: ("module:function of argv", what it does)
    "demo": ("bench.demo:main", "a baseline and LG-VQ side by side, on embedded data, in minutes"),
    "train": ("training.run:main", "train a tokenizer from configs"),
    "ablate": ("bench.ablate:main", "train variants over seeds and report what differs"),
    "inspect": ("bench.ablate:inspect", "look at a codebook: its patches, words and places"),
    "eval": ("bench.evaluate:main", "measure checkpoints on held-out images, side by side"),
    "retrofit": ("checkpoints.retrofit:main", "turn an old checkpoint into an LG-VQ run"),
    "export": ("checkpoints.export:main", "write a checkpoint for others to load"),
    "configs": ("shipped:main", "list or copy the configs that come with the package"),
    "doctor": ("doctor:main", "tell what is installed, what is missing, how to mend it"),
    "data": ("datasets.commands:main", "check a data set, or convert it for fast reading"),
    "cache": ("datasets.cache:main", "encode all captions once, so that training needs no guide"),
}
"""Resolved below this package, and only when called: `lgvq --help` imports no torch."""

PATHS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors that are about a path the user chose."""


def main(argv: list[str] | None = None) -> int:
    """Run `lgvq`.

    Returns:
        0 done; 2 the user's input is wrong; 1 a failure of ours; 130 interrupted.
    """
    if argv is None:
        _see_working_folder()
    options, command, rest = _parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="lgvq: %(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.DEBUG if options.debug else logging.INFO)
    try:
        module, _, function = COMMANDS[command][0].partition(":")
        return getattr(_import(f"{__package__}.{module}"), function)(rest)
    except ConfigError as error:
        if options.debug:
            traceback.print_exc()
        print(f"lgvq: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return _report_os_error(error, options.debug)
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; go on with: lgvq train ... --name RUN --resume auto"
        print(f"lgvq: {told}", file=sys.stderr)
        return 130
    except FloatingPointError as error:  # a run that diverged: the message says where
        if options.debug:
            traceback.print_exc()
        print(f"lgvq: failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        return _report_failure(error)


def _report_os_error(error: OSError, debug: bool) -> int:
    """Report a path that cannot be used as the user's input, anything else as a failure."""
    if isinstance(error, BrokenPipeError):  # `lgvq ... | head`: nobody reads on
        sys.stderr.write("lgvq: the output was closed before its end\n")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at exit
        return 1
    if error.errno not in PATHS or error.filename is None:
        return _report_failure(error)
    if debug:
        traceback.print_exc()
    print(
        f"lgvq: error: {str(error.filename)!r}: {error.strerror}; check the path and its "
        "permissions, or give another place (-o, --output, --logdir)",
        file=sys.stderr,
    )
    return 2


def _report_failure(error: Exception) -> int:
    traceback.print_exc()
    print(f"lgvq: failed: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _see_working_folder() -> None:
    """Put the working folder on the path, as `python -m` does: a checkout there is importable."""
    here = os.getcwd()
    if not getattr(sys.flags, "safe_path", False) and not {"", here} & {*sys.path}:
        sys.path.insert(0, here)


def _import(module: str) -> ModuleType:
    """Import a command's module; Ctrl-C meanwhile ends the process at once.

    Libraries drop a KeyboardInterrupt in their imports, and stay half imported.
    """
    if threading.current_thread() is not threading.main_thread():
        return importlib.import_module(module)
    before = signal.signal(signal.SIGINT, _leave)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"lgvq: interrupted; nothing was begun\n")
    os._exit(130)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Split argv into lgvq's own options, the command, and the command's arguments."""
    lines = "\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lgvq",
        usage="lgvq [-V] [--debug] COMMAND ...",
        description="Language-guided codebooks (LG-VQ) for VQ image tokenizers.",
        epilog=f"commands:\n{lines}\n\n`lgvq COMMAND --help` tells a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="store_true", help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    own = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv)) + 1
    rest = [word for word in argv[own:] if word != "--debug"]
    options = parser.parse_args(argv[:own] + ["--debug"] * ("--debug" in argv[own:]))
    if options.version:
        print(f"lgvq {_version()}")
        parser.exit()
    if options.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return options, options.command, rest


def _version() -> str:
    try:
        return metadata.version("lgvq_plugin")
    except metadata.PackageNotFoundError:
        return "(not installed: run from a checkout)"
