"""Commands around data: `lgvq data check`, `lgvq data convert`, `lgvq cache`."""

from ..sockets import ConfigError, suggest

FORMATS = ("webdataset", "folder")


def check_settings(format: str, **sizes: int) -> None:
    """Check what `lgvq data convert` shall write; raises ConfigError."""
    if format not in FORMATS:
        raise ConfigError(f"--format: {format!r}{suggest(format, FORMATS)}")
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value}")
