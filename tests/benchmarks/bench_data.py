"""Does reading hold training up? Samples a second against plain PIL; cache look-ups against a step.

    python tests/benchmarks/bench_data.py --photos FOLDER [--skip-step] [-o results/data.json]

FOLDER is one that `lgvq data check` calls usable. results/ holds data.json (476 COCO photos) and
data_emoji.json (3,530 emoji, --captions 64), both of an idle machine, and data_step.json (the
photos with the step of the 256-px VQGAN, an older run on a busy machine).
Each ratio comes from runs that take turns in one process, so that a busy machine slows both.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lgvq_plugin import compat
from lgvq_plugin.datasets.base import collate, recognize
from lgvq_plugin.datasets.commands import Settings, convert
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.guides.cached import CachedGuide
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.config import read_config

ROOT = Path(__file__).parents[2]
ROUNDS, SIZE, BATCH = 10, 256, 8


def plain(path):
    """Decode, center-crop and resize with Pillow alone, to RGB bytes."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    box = (left, top, left + side, top + side)
    return rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def drop(images):
    """Let each image go before the next is read, as a loader's worker does."""
    for _ in images:
        pass


def seconds(work, clock=time.perf_counter):
    start = clock()
    work()
    return clock() - start


def reading(photos, converted):
    """Return samples/s of Pillow, of our data set, of shards, and of one DataLoader worker."""
    ours, shards = (recognize(path).build("all", size=SIZE) for path in (photos, converted))
    paths = [record.path for record in ours.records]

    def through(dataset):
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=collate)
        for _ in loader:
            pass

    runs = {
        "pillow": lambda: drop(plain(path) for path in paths),
        "pillow_to_floats": lambda: drop(
            np.asarray(plain(p), np.float32) / 127.5 - 1 for p in paths
        ),
        "folder": lambda: drop(ours[i] for i in range(len(ours))),
        "webdataset": lambda: drop(shards[i] for i in range(len(shards))),
        "folder_one_worker": lambda: through(ours),
    }
    for work in runs.values():
        work()  # files into the page cache
    times = {name: [] for name in runs}
    for number in range(ROUNDS):
        # What ran before leaves the heap larger or smaller: each takes every place in turn.
        turn = number % len(runs)
        for name, work in [*runs.items()][turn:] + [*runs.items()][:turn]:
            # Processor time where all work is in this process: other jobs do not count.
            clock = time.perf_counter if "worker" in name else time.process_time
            times[name].append(seconds(work, clock))
    rates = {name: len(paths) / statistics.median(taken) for name, taken in times.items()}

    def ratios(base):
        others = (name for name in runs if name not in ("pillow", "folder_one_worker", base))
        return {
            name: statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
            for name in others
        }

    return {
        "samples_per_second": rates,
        # The bytes of an RGB image, or the float32 array in [-1, 1] that a sample is.
        "ratio_to_pillow": ratios("pillow"),
        "ratio_to_pillow_to_floats": ratios("pillow_to_floats"),
        "images": len(paths),
    }


def look_ups(photos, folder, count):
    """Return milliseconds of a batch's features, plain and masked, of the size of CLIP ViT-B/32."""
    block = {"use": "open_clip", "model": "ViT-B-32", "pretrained": None}
    guide = build_guide(block)
    told = recognize(photos).build("all")
    captions = [told.captions_of(i)[0] for i in range(len(told))][:count]
    start = time.perf_counter()
    _, steps = CachedGuide.write(folder, guide, captions, block=block, maskings=4)
    list(steps)
    writing = time.perf_counter() - start
    cached = CachedGuide(str(folder), verify=False)
    generator, order = torch.Generator().manual_seed(0), np.random.default_rng(0)
    live, looked = [], []
    for number in range(100):
        batch = [captions[i] for i in order.choice(len(captions), BATCH)]

        def both(source, batch=batch):
            features = source.encode(batch)
            mask = source.draw_mask(
                batch, features.word_ids, ratio=(0.15, 0.5), generator=generator
            )
            source.encode(batch, token_mask=mask)

        looked.append(seconds(lambda: both(cached)))
        if number < 5:
            live.append(seconds(lambda: both(guide)))
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return {
        "milliseconds_a_step": 1e3 * statistics.median(looked),
        "milliseconds_a_step_of_the_guide": 1e3 * statistics.median(live),
        "kilobytes_a_caption_with_4_maskings": size / len(cached) / 1e3,
        "captions_a_second_written": len(cached) / writing,
        "note": "text tower of ViT-B/32, random weights, batch of 8: features and one masking",
    }


def step():
    """Return seconds of one step of the 256-px VQGAN: both optimizers, no LPIPS; batch of 1."""
    compat.patch()
    base = read_config(
        [ROOT / "configs/vqgan_coco_256.yaml"],
        ["model.params.lossconfig.params.perceptual_weight=0"],
    )
    host = build_host(base)
    image = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    host.learning_rate = 1e-5
    pairs = host.configure_optimizers()[0]
    last = {"last_layer": host.get_last_layer(), "split": "train", "global_step": 0}

    def once():
        codes, code_loss, _ = host.encode(image)
        made = host.decode(codes)
        for number, optimizer in enumerate(pairs):
            shown = made if number == 0 else made.detach()
            loss, _ = host.loss(code_loss if number == 0 else code_loss.detach(),
                                image, shown, number, **{"global_step": 0, **last})  # fmt: skip
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()

    return seconds(once)  # tens of seconds on a CPU: warming up would change little


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=476, help="of the cache")
    parser.add_argument("--skip-step", action="store_true")
    parser.add_argument("-o", type=Path, default=Path(__file__).parent / "results/data.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "shards"
        convert(given.photos, converted, Settings(size=SIZE), progress=False)
        results = {"reading": reading(given.photos, converted)}
        results["look_up"] = look_ups(given.photos, Path(scratch) / "cache", given.captions)
    results["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    save(results, given.o)
    if given.skip_step:
        return
    taken = step()
    results["step"] = {
        "seconds_of_one_image": taken,
        "look_up_share_of_a_step": results["look_up"]["milliseconds_a_step"] / 1e3 / BATCH / taken,
        "note": "a step of 8 images is taken as 8 times a step of 1 on the CPU",
    }
    save(results, given.o)


def save(results, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2), flush=True)


if __name__ == "__main__":
    main()
