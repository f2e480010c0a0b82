"""`lgvq bench`: what LG-VQ adds to the time of a training step."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import remove_parts, require_writable, write_json
from ..sockets import ConfigError, suggest
from .records import text_table


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two hosts to compare.

    Args:
        name: on the command line.
        title: in the table.
        config: shipped config of the bare host; the one with `_lgvq` has LG-VQ.
        guide: live (ViT-B/32 text tower), cached (its features) or micro_clip.
        batch_sizes: by type of device.
        size: height and width of the images.
        params: changes of `model.params`.
        lgvq: changes of the `lgvq:` block.
        two_forward: whether the bare host's step has taming's second forward pass.
        new_captions: whether no caption was encoded before, as in a first epoch.
        target: what the ratio should not exceed.
    """

    name: str
    title: str
    config: str
    guide: str
    batch_sizes: Mapping[str, int] = field(default_factory=lambda: {"cpu": 16, "cuda": 64})
    size: int = 64
    params: Mapping[str, Any] = field(default_factory=dict)
    lgvq: Mapping[str, Any] = field(default_factory=dict)
    two_forward: bool = False
    new_captions: bool = False
    target: float


CASES = (
    Case(
        name="vqgan",
        title="VQGAN 64 px, ch 32, live ViT-B/32 text tower",
        config="vqgan_scenes_64",
        guide="live",
        target=1.25,
    ),
    Case(
        name="vqgan-first-epoch",
        title="the same, captions that were not encoded before",
        config="vqgan_scenes_64",
        guide="live",
        new_captions=True,
        target=1.25,
    ),
    Case(
        name="vqgan-cached",
        title="VQGAN 64 px, ch 32, cached text features",
        config="vqgan_scenes_64",
        guide="cached",
        target=1.15,
    ),
    Case(
        name="vqvae",
        title="VQ-VAE 64 px, all objectives, micro_clip",
        config="vqvae_scenes_64",
        guide="micro_clip",
        batch_sizes={"cpu": 32, "cuda": 32},
        params={"embed_dim": 32},
        lgvq={"objectives": {"masked_text": {"weight": 0.05}}},
        target=1.5,
    ),
    Case(
        name="vqgan-256",
        title="VQGAN 256 px, f16, ch 128 (paper), cached text features, no LPIPS",
        config="vqgan_coco_256",
        guide="cached",
        batch_sizes={"cpu": 2, "cuda": 8},
        size=256,
        params={"lossconfig": {"params": {"perceptual_weight": 0.0, "disc_start": 0}}},
        target=1.05,
    ),
    Case(
        name="two-forward",
        title="LG-VQ in `lgvq train` / bare VQGAN with taming's two forward passes",
        config="vqgan_scenes_64",
        guide="cached",
        two_forward=True,
        target=0.8,
    ),
)


def table(results: list[Mapping[str, Any]]) -> str:
    """Return the rows of `Result.to_dict()` as text."""
    rows = [["", "batch", "bare, ms", "LG-VQ, ms", "ratio", "range", "target", "memory"]]
    for each in results:
        low, high = each["range"]
        milliseconds, memory = each["milliseconds"], each["memory"]
        rows.append([
            each["case"],
            str(each["batch_size"]),
            f"{milliseconds['bare']:.1f}",
            f"{milliseconds['lgvq']:.1f}",
            f"{each['ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{each['target']:.2f}",
            f"{memory['lgvq'] / memory['bare'] - 1:+.1%}" if memory else "",
        ])  # fmt: skip
    return text_table(rows)


def parts_table(results: list[Mapping[str, Any]]) -> str:
    """Return milliseconds of an aligned LG-VQ step by part, a column per case."""
    names = list(dict.fromkeys(name for each in results for name in each["parts"]))
    rows = [["ms per aligned step", *(each["case"] for each in results)]]
    for name in names:
        found = [each["parts"].get(name) for each in results]
        rows.append([name, *("" if s is None else f"{1000 * s:.1f}" for s in found)])
    return text_table(rows)


def main(argv: list[str]) -> int:
    """Run `lgvq bench`; the exit code is 0."""
    names = [case.name for case in CASES]
    lines = "\n".join(f"  {case.name:<14}{case.title}" for case in CASES)
    parser = argparse.ArgumentParser(
        prog="lgvq bench",
        description="Time a training step with and without LG-VQ, in turns in one process; ratios "
        "are medians over rounds. Text towers have random weights: nothing is downloaded.",
        epilog=f"cases:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="per turn, rounded up to a multiple of "
        "lgvq.every (default: 5)"
    )  # fmt: skip
    parser.add_argument(
        "--every", type=int, metavar="N", help="lgvq.every (default: that of the recipe)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--compile", action="store_true", help="with lgvq.compile: true")
    dtypes: Any = {"choices": ("float32", "bfloat16"), "default": "float32"}
    parser.add_argument("--dtype", **dtypes, help="of CLIP's text tower (default: float32)")
    parser.add_argument(
        "--growth", action="store_true", help="also time the heads at other sizes of batch, grid, "
        "caption, codebook and vocabulary"
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    given = parser.parse_args(argv)
    for name in given.cases:
        if name not in names:
            raise ConfigError(f"no case {name!r}{suggest(name, names)}")
    for name in ("rounds", "steps", "every", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be a whole number >= 1, got {value}")
    if given.json is not None:
        require_writable(given.json.parent)
        remove_parts(given.json)
    found = _measure(given)
    print(table(found["cases"]))
    print(f"\n{parts_table(found['cases'])}")
    for row in found.get("growth", ()):
        sizes = ", ".join(f"{key} {row[key]:,}" for key in ("batch", "tokens", "text", "codes"))
        words = f"vocabulary {row['vocabulary']:,}"
        print(f"{row['varies']:<11}{1000 * row['seconds']:9.1f} ms  ({sizes}, {words})")
    print(f"\n{json.dumps(found['machine'])}")
    return 0


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from ..arguments import choose_device
    from .timing import CLIP, growth, machine, measure

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    chosen = [case for case in CASES if not given.cases or case.name in given.cases]
    block: dict[str, Any] = {"compile": given.compile}
    if given.every is not None:
        block["every"] = given.every
    chosen = [replace(case, lgvq={**case.lgvq, **block}) for case in chosen]
    setting = {**block, "dtype": given.dtype}
    found: dict[str, Any] = {"machine": machine(device), "setting": setting, "cases": []}

    def add(**measured: Any) -> None:
        """Save what is known so far: the next case may run out of memory."""
        found.update(measured)
        if given.json is not None:
            write_json(given.json, found)

    with tqdm(total=len(chosen) * given.rounds, disable=given.no_progress, unit="round") as bar:
        for case in chosen:
            bar.set_postfix_str(case.name)
            options = {"rounds": given.rounds, "steps": given.steps, "progress": bar.update}
            result = measure(case, device=device, clip={**CLIP, "dtype": given.dtype}, **options)
            add(cases=[*found["cases"], result.to_dict()])
    if given.growth:
        add(growth=growth(device, block={"compile": given.compile}))
    return found
