"""What fetching foreign weights needs: a quick answer offline, and an untouched random stream."""

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

from ..sockets import ConfigError

REACH_SECONDS = 5.0
DEMO_ONLY = (
    "guide: {use: micro_clip} needs no file, but knows the words of the embedded scenes only: it "
    "is for them and for demos, not for photographs"
)


def cache_folder(repository: str, cache_dir: str | None) -> str:
    """Return where the hub's client keeps a repository."""
    root = Path(cache_dir or constants.HF_HUB_CACHE)
    return str(root / f"models--{repository.replace('/', '--')}")


def reach(url: str, sought: str, place: str) -> None:
    """Raise unless `url` answers soon; the hub's own client would retry for most of a minute.

    Args:
        url: an address of the server that has the weights.
        sought: what is looked for, in words.
        place: where on this machine it was not.

    Raises:
        ConfigError: if there is no answer.
    """
    cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if cause is None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            return  # it answered
        except (OSError, ValueError) as error:
            cause = str(getattr(error, "reason", error))
    if cause is not None:
        raise ConfigError(
            f"guide: no text weights. Sought: {sought}; not in {place}, and {url} cannot be "
            f"reached ({cause}). Copy that cache from a machine with a network (guide.cache_dir "
            "names another folder), or give a file, guide: {use: open_clip, pretrained: PATH}, or "
            "a folder, {use: open_clip, model: 'local-dir:PATH'}, or {use: huggingface, model: "
            "PATH}. "
            f"{DEMO_ONLY}"
        )
