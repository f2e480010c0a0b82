"""The Hugging Face hub: download a repository, and turn its errors into ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .sockets import ConfigError


def download(name: str, revision: str | None = None) -> Path:
    """Return the local folder of the hub's repository `organization/repository`.

    Raises ConfigError if the name has another form, huggingface_hub is not installed, or the
    download failed.
    """
    if name.count("/") != 1:
        raise ConfigError(f"no folder {name!r}, and no hub repository (organization/repository)")
    lacks = f"no folder {name!r}"
    with hub_errors(f"{lacks}; downloads need", f"{lacks}, and the download failed"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision))


@contextmanager
def hub_errors(needs: str, failed: str, rest: str = "") -> Iterator[None]:
    """Turn what the hub raises into a ConfigError."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{needs} huggingface_hub: pip install huggingface_hub") from error
    except Exception as error:  # network, rights, names: all of them the hub's own classes
        raise ConfigError(f"{failed} ({type(error).__name__}: {error}){rest}") from error
