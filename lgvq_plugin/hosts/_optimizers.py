"""Put the heads into the optimizer that trains the host, as a parameter group of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..sockets import ConfigError


def add_heads(result: Any, heads: Sequence[nn.Parameter], host: Sequence[nn.Parameter]) -> Any:
    """Add a group with `heads` to the optimizer in `result` that trains the most of `host`.

    Args:
        result: what `configure_optimizers` returns: an optimizer, a list, a dict, (list, list).
        heads: parameters of the heads; none of them may be in an optimizer twice.
        host: parameters of quantizer, encoder and decoder.

    Returns:
        `result`, with the group added in place; schedulers of that optimizer follow.

    Raises:
        ConfigError: if no optimizer trains the host.
    """
    optimizers = list(_of_type(result, Optimizer))
    wanted = {id(p) for p in host}
    held = [sum(id(p) in wanted for g in o.param_groups for p in g["params"]) for o in optimizers]
    if not optimizers or max(held) == 0:
        raise ConfigError(
            f"no optimizer among {len(optimizers)} trains the host's parameters, so the heads "
            "would never learn; pass the heads' parameters to your optimizer yourself"
        )
    optimizer = optimizers[held.index(max(held))]
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    fresh = [p for p in heads if p.requires_grad and id(p) not in known]
    if fresh:
        first = optimizer.param_groups[0]
        start = first.get("initial_lr", optimizer.defaults["lr"])
        optimizer.add_param_group({"params": fresh, "lr": start})
        for scheduler in _schedulers(result):
            if scheduler.optimizer is optimizer:
                _extend(scheduler, optimizer)
    return result


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
    from torch.optim.lr_scheduler import LRScheduler

    for scheduler in _of_type(result, LRScheduler):
        yield from _flat(scheduler)


def _flat(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _flat(inner)


def _extend(scheduler: Any, optimizer: Optimizer) -> None:
    """Give the new group what the scheduler keeps for each group, as the first group has it."""
    first, group = optimizer.param_groups[0], optimizer.param_groups[-1]
    for name in ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "_last_lr"):
        kept = getattr(scheduler, name, None)
        if isinstance(kept, list) and len(kept) == len(optimizer.param_groups) - 1:
            kept.append(kept[0])
    group["lr"] = first["lr"]
    if "initial_lr" in first:
        group["initial_lr"] = first["initial_lr"]
