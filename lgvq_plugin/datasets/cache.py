"""`lgvq cache -b CONFIG`: encode every caption once, so that training needs no text tower.

Disk, for CLIP ViT-B/32 and captions of 14 tokens: 4.9 kB per caption and as much for each masking,
so 23 kB with the usual four; 317 kB with `--precision float32`, 151 kB with `--drop-padding` too.
Variety: of the words of a COCO caption four maskings mask 79 % at least once, eight 96 %; a guide
in memory masks others in every step.
"""

import argparse
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..arguments import add_shortcuts, parse_words
from ..config import parse
from ..files import require_writable, write_text
from ..sockets import ConfigError, resolve
from ..training.build import build_dataset, with_shortcuts
from ..training.config import DataSection, data_section, lgvq_block, read_config, to_plain
from ..training.settings import TrainingConfig

logger = logging.getLogger(__name__)

OVERLAY = "guide.yaml"


def main(argv: list[str]) -> int:
    """Run `lgvq cache -b CONFIG... [-o FOLDER] [--maskings 4] [key=value ...]`."""
    given, overrides = parse_words(_parser(), argv, "base")
    for name, minimum in (("maskings", 0), ("batch_size", 1)):
        if getattr(given, name) < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} must be >= {minimum}")
    if not given.base:
        raise ConfigError(f"-b {' '.join(overrides)}: expected a YAML file, got overrides only")
    require_writable(given.out or Path())
    config = read_config(given.base, overrides)
    _cache(to_plain(with_shortcuts(config, data=given.data, overrides=overrides)), given)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lgvq cache",
        description="Encode the captions of the config's data sets with its text guide, and write "
        "the features to a folder that `guide: {use: cached, folder: FOLDER}` reads. Run it "
        "again to resume after a kill, or to add captions: what was written is kept.",
    )
    parser.add_argument("-b", "--base", nargs="+", action="extend", required=True, metavar="CONFIG")
    add_shortcuts(parser)
    parser.add_argument("-o", "--out", type=Path, help="default: text_cache_FINGERPRINT")
    maskings = (
        "maskings of each caption for masked_text (default: 4); each costs as much time and disk "
        "as the caption itself; none are made where the config needs none"
    )
    parser.add_argument("--maskings", type=int, default=4, help=maskings)
    precision = (
        "of token features; sentences and vocabulary have at least int8. float32 is exact "
        "(default: that of the cache, int4 for a new one)"
    )
    parser.add_argument("--precision", choices=("int4", "int8", "float32"), help=precision)
    padding = (
        "with --precision float32, store no zeros at padding: half the disk for short captions"
    )
    parser.add_argument("--drop-padding", action="store_true", help=padding)
    parser.add_argument("--batch-size", type=int, default=256, help="captions encoded at a time")
    parser.add_argument("--device", help="of the guide (default: cuda if available)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _cache(plain: Mapping[str, Any], given: argparse.Namespace) -> None:
    config = parse(lgvq_block(plain))
    # a wrong key is an error
    TrainingConfig.from_dict({"max_steps": 1, **(plain.get("training") or {})})
    from tqdm import tqdm

    from ..arguments import choose_device
    from ..guides.base import build_guide

    block, folder = dict(config.guide), given.out
    if block.get("use") == "cached":  # the config that trains from the cache can make it, too
        folder = folder or Path(block["folder"])
        if not block.get("guide"):
            raise ConfigError("lgvq.guide: {use: cached} names no `guide:` that could encode")
        block = dict(block["guide"])
    captions = [text for text in _captions(data_section(plain), config.caption_key) if text]
    if not captions:
        raise ConfigError("the config's data sets have no caption to encode")
    guide = build_guide(block)
    guide.to(choose_device(given.device))
    folder = (folder or Path(f"text_cache_{guide.fingerprint[:12]}")).expanduser()
    masked = config.objectives.masked_text
    needs_maskings = masked.weight > 0 and masked.mask_at == "input"
    plan, steps = resolve("guides", "cached").write(
        folder,
        guide,
        captions,
        block={"use": block.get("use", "open_clip"), **guide.config},
        maskings=given.maskings if needs_maskings else 0,
        ratio=masked.ratio,
        precision=given.precision,
        padding=not given.drop_padding,
        seed=config.seed,
        batch_size=given.batch_size,
    )
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    most, left = _in_bytes(plan.bytes_needed), _in_bytes(free)
    logger.info("the cache takes at most %s more; %s are free", most, left)
    if plan.bytes_needed > free:
        hint = "give another place with -o, --precision int4, fewer --maskings or --drop-padding"
        raise ConfigError(f"{folder}: the cache takes up to {most}, {left} are free; {hint}")
    begin = time.monotonic()
    total = plan.done + len(plan.todo)
    with tqdm(total=total, initial=plan.done, unit="caption", disable=given.no_progress) as bar:
        for done in steps:
            bar.update(done)
    seconds = time.monotonic() - begin
    overlay = {"use": "cached", "folder": str(folder.resolve()), "guide": block}
    whole = {"model": {"params": {"lossconfig": {"params": {"lgvq": {"guide": overlay}}}}}}
    write_text(folder / OVERLAY, yaml.safe_dump(whole, sort_keys=False))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{total:,} different captions in {folder}, {len(plan.todo):,} of them new "
        f"({seconds:.1f} s); {_in_bytes(size)}, {_in_bytes(size / total)} per caption"
    )
    print(f"train with it: lgvq train -b CONFIG {folder / OVERLAY}")


def _captions(data: DataSection, own_key: str | None) -> Iterator[str]:
    from .base import CaptionedImages

    is_usual = own_key in (None, "caption", "captions")
    keys = ("captions", "caption", "text", "txt") if own_key is None else (own_key,)
    for section in (data.train, data.validation):
        dataset = [] if section is None else build_dataset(section)
        for index in range(len(dataset)):
            if isinstance(dataset, CaptionedImages) and is_usual:
                texts: Any = dataset.captions_of(index)
            else:
                sample = dataset[index]
                texts = next((sample[key] for key in keys if sample.get(key)), ())
            yield from (text.strip() for text in ([texts] if isinstance(texts, str) else texts))


def _in_bytes(count: float) -> str:
    """Return a number of bytes with its unit, as "15.3 MB"."""
    power = min(4, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
