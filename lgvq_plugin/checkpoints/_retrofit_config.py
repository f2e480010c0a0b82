"""From an old run's config to one of LG-VQ over the same loss."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from .._fields import laid_over
from ..config import parse
from ..sockets import ConfigError
from ..training.base import FROZEN, LOSS_KEYS, TrainingConfig, loss_key
from .base import Checkpoint

logger = logging.getLogger(__name__)

TAMING = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
GENTLE = {"max_learning_rate": 1e-4, "warmup_steps": 100}
"""What a retrofit adds to `training:`."""
OURS = ("lgvq_plugin.LGVQLoss", "lgvq_plugin.loss.LGVQLoss", "lgvq_plugin.over.")


def over_old_loss(
    model: Mapping[str, Any], lgvq: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the `model:` section with LG-VQ over its loss.

    Args:
        model: of the old config, in plain containers.
        lgvq: laid over the section's own `lgvq:` block, key by key.

    Raises:
        ConfigError: if the section names no loss.

    Example:
        >>> old = {"target": "m.VQModel", "params": {"lossconfig": {"target": "m.Loss"}}}
        >>> over_old_loss(old)["params"]["lossconfig"]["target"]
        'lgvq_plugin.over.m.Loss'
    """
    made = copy.deepcopy(dict(model))
    params = made["params"] = dict(made.get("params") or {})
    key = loss_key({"model": made})
    if key is None or "target" not in params[key]:
        raise ConfigError(
            f"model.params has no {' or '.join(LOSS_KEYS)} with a target, so there is no loss to "
            "put LG-VQ over; for such a model use lgvq_plugin.attach in a loop of your own"
        )
    loss = params[key] = dict(params[key])
    target = str(loss["target"])
    if target == TAMING:
        loss["target"] = OURS[0]
    elif not target.startswith(OURS):
        loss["target"] = OURS[-1] + target
    inner = loss["params"] = dict(loss.get("params") or {})
    block = laid_over(inner.get("lgvq") or {}, lgvq or {})
    parse(block)
    inner["lgvq"] = block
    params.pop("ckpt_path", None)
    return made


def gently(training: Any) -> Any:
    """Return a `training:` section with a safe learning rate for weights that are good already.

    The moments of Adam start anew, so its first steps move every weight by a whole learning rate,
    whatever the gradient is: a rate that trained a host from scratch ruins it in two of them.

    Args:
        training: the given section; its own keys win.

    Example:
        >>> gently({"max_steps": 5000, "warmup_steps": 0})
        {'max_learning_rate': 0.0001, 'max_steps': 5000, 'warmup_steps': 0}
    """
    if not isinstance(training, Mapping):
        return training
    return {**{k: v for k, v in GENTLE.items() if k not in training}, **training}


def require_steps_for_host(training: TrainingConfig) -> None:
    """Refuse a run in which the host would never learn.

    Raises:
        ConfigError: if `heads_first` takes all steps.
    """
    if training.heads_first >= training.max_steps:
        raise ConfigError(
            f"training.heads_first={training.heads_first} (--heads-first) leaves none of "
            f"training.max_steps={training.max_steps} to the host: it would stay as it is, and all "
            "differences 0; raise training.max_steps, or lower --heads-first"
        )
    if set(training.freeze) >= set(FROZEN):
        logger.warning("--freeze takes all of the host: it stays as it is, all differences are 0")


def shift_discriminator(model: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Count the steps until the discriminator starts from the old run's beginning."""
    key = loss_key({"model": model})
    params = model["params"][key].get("params") or {} if key else {}
    has_one = any(k.startswith("loss.discriminator.") for k in checkpoint.state_dict)
    if not (has_one and checkpoint.step and isinstance(params.get("disc_start"), int)):
        return
    shifted = max(0, params["disc_start"] - checkpoint.step)
    if shifted != params["disc_start"]:
        logger.info(
            "disc_start: %d of the old run, which made %d steps and brings its discriminator: "
            "%d of the new run",
            *(params["disc_start"], checkpoint.step, shifted),
        )
        params["disc_start"] = shifted
