"""How long the probes of `lgvq eval` take, against those of another checkout, in turns.

    python tests/benchmarks/bench_probes.py --before OTHER_CHECKOUT [-o results/probes.json]

Processor time of one thread per probe, with the options of configs/eval/scenes.yaml and a share of
its steps. Every turn is a process of its own; both checkouts see the same host and images.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("retrieval", "attributes", "masked_words", "captioning", "vqa", "text_to_image")
TRAINED = NAMES[2:]


def measure(share, train, test):
    """Print the seconds and some rows of each probe of the checkout on the path, as JSON."""
    import torch
    import yaml

    from lgvq_plugin.bench.evaluation import METRICS, build_context
    from lgvq_plugin.bench.metrics import captions
    from lgvq_plugin.bench.probes import classifiers
    from lgvq_plugin.hosts.vqvae import VQVAE
    from lgvq_plugin.sockets import ConfigError

    def no_java(*_):
        raise ConfigError("METEOR runs in a process of its own, which is not timed")

    for module in (captions, sys.modules["lgvq_plugin.bench.measures"]):
        module.meteor_score = no_java
    options = classifiers.ImageJudge.train_on.__kwdefaults__
    steps = round(share * classifiers.CONFIG.steps)
    options["config"] = dataclasses.replace(classifiers.CONFIG, steps=max(2, steps))
    logging.disable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    host = VQVAE(lossconfig={"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}).eval()

    def part(split, length):
        return {"target": "scenes", "params": {"size": 64, "split": split, "length": length}}

    block = yaml.safe_load((ROOT / "configs/eval/scenes.yaml").read_text())["evaluation"]
    for name in TRAINED:
        block[name]["steps"] = max(2, round(share * block[name]["steps"]))
    data = {"train": part("train", train), "validation": part("validation", test)}
    context = build_context(host, {"data": data, "evaluation": block}, progress=False)
    _ = context.train, context.test, context.guide, [*context.pairs()]
    context.guide.encode(["a caption"])
    found = {}
    for name in NAMES:
        begin = time.process_time()
        rows = METRICS[name](context)
        seconds = time.process_time() - begin
        found[name] = {"seconds": seconds, "rows": {key: row.value for key, row in rows.items()}}
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--share", type=float, default=0.1, help="of the training steps")
    parser.add_argument("--images", type=int, nargs=2, default=(1024, 256), metavar="N")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", type=Path, default=Path(__file__).parent / "results/probes.json")
    given = parser.parse_args()
    if given.one:
        return measure(given.share, *given.images)
    checkouts = {"now": ROOT} | ({"before": given.before.resolve()} if given.before else {})
    command = [sys.executable, str(Path(__file__).resolve()), "--one", "--share", str(given.share)]
    command += ["--images", *map(str, given.images)]
    turns = {name: [] for name in checkouts}
    for number in range(given.rounds):
        for name in [*checkouts] if number % 2 == 0 else [*reversed(checkouts)]:
            environment = {**os.environ, "PYTHONPATH": str(checkouts[name]), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    results = {"share_of_steps": given.share, "images": given.images, "probes": {}}
    seconds = {
        name: {p: statistics.median(turn[p]["seconds"] for turn in turns[name]) for p in NAMES}
        for name in turns
    }
    for probe in NAMES:
        results["probes"][probe] = {name: seconds[name][probe] for name in seconds}
    results["sum"] = {name: sum(seconds[name].values()) for name in seconds}
    if given.before:
        for row in (*results["probes"].values(), results["sum"]):
            row["ratio"] = row["before"] / row["now"]
        results["largest_differences"] = {
            probe: max(
                (abs(value - turns["before"][0][probe]["rows"][key]), key)
                for key, value in turns["now"][0][probe]["rows"].items()
            )
            for probe in NAMES
        }
    results["machine"] = {"cpu": platform.processor() or platform.machine(), "threads": 1}
    given.o.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return None


if __name__ == "__main__":
    main()
