"""Put the heads into the optimizer that trains the host, as a parameter group of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..sockets import ConfigError

# What schedulers keep as one list entry a group; the other lists of theirs are no such.
PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def add_heads(result: Any, heads: Sequence[nn.Parameter], host: Sequence[nn.Parameter]) -> Any:
    """Add a group with `heads` to the optimizer in `result` that trains the most of `host`.

    The new group learns as the group that holds the most of the host: same learning rate, decay
    and schedule. An optimizer state without it, saved before the heads came, still loads.

    Args:
        result: what `configure_optimizers` returns: an optimizer, a list, a dict, (list, list).
        heads: parameters of the heads; none of them may be in an optimizer twice.
        host: parameters of quantizer, encoder and decoder.

    Returns:
        `result`, with the group added in place; schedulers of that optimizer follow.

    Raises:
        ConfigError: if no optimizer trains the host, or a scheduler that is not in `result`
            already drives the one that does.
    """
    optimizers = list(_of_type(result, Optimizer))
    wanted = {id(p) for p in host}
    held = [sum(_share(o, wanted)) for o in optimizers]
    if not optimizers or max(held) == 0:
        raise ConfigError(
            f"no optimizer among {len(optimizers)} trains the host's parameters, so the heads "
            "would never learn; pass the heads' parameters to your optimizer yourself"
        )
    optimizer = optimizers[held.index(max(held))]
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    fresh = [p for p in heads if p.requires_grad and id(p) not in known]
    if not fresh:
        return result
    schedulers = [s for s in _schedulers(result) if s.optimizer is optimizer]
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            "a learning rate scheduler already drives the optimizer, and would not know the new "
            "group; add the heads before building it, or give both: [optimizer, scheduler]"
        )
    shares = _share(optimizer, wanted)
    index = shares.index(max(shares))
    optimizer.add_param_group(_group_like(optimizer.param_groups[index], fresh))
    optimizer.register_load_state_dict_pre_hook(_accept_older)
    for scheduler in schedulers:
        _extend(scheduler, index, len(optimizer.param_groups))
    return result


def remove_heads(result: Any, heads: Sequence[nn.Parameter]) -> None:
    """Take the heads out again; under a scheduler, which counts groups, an empty one stays."""
    ours = {id(p) for p in heads}
    for optimizer in _of_type(result, Optimizer):
        if not sum(_share(optimizer, ours)):
            continue
        for parameter in heads:
            optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        hooks = optimizer._optimizer_load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _accept_older]:
            del hooks[key]


def _share(optimizer: Optimizer, wanted: set[int]) -> list[int]:
    """How many of the wanted parameters each group holds."""
    return [sum(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


def _group_like(model: dict[str, Any], heads: list[nn.Parameter]) -> dict[str, Any]:
    """Return a group with the settings of `model`, those that a scheduler keeps there included."""
    group = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in model.items()
        if key not in ("params", "param_names")
    }
    is_named = "param_names" in model
    params = [(f"lgvq.{i}", p) for i, p in enumerate(heads)] if is_named else heads
    return {**group, "params": params}


def _accept_older(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Give a saved state that lacks the last group, ours, one that has learned nothing yet."""
    saved = state["param_groups"]
    if len(saved) != len(optimizer.param_groups) - 1:
        return None
    own = optimizer.param_groups[-1]
    first = sum(len(group["params"]) for group in saved)
    numbers = list(range(first, first + len(own["params"])))
    return {**state, "param_groups": [*saved, {**own, "params": numbers}]}


def _of_type(node: Any, kind: type) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _of_type(value, kind)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _of_type(value, kind)


def _schedulers(result: Any) -> Iterator[Any]:
    for scheduler in _of_type(result, LRScheduler):
        yield from _flat(scheduler)


def _flat(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _flat(inner)


def _extend(scheduler: Any, index: int, count: int) -> None:
    """Give the new, last of `count` groups what the scheduler keeps for group `index`."""
    for name in (*PER_GROUP, "_last_lr"):
        kept = getattr(scheduler, name, None)
        if isinstance(kept, list) and len(kept) == count - 1:
            kept.append(kept[index])
