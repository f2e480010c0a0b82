"""The Hugging Face hub: what is cached, whether it answers, downloads, and its errors as ours."""

import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from .sockets import ConfigError

Kind = Literal["text", "image"]
"""Of a guide."""
TIMEOUT_SECONDS = 5.0
KEYS = {"text": "guide", "image": "guides.vision"}
"""Where the config has the guide of a kind."""
DEMO_ONLY = (
    "guide: {use: micro_clip} needs no file, but only knows the words of the embedded scenes; it "
    "is for them and for demos, not for photographs"
)
ADVICE = {
    "text": "Copy that cache from a machine with a network (guide.cache_dir names another folder), "
    "or give a file, guide: {use: open_clip, pretrained: PATH}, or a folder, {use: open_clip, "
    f"model: 'local-dir:PATH'}}, or {{use: huggingface, model: PATH}}. {DEMO_ONLY}",
    "image": "Copy that cache from a machine with a network (guides.vision.cache_dir names another "
    "folder), or give a local file or, for huggingface_vision, a folder: guides: {vision: {use: "
    "..., model: ..., checkpoint: PATH}}. pretrained: false gives random weights, for tests",
}


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


def find_cached(repository: str, files: Iterable[str], cache_dir: str | None) -> Path | None:
    """Return the first of some files of a repository that is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file, cache_dir=cache_dir) for file in files)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def require_hub(repository: str, sought: str, cache_dir: str | None, kind: Kind) -> None:
    """Raise ConfigError unless the hub answers, for a repository that is not cached."""
    from huggingface_hub import constants

    folder = Path(cache_dir or constants.HF_HUB_CACHE)
    place = folder / f"models--{repository.replace('/', '--')}"
    require_reachable(constants.ENDPOINT, sought, str(place), kind)


def require_reachable(url: str, sought: str, place: str, kind: Kind) -> None:
    """Raise unless `url` answers within seconds; the hub's own client would retry for a minute.

    Args:
        url: an address of the server that has the weights.
        sought: what is looked for, for the message.
        place: local path that was searched, for the message.
        kind: of the guide.

    Raises:
        ConfigError: if there is no answer.
    """
    from huggingface_hub import constants

    cause = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
            return
        except urllib.error.HTTPError:
            return  # it answered
        except (OSError, ValueError) as error:
            cause = str(getattr(error, "reason", error))
    raise ConfigError(
        f"{KEYS[kind]}: no {kind} weights. Sought: {sought}; not in {place}, and {url} cannot be "
        f"reached ({cause}). {ADVICE[kind]}"
    )
