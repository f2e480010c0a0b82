"""Why the first batch does not fit the host, in the words of the config."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ..host import reconstruct
from ..sockets import ConfigError

PREFIX = "the first batch does not fit the host"


@contextmanager
def explained(host: Any, batch: Any) -> Iterator[None]:
    """Turn what a host raises at its first batch into a ConfigError that says why and where."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a batch does not fit in the device's memory; lower data.batch_size: {error}"
        ) from error
    except Exception as error:
        reason, place = misfit(host, batch), _place_in_host(error)
        if place is None and reason is None:
            raise
        at = f"; {type(error).__name__}: {error}" + (f" ({place})" if place else "")
        reason = reason or f"{type(host).__name__}'s own code failed at its first batch"
        raise ConfigError(reason + at) from error


def require_same_shape(host: Any, batch: Any, x: Tensor, reconstruction: Any) -> None:
    """Raise ConfigError if torch would silently broadcast the reconstructions to the images."""
    if not isinstance(reconstruction, Tensor) or reconstruction.ndim != x.ndim:
        return
    pairs = [(a, b) for a, b in zip(x.shape, reconstruction.shape, strict=True) if a != b]
    if pairs and all(1 in pair for pair in pairs):
        shapes = f"images {tuple(x.shape)}, reconstructions {tuple(reconstruction.shape)}"
        raise ConfigError(misfit(host, batch) or f"{PREFIX}: {shapes}")


def misfit(host: Any, batch: Any) -> str | None:
    """Return why `batch` does not fit `host`; None if no reason is found.

    It tries the host on blank images of other channels and sizes, in eval mode.
    """
    key = host.image_key
    if isinstance(batch, Mapping) and key not in batch:
        return (
            f"model.params.image_key: {key!r}: a batch has no such key, only "
            f"{', '.join(map(str, batch))}; the data sets of this package give `image`"
        )
    try:
        x = host.get_input(batch, key)
        channels, *sides = (int(n) for n in x.shape[1:])
    except Exception:  # the host's own code on data that it was not made for
        return None
    if len(sides) != 2:
        return f"{PREFIX}: images of shape {tuple(x.shape[1:])}"
    takes = _channels_in(getattr(host, "encoder", host)) or channels
    gives, multiple = _try_sizes(host, takes, sides)
    loss = getattr(host, "loss", None)
    seen = _channels_in(getattr(loss, "discriminator", None))
    found = {}  # the reason: what to change
    if takes != channels:
        hint = "in_channels of the model, or `channels` of the data set"
        found[f"this host takes {_count(takes)}"] = hint
    if multiple > 1:
        verb = "" if found else "this host takes "
        found[f"{verb}multiples of {multiple}"] = "`size` of the data set"
    if gives not in (None, channels):
        found[f"its decoder gives {_count(gives)}"] = f"out_ch: {channels}"
    if getattr(loss, "disc_conditional", False):
        reason = "its discriminator expects a condition, which is not given"
        found[reason] = "disc_conditional: false"
    elif seen not in (None, gives or channels):
        found[f"its discriminator takes {_count(seen)}"] = f"disc_in_channels: {gives or channels}"
    if not found:
        return None
    given = f"data gives {channels} × {sides[0]} × {sides[1]}"
    return f"{PREFIX}: {given}; {' and '.join(found)}. Change {'; '.join(found.values())}"


def _count(channels: int | None) -> str:
    return f"{channels} channel" + "s" * (channels != 1)


def _channels_in(module: nn.Module | None) -> int | None:
    """Return the channels that the first convolution takes."""
    modules = module.modules() if module is not None else ()
    return next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), None)


def _try_sizes(host: Any, channels: int, sides: list[int]) -> tuple[int | None, int]:
    """Return the channels that the host gives, and of what the sides must be multiples."""
    like = next(host.parameters())
    host.eval()

    def gives(*shape: int) -> int | None:
        try:
            with torch.no_grad():
                made = reconstruct(host, like.new_zeros(1, channels, *shape))
        except Exception:  # sizes that it was not made for
            return None
        return int(made.shape[1]) if made.shape[2:] == shape else None

    found, multiple = gives(*sides), 1
    while found is None and multiple < 64:
        multiple *= 2
        up = [-(-side // multiple) * multiple for side in sides]
        # The next multiple, too: a smaller step may meet a good size by chance.
        found = gives(*up) if gives(up[0] + multiple, up[1] + multiple) is not None else None
    return found, multiple if found is not None else 1


def _place_in_host(error: BaseException) -> str | None:
    """Return file, line and text where foreign code failed; None if it was torch's or ours."""
    libraries = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pl))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not own or own[-1].filename.startswith((str(Path(__file__).parents[1]), "<")):
        return None
    return "{0.filename}:{0.lineno} in {0.name}: {0.line}".format(own[-1])
