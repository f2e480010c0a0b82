"""What fetching foreign weights needs: a quick answer offline, and an untouched random stream."""

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

from ..sockets import ConfigError

REACH_SECONDS = 5.0


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
            f"reached ({cause}). Either put the cache there (load it once where there is a "
            "network, or name another folder: guide.cache_dir), or give local files: guide: "
            "{pretrained: /path/to/weights.safetensors} or {model: 'local-dir:/path'} of "
            "open_clip, {use: huggingface, model: /path}; "
            "guide: {use: micro_clip} does without any download"
        )
