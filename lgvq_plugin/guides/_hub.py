"""Checks before the Hugging Face hub is used, so that a machine without a network fails fast."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from ..sockets import ConfigError

TIMEOUT_SECONDS = 5.0
DEMO_ONLY = (
    "guide: {use: micro_clip} needs no file, but only knows the words of the embedded scenes; it "
    "is for them and for demos, not for photographs"
)


def cache_folder(repository: str, cache_dir: str | None) -> str:
    """Return the folder in which the hub's client caches a repository."""
    root = Path(cache_dir or constants.HF_HUB_CACHE)
    return str(root / f"models--{repository.replace('/', '--')}")


ADVICE = {
    "text": "Copy that cache from a machine with a network (guide.cache_dir names another folder), "
    "or give a file, guide: {use: open_clip, pretrained: PATH}, or a folder, {use: open_clip, "
    f"model: 'local-dir:PATH'}}, or {{use: huggingface, model: PATH}}. {DEMO_ONLY}",
    "image": "Copy that cache from a machine with a network (guides.vision.cache_dir names another "
    "folder), or give a local file or, for huggingface_vision, a folder: guides: {vision: {use: "
    "..., model: ..., checkpoint: PATH}}. pretrained: false gives random weights, for tests",
}


def require_reachable(
    url: str, sought: str, place: str, kind: Literal["text", "image"] = "text"
) -> None:
    """Raise unless `url` answers within seconds; the hub's own client would retry for a minute.

    Args:
        url: an address of the server that has the weights.
        sought: what is looked for, for the message.
        place: local path that was searched, for the message.
        kind: of the guide.

    Raises:
        ConfigError: if there is no answer.
    """
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
    key = {"text": "guide", "image": "guides.vision"}[kind]
    raise ConfigError(
        f"{key}: no {kind} weights. Sought: {sought}; not in {place}, and {url} cannot be reached "
        f"({cause}). {ADVICE[kind]}"
    )
