"""Put the heads into the optimizer that trains the host, as a parameter group of their own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..sockets import ConfigError

# What schedulers keep as one list entry a group; the other lists of theirs are no such.
PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def add_heads(
    result: Any,
    heads: Sequence[nn.Parameter],
    host: Sequence[nn.Parameter],
    *,
    undecayed: Iterable[nn.Parameter] = (),
) -> Any:
    """Add `heads` to the optimizer in `result` that trains the most of `host`.

    Their group learns as the group that holds the most of the host: same learning rate, weight
    decay and schedule. Where that one has a weight decay, `undecayed` go into a second group
    without. An optimizer state saved before the heads came, or with all heads in one group,
    still loads; schedulers restored from such a state get the missing entries at the next step.

    Args:
        result: what `configure_optimizers` returns: an optimizer, a list, a dict, (list, list).
        heads: parameters of the heads; none of them may be in an optimizer twice.
        host: parameters of quantizer, encoder and decoder.
        undecayed: those of `heads` without weight decay, see `undecayed_parameters`.

    Returns:
        `result`, with the groups added in place; schedulers of that optimizer follow.

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
    model = dict(optimizer.param_groups[index])
    names = {id(p): f"lgvq.{i}" for i, p in enumerate(fresh)}
    exempt, first = {id(p) for p in undecayed}, len(optimizer.param_groups)
    parts = [(model, fresh)]
    if model.get("weight_decay"):
        parts = [
            (model, [p for p in fresh if id(p) not in exempt]),
            ({**model, "weight_decay": 0.0}, [p for p in fresh if id(p) in exempt]),
        ]
    for settings, part in parts:
        if part:
            optimizer.add_param_group(_group_like(settings, part, names))
    older = OlderStates(first, index, heads=fresh, exempt=exempt, schedulers=schedulers)
    optimizer.register_load_state_dict_pre_hook(older.accept)
    optimizer.register_step_pre_hook(older.extend)
    older.extend(optimizer)
    return result


def undecayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that weight decay would only distort.

    These are biases, norms and temperatures (fewer than two dimensions), and learned tokens:
    positions, [CLS], mask tokens (first dimension 1) and embeddings.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> [tuple(p.shape) for p in undecayed_parameters(layers)]
        [(2,), (2,), (2,)]
    """
    return [
        parameter
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if parameter.ndim < 2 or isinstance(part, nn.Embedding) or _is_token(parameter)
    ]


def _is_token(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 3 and parameter.shape[0] == 1


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
        for hooks in (
            optimizer._optimizer_load_state_dict_pre_hooks,
            optimizer._optimizer_step_pre_hooks,
        ):
            for key, hook in [*hooks.items()]:
                if isinstance(getattr(hook, "__self__", None), OlderStates):
                    del hooks[key]


def _share(optimizer: Optimizer, wanted: set[int]) -> list[int]:
    """How many of the wanted parameters each group holds."""
    return [sum(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


def _group_like(
    model: dict[str, Any], heads: list[nn.Parameter], names: dict[int, str]
) -> dict[str, Any]:
    """Return a group with the settings of `model`, those that a scheduler keeps there included."""
    group = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in model.items()
        if key not in ("params", "param_names")
    }
    is_named = "param_names" in model
    return {**group, "params": [(names[id(p)], p) for p in heads] if is_named else heads}


class OlderStates:
    """Lets optimizer and schedulers be restored from a run with other groups of heads, or none.

    Args:
        first: index of the heads' first group.
        model: index of the host's group that the heads' groups follow.
        heads: in the order of earlier runs, which had them in one group.
        exempt: ids of those that go without weight decay.
        schedulers: of the optimizer.
    """

    def __init__(
        self,
        first: int,
        model: int,
        *,
        heads: Sequence[nn.Parameter],
        exempt: set[int],
        schedulers: Sequence[Any],
    ) -> None:
        self.first, self.model, self.schedulers = first, model, schedulers
        self.one_group = [id(p) for p in heads]
        self.two_groups = sorted(self.one_group, key=lambda each: each in exempt)  # stable

    def accept(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Give a saved state the groups that `optimizer` has; a load_state_dict pre-hook."""
        saved = state["param_groups"]
        count = sum(share > 0 for share in _share(optimizer, {*self.one_group}))
        before = len(saved) - (len(optimizer.param_groups) - count)
        if before not in (0, 1, 2) or before == count == 2:
            return None
        theirs, rest = saved[self.first : self.first + before], saved[self.first + before :]
        settings = (theirs or saved[self.model :])[0]
        numbers = [number for group in theirs for number in group["params"]]
        if before == 0:  # they have learned nothing yet
            start = sum(len(group["params"]) for group in saved)
            numbers = list(range(start, start + len(self.one_group)))
        order = self.two_groups if before == 2 else self.one_group
        if len(order) != len(numbers):
            return None
        number_of = dict(zip(order, numbers, strict=True))
        groups = []
        for group in optimizer.param_groups[self.first : self.first + count]:
            is_undecayed = not group.get("weight_decay", 1.0)
            kept = {k: group[k] for k in ("param_names",) if k in group}
            kept |= {"weight_decay": group["weight_decay"]} if is_undecayed else {}
            params = [number_of[id(p)] for p in group["params"]]
            groups.append({**settings, **kept, "params": params})
        return {**state, "param_groups": [*saved[: self.first], *groups, *rest]}

    def extend(self, optimizer: Optimizer, *unused: Any) -> None:
        """Give the schedulers an entry for each group; an optimizer's step pre-hook."""
        for scheduler in self.schedulers:
            _extend(scheduler, self.model, len(optimizer.param_groups))


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
    """Give the last of `count` groups what the scheduler keeps for group `index`."""
    lists = [getattr(scheduler, name, None) for name in (*PER_GROUP, "_last_lr")]
    for kept in lists:
        if isinstance(kept, list) and index < len(kept) < count:
            kept.extend(kept[index] for _ in range(count - len(kept)))
