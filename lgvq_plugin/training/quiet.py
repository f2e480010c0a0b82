"""What Lightning and the host's own classes say, and a user of `lgvq` need not hear."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

# `lightning` and `pytorch_lightning` share one variable for their logger: the last import sets it.
LIGHTNING = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
WARNINGS = (
    "many workers",
    "in eval mode at the start",
    "LeafSpec",
)  # LPIPS is in eval mode rightly


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes (devices, tips, `Trainer.fit stopped`) back; its warnings pass.

    Example:
        >>> with quiet_lightning():
        ...     logging.getLogger("pytorch_lightning.utilities").isEnabledFor(logging.INFO)
        False
    """
    loggers = [logging.getLogger(name) for name in LIGHTNING]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for known in WARNINGS:
                warnings.filterwarnings("ignore", f".*{known}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def prints_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Send what a host's constructor prints to stderr: stdout is for tables.

    Example:
        >>> with prints_to_stderr():
        ...     print("Working with z of shape (1, 256, 16, 16) = 65536 dimensions.")
    """
    return contextlib.redirect_stdout(sys.stderr)
