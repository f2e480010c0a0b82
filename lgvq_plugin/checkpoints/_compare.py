"""What a state dict tells of its model's sizes, held against a config and a host."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]
HEADS = "loss.lgvq."


@dataclass(frozen=True)
class LoadReport:
    """What went into a host, and what did not.

    Args:
        loaded: keys that the host took.
        missing: keys of the host that the checkpoint lacks.
        unexpected: keys of the checkpoint that the host lacks.
        mismatched: (key, shape in the checkpoint, shape in the host).
        heads: keys of our own heads that the host has no place for.
        new_heads: keys of heads that the host has and the checkpoint lacks.
        differences: sizes in the config that the tensors contradict, in words.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    heads: tuple[str, ...] = ()
    new_heads: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether host and checkpoint have the same keys and shapes, heads aside."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors fit"]
        lines += [f"  {difference}" for difference in self.differences]
        lines += _listed("missing in the checkpoint", self.missing)
        lines += _listed("unexpected in the checkpoint", self.unexpected)
        shapes = [f"{key}: {then} then, {now} now" for key, then, now in self.mismatched]
        lines += _listed("of another shape", shapes)
        if self.heads:
            lines.append(f"  {len(self.heads)} of LG-VQ's heads, left out")
        if self.new_heads:
            lines.append(f"  {len(self.new_heads)} of LG-VQ's heads start anew")
        return "\n".join(lines)


def _listed(what: str, keys: Sequence[str], most: int = 12) -> list[str]:
    if not keys:
        return []
    more = [f"    ... and {len(keys) - most} more"] if len(keys) > most else []
    return [f"  {len(keys)} {what}:", *[f"    {key}" for key in keys[:most]], *more]


def sizes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a taming-style tokenizer's sizes off its tensors; what cannot be told is left out.

    Returns:
        Some of n_embed, embed_dim, z_channels, ch, ch_mult, num_res_blocks, in_channels, out_ch,
        channels.

    Example:
        >>> import torch
        >>> sizes_of({"quantize.embedding.weight": torch.zeros(16, 4)})
        {'n_embed': 16, 'embed_dim': 4}
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    sizes: dict[str, Any] = {}
    for name in (
        "quantize.embedding.weight",
        "quantize.embed.weight",
        "quantizer.embedding.weight",
    ):
        if len(shapes.get(name, ())) == 2:
            sizes["n_embed"], sizes["embed_dim"] = shapes[name]
            break
    if len(shapes.get("quant_conv.weight", ())) == 4:
        embed_dim, width = shapes["quant_conv.weight"][:2]
        if not name.startswith("quantize.embed."):  # Gumbel's projects to n_embed by itself
            sizes["embed_dim"] = embed_dim
        sizes["z_channels"] = width
    ch = shapes.get("encoder.conv_in.weight")
    if ch and len(ch) == 4:
        sizes["ch"], sizes["in_channels"] = ch[:2]
        sizes |= _levels(shapes, ch[0])
    if len(shapes.get("decoder.conv_out.weight", ())) == 4 and ch:
        sizes["out_ch"] = shapes["decoder.conv_out.weight"][0]
    return sizes


def _levels(shapes: Mapping[str, Shape], ch: int) -> dict[str, Any]:
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    blocks = {(int(m[1]), int(m[2])): shapes[m[0]][0] for m in map(pattern.fullmatch, shapes) if m}
    if not blocks:
        return {}
    levels = 1 + max(level for level, _ in blocks)
    widths = [blocks.get((level, 0), 0) / ch for level in range(levels)]
    return {
        "ch_mult": [int(width) if width == int(width) else width for width in widths],
        "num_res_blocks": 1 + max(block for level, block in blocks if level == 0),
    }


def differences(params: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return, in words, where a host's `params` say other sizes than the tensors have.

    Example:
        >>> import torch
        >>> differences({"n_embed": 8}, {"quantize.embedding.weight": torch.zeros(16, 4)})
        ('n_embed is 8 in the config, 16 in the checkpoint: model.params.n_embed=16',)
    """
    found = []
    sizes = sizes_of(state_dict)
    for path, value in _leaves(params):
        name = path[-1]
        if name not in sizes or path[0] in ("lossconfig", "loss"):
            continue
        given = list(value) if isinstance(value, list | tuple) else value
        if given != sizes[name]:
            key = ".".join(("model", "params", *path))
            told = str(sizes[name]).replace(" ", "")
            found.append(
                f"{name} is {given} in the config, {sizes[name]} in the checkpoint: {key}={told}"
            )
    return tuple(found)


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, (*path, str(key)))


def compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> LoadReport:
    """Hold a checkpoint's tensors against a host's; nothing is loaded.

    Args:
        wanted: the host's state dict.
        given: the checkpoint's.
        params: of the host's config, compared with the sizes that the tensors tell.
    """
    shared = [key for key in given if key in wanted]
    wrong = [key for key in shared if given[key].shape != wanted[key].shape]
    strange = [key for key in given if key not in wanted]
    lacking = [key for key in wanted if key not in given]
    return LoadReport(
        loaded=tuple(key for key in shared if key not in set(wrong)),
        missing=tuple(key for key in lacking if not key.startswith(HEADS)),
        unexpected=tuple(key for key in strange if not key.startswith(HEADS)),
        mismatched=tuple((k, tuple(given[k].shape), tuple(wanted[k].shape)) for k in wrong),
        heads=tuple(key for key in strange if key.startswith(HEADS)),
        new_heads=tuple(key for key in lacking if key.startswith(HEADS)),
        differences=differences(params or {}, given),
    )
