"""Broken input of every kind, drawn by hypothesis, given to the commands that read it.

    python tests/stress/bad_input.py --cases 2000 [--kinds config resume] [--seed 1]

A command must succeed, or end with exit code 2 and one message. The table counts, per kind, what
happened; below it is one example of each defect. The commands run in this process.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from lgvq_plugin import Handle, cli
from lgvq_plugin.bench import figures, jobs
from lgvq_plugin.bench.page import png_bytes
from lgvq_plugin.bench.records import Results, Run
from lgvq_plugin.hosts.vqvae import VQVAE
from lgvq_plugin.sockets import ConfigError

SECONDS = 20  # of a case; longer is a hang
MEMORY = 6 * 2**30  # bytes that a case may add; sizes such as n_embed: 10**9 need more
HOST = {"n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1, "downsample": 4}
LOSS = {
    "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
    "params": {"pixel": "l2", "lgvq": {"guide": {"use": "micro_clip"}}},
}
SCENES = {"target": "scenes", "params": {"size": 16, "length": 4}}
CONFIG: dict[str, Any] = {
    "model": {
        "learning_rate": 1e-3,
        "target": "lgvq_plugin.hosts.vqvae.VQVAE",
        "params": {**HOST, "quantizer": "ema", "lossconfig": LOSS},
    },
    "data": {"batch_size": 2, "num_workers": 0, "train": SCENES, "validation": SCENES},
    "training": {"max_steps": 2, "accelerator": "cpu", "seed": 0, "precision": "32-true"}
    | {"val_every": 1, "val_batches": 1, "images_every": None, "log_every": 1},
}
VERDICTS = ("success", "refused", "diverged", "traceback", "hang", "garbage", "messages", "escaped")
CAPTIONS = ["a red square above a blue circle", "two green triangles", "a small yellow star"]
PLAN = {"title": "t", "base": ["config.yaml"], "seeds": [0], "variants": {"a": {}, "b": {}}}
HOSTILE_NAMES = [
    *("../../escaped", "/tmp/lgvq_escaped", "a\0b", "n" * 300, "\ud800", "", ".", "..", "a/b"),
    *("a\nb", "<script>1</script>", "con", "-o", "${oc.env:HOME}", "ü" * 200),
]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**6, 10**12, 2**63, 10**400, 0.5, 1e30, 1e-30, -0.0),
    *(math.nan, math.inf, -math.inf, "", " ", "x", "1", "nan", "???", "${a}", "${model}", "null"),
    *([], [[]], [1, 2], [None], {}, {"a": 1}, {"target": "x"}, {1: 2}, [{}], "é", b"\xff\xfe"),
    *HOSTILE_NAMES,
]


@dataclass(frozen=True)
class Case:
    """Files of a broken input, and the words of the command that reads them."""

    what: str
    files: Mapping[str, bytes]
    words: tuple[str, ...] = ()
    call: Callable[[Path], Any] | None = None  # instead of a command
    folder: Path | None = None  # whose content is copied below `files`


@dataclass
class Outcome:
    """What a case ended in."""

    verdict: str  # one of VERDICTS
    detail: str = ""
    what: str = ""


class Hang(BaseException):
    """A case took too long."""


# -- Mutations -----------------------------------------------------------------------------------


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a tree of mappings and lists."""
    pairs: Any = ()
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list):
        pairs = enumerate(node[:8])
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def odd_tensors(value: Any) -> list[Any]:
    """Return tensors that are almost like `value`."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return [torch.zeros(2), torch.zeros(())]
    value = value.detach()
    made = [value.flatten(), value[None], value.new_zeros(0), value.double(), value.to(torch.int64)]
    made += [value.to(torch.complex64), value.bool(), value.half(), torch.zeros(()), value.numpy()]
    if value.numel():
        made += [torch.full_like(value.float(), x) for x in (math.nan, math.inf, -1e38)]
        made += [value[:-1]] if value.ndim else []
        made += [value.to_sparse()] if value.ndim else []
    return [*made, value.to("meta"), torch.nn.Parameter(value.float())]


@st.composite
def mutated(draw: Any, tree: Any, *, tensors: bool = False, most: int = 3) -> tuple[Any, str]:
    """Change one to three places of a tree; return it and what was done."""
    tree = copy.deepcopy(tree)
    done = []
    for _ in range(draw(st.integers(1, most))):
        every = [*places(tree)]
        if not every:
            break
        path = draw(st.sampled_from(every))
        node = tree
        for key in path[:-1]:
            node = node[key]
        last, value = path[-1], node[path[-1]]
        odd = ODD + (odd_tensors(value) * 3 if tensors else [])
        action = draw(st.sampled_from(("replace", "replace", "replace", "delete", "wrap", "move")))
        if action == "delete":
            del node[last]
        elif action == "wrap":
            node[last] = draw(st.sampled_from(([value], {"a": value}, str(value)[:200])))
        elif action == "move" and isinstance(node, dict):
            node[draw(st.sampled_from([*HOSTILE_NAMES, "x", 3, None]))] = node.pop(last)
        else:
            action = "replace"
            node[last] = draw(st.sampled_from(odd))
            value = node[last]
        shown = f"{type(value).__name__} {value!r:.60}" if action == "replace" else ""
        done.append(f"{action} {'.'.join(map(str, path))} {shown}")
    return tree, "; ".join(done)


@st.composite
def damaged(draw: Any, content: bytes, *, is_text: bool = False) -> tuple[bytes, str]:
    """Damage a file: cut, empty, random, overwritten, or (text) with odd lines."""
    how = ["cut", "empty", "random", "overwritten", "zeros", "twice"]
    action = draw(st.sampled_from(how + ["line", "line", "insert", "insert", "utf16"] * is_text))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if action == "cut":
        return content[:at], f"cut at {at}"
    if action == "empty":
        return b"", "empty"
    if action == "random":
        return draw(st.binary(max_size=400)), "random bytes"
    if action == "zeros":
        return content[:at] + b"\0" * (len(content) - at), f"zeros from {at}"
    if action == "twice":
        return content * 2, "twice"
    if action == "utf16":
        return content.decode(errors="replace").encode("utf-16"), "utf-16"
    if action == "line":
        lines = content.splitlines(keepends=True)
        number = draw(st.integers(0, max(0, len(lines) - 1)))
        change = draw(st.sampled_from(("drop", "repeat", "tab", "swap")))
        part = lines[number : number + 1]
        new = {"drop": [], "repeat": part * 2, "tab": [b"\t" + p for p in part],
               "swap": part[::-1] + lines[:1]}[change]  # fmt: skip
        return b"".join(lines[:number] + new + lines[number + 1 :]), f"{change} line {number}"
    pieces = ['"', "\t", ",", "{", "[", "]" * 9, "\n", ": ", "- ", "\\", "&a", "*a", "\0"]
    pieces += ["!!python/name:os", "\ufeff", "\r", "nan", "[" * 5000, "{a: " * 500, "1e999"]
    pieces += ["../", "#", "é"]
    raw = draw(st.sampled_from([p.encode() for p in pieces]) | st.binary(min_size=1, max_size=8))
    end = at if action == "insert" else at + len(raw)
    return content[:at] + raw + content[end:], f"{action} {raw[:20]!r} at {at}"


def text_of(tree: Any) -> bytes:
    """Return a tree as JSON, with whatever JSON can hold."""
    return json.dumps(tree, default=repr, skipkeys=True).encode()


def yaml_of(tree: Any) -> bytes:
    """Return a tree as YAML."""
    return yaml.safe_dump(tree, allow_unicode=False, sort_keys=False).encode("utf-8", "replace")


# -- The workshop: sound files of each kind -------------------------------------------------------


class Workshop:
    """Sound files that the cases break, made once in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.config.write_bytes(yaml_of(CONFIG))
        options = ["--logdir", str(root), "--no-progress"]
        self._must("train", "-b", str(self.config), "--name", "run", *options)
        self.last = root / "run/checkpoints/last.ckpt"
        checkpoints = sorted((root / "run/checkpoints").glob("step=*.ckpt"))
        self.checkpoint: dict[str, Any] = torch.load(self.last, weights_only=True)
        assert checkpoints
        self._must(
            "export", "--ckpt", str(self.last), "--format", "heads", "-o", str(root / "heads")
        )
        out = str(root / "host")
        self._must("export", "--ckpt", str(self.last), "--format", "safetensors", "-o", out)
        cache = ["--batch-size", "4", "--maskings", "1", "--no-progress"]
        masked = "lgvq.objectives.masked_text.weight=0.01"
        words = ["-b", str(self.config), "-o", str(root / "cache"), *cache, masked]
        self._must("cache", *words)
        self._images()
        self._ablation()

    def _must(self, *words: str) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = cli.main([*words])
        if code:
            raise RuntimeError(f"lgvq {' '.join(words)}: {said.getvalue()}")

    def _images(self) -> None:
        self.pictures: dict[str, bytes] = {}
        for i in range(3):
            image = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
            made = io.BytesIO()
            image.save(made, "PNG")
            self.pictures[f"{i}.png"] = made.getvalue()

    def _ablation(self) -> None:
        folder = self.root / "ablation"
        metrics: Any = {
            "reconstruction/psnr": {"value": 20.0, "n": 3, "unit": "dB", "higher_is_better": True,
                                    "per_image": [19.0, 20.0, 21.0]},
            "codebook/usage": {"value": 0.5, "n": 3, "unit": "", "higher_is_better": True},
        }  # fmt: skip
        runs = []
        for variant in "ab":
            place = folder / variant / "seed_0"
            place.mkdir(parents=True)
            (place / "x.png").write_bytes(png_bytes(torch.zeros(3, 4, 4)))
            name = f"{variant}/seed_0/x.png"
            evaluation = {"settings": {"limit": 3}, "environment": {"torch": "2"}}
            evaluation |= {"metrics": metrics, "skipped": {"fid": "no weights"}}
            cost: Any = {"steps": 2, "seconds_per_step": 0.1, "peak_memory_mib": 9.0,
                         "memory_of": "process", "device": "CPU"}  # fmt: skip
            run = Run(
                data="", variant=variant, seed=0, evaluation=evaluation, cost=cost,
                curves={"train/rec_loss": [[1, 0.5], [2, 0.25]]},
                examples=[{"original": name, "reconstruction": name, "caption": "a dog"}],
            )  # fmt: skip
            runs.append(run)
            (place / "run.json").write_text(json.dumps(asdict(run)))
        variants: Any = {name: {"note": "n", "changes": {"a": 1}, "config": {}} for name in "ab"}
        Results(title="t", references=("a",), variants=variants, runs=tuple(runs)).save(
            folder / "results.json"
        )
        (self.root / "plan.yaml").write_bytes(yaml_of(PLAN))
        from lgvq_plugin.bench.plan import read_plan

        for job in read_plan(self.root / "plan.yaml").jobs:
            (folder / job.name / "job.json").write_text(json.dumps(asdict(job)))
        (folder / "plan.yaml").write_bytes(yaml_of(PLAN))
        (folder / "config.yaml").write_bytes(yaml_of(CONFIG))

    # Strategies, one per kind.

    def kinds(self) -> dict[str, st.SearchStrategy[Case]]:
        """Return kind -> strategy of cases."""
        return {
            "config": self.configs(),
            "captions": self.captions(),
            "images": self.images(),
            "shards": self.shards(),
            "ckpt": self.checkpoints(),
            "resume": self.resumes(),
            "retrofit": self.retrofits(),
            "heads": self.heads(),
            "cache": self.caches(),
            "results": self.results(),
        }

    def sound(self) -> dict[str, Case]:
        """Return kind -> a case with nothing wrong."""
        files = {"c.yaml": self.config.read_bytes(), "x.ckpt": self.last.read_bytes()}
        report = ("ablate", "-b", "{}/plan.yaml", "-o", "{}", "--report", "--no-progress")
        export = ("export", "--ckpt", "{}/x.ckpt", "--format", "host", "-o", "{}/out")
        resumed = (*TRAIN[:-1], "3", "--resume", "{}/x.ckpt")
        return {
            "config": Case("sound", files, TRAIN),
            "images": Case("sound", {**self.pictures, "0.txt": b"a dog"}, READ[0]),
            "ckpt": Case("sound", files, export),
            "resume": Case("sound", files, resumed),
            "results": Case("sound", {}, report, folder=self.root / "ablation"),
        }

    @st.composite
    @staticmethod
    def _config(draw: Any) -> Case:
        if draw(st.integers(0, 3)):
            tree, what = draw(mutated(CONFIG))
            content = yaml_of(tree)
        else:
            content, what = draw(damaged(yaml_of(CONFIG), is_text=True))
        words = ("train", "-b", "{}/c.yaml", "--name", "a", "--logdir", "{}/logs", "--no-progress")
        # Lengths may be anything, but a case must end.
        return Case(what, {"c.yaml": content}, (*words, "--max-steps", "1"))

    def configs(self) -> st.SearchStrategy[Case]:
        """Configs for `lgvq train`."""
        return self._config()

    def captions(self) -> st.SearchStrategy[Case]:
        """Caption files of all layouts, for `lgvq data check` and `lgvq data convert`."""
        names = [*self.pictures]
        pairs = [*zip(names, CAPTIONS, strict=True)]
        coco = {
            "images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
            "annotations": [{"id": i, "image_id": i, "caption": c} for i, c in enumerate(CAPTIONS)],
        }
        kar = [
            {"filename": n, "split": "train", "cocoid": i, "sentences": [{"raw": c}]}
            for i, (n, c) in enumerate(pairs)
        ]
        lines = [{"file_name": n, "captions": [c], "split": "train"} for n, c in pairs]
        vqa = [{"image_id": i, "question_id": i, "question": "what?"} for i in range(3)]
        answers = [
            {"question_id": i, "multiple_choice_answer": "a", "answers": [{"answer": "a"}] * 10}
            for i in range(3)
        ]
        table = "filepath{0}title{0}split\n" + "".join(f"{n}{{0}}{c}{{0}}train\n" for n, c in pairs)
        trees: dict[str, Any] = {
            "annotations/captions_train2017.json": coco,
            "dataset_coco.json": {"images": kar},
            "captions.jsonl": lines,
            "captions.json": dict(pairs),
            "metadata.jsonl": lines,
            "v2_OpenEnded_mscoco_train2014_questions.json": {"questions": vqa},
            "v2_mscoco_train2014_annotations.json": {"annotations": answers},
        }
        texts = {
            "captions.csv": table.format(","),
            "captions.tsv": table.format("\t"),
            "captions.txt": "".join(f"{n}\t{c}\n" for n, c in pairs),
            "train.txt": "".join(f"{n}\n" for n in names),
            "Flickr8k.token.txt": "".join(f"{n}#0\t{c}\n" for n, c in pairs),
            "results.csv": "image_name| comment_number| comment\n"
            + "".join(f"{n}| 0| {c}\n" for n, c in pairs),
            "0.txt": CAPTIONS[0],
        }

        @st.composite
        def cases(draw: Any) -> Case:
            name = draw(st.sampled_from([*trees, *texts]))
            if name in trees and draw(st.integers(0, 3)):
                tree, what = draw(mutated(trees[name]))
                is_lines = name.endswith(".jsonl") and isinstance(tree, list)
                content = b"\n".join(map(text_of, tree)) if is_lines else text_of(tree)
            else:
                whole = text_of(trees[name]) if name in trees else texts[name].encode()
                content, what = draw(damaged(whole, is_text=True))
            folder = "train2017/" if "2017" in name else "train2014/" if "v2" in name else ""
            zeros = "COCO_train2014_00000000000{}.jpg" if "v2" in name else None
            files = {}
            for i, (image, picture) in enumerate(self.pictures.items()):
                files[folder + (zeros.format(i) if zeros else image)] = picture
            if name.startswith("v2"):
                files |= {other: text_of(trees[other]) for other in trees if other[:2] == "v2"}
            return Case(f"{name}: {what}", {**files, name: content}, draw(st.sampled_from(READ)))

        return cases()

    def images(self) -> st.SearchStrategy[Case]:
        """Images of odd formats, damaged or with another suffix."""

        def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
            made = io.BytesIO()
            image.save(made, kind, **options)
            return made.getvalue()

        rgb = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
        frames = [rgb, rgb.rotate(90)]
        made = {
            "a.png": saved(rgb, "PNG"),
            "b.jpg": saved(rgb, "JPEG"),
            "c.webp": saved(rgb, "WEBP"),
            "one.png": saved(rgb.resize((1, 1)), "PNG"),
            "thin.png": saved(rgb.resize((3000, 1)), "PNG"),
            "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
            "deep.png": saved(Image.new("I;16", (8, 8), 999), "PNG"),
            "grey.png": saved(rgb.convert("LA"), "PNG"),
            "bits.png": saved(rgb.convert("1"), "PNG"),
            "table.png": saved(rgb.convert("P"), "PNG", transparency=3),
            "moving.gif": saved(rgb, "GIF", save_all=True, append_images=frames),
            "moving.webp": saved(rgb, "WEBP", save_all=True, append_images=frames),
            "float.tiff": saved(Image.new("F", (8, 8), 0.5), "TIFF"),
            "nan.tiff": saved(Image.new("F", (8, 8), math.nan), "TIFF"),
            "old.bmp": saved(rgb, "BMP"),
            "print.tiff": saved(rgb.convert("CMYK"), "TIFF"),
            "lab.tiff": saved(rgb.convert("YCbCr"), "TIFF"),
        }

        @st.composite
        def cases(draw: Any) -> Case:
            name = draw(st.sampled_from([*made]))
            content, what = made[name], "whole"
            if draw(st.integers(0, 4)):
                content, what = draw(damaged(content))
            suffix = draw(st.sampled_from([name, name, name, "x.png", "x.jpg", "x.gif", "x.JPEG"]))
            files = {**self.pictures, suffix: content, "captions.txt": b""}
            listed = "".join(f"{n}\t{CAPTIONS[0]}\n" for n in files if n != "captions.txt")
            files["captions.txt"] = listed.encode()
            words = draw(st.sampled_from((*READ, TRAIN_FOLDER)))
            return Case(f"{suffix} ({name}): {what}", files, words)

        return cases()

    def shards(self) -> st.SearchStrategy[Case]:
        """Tar shards: cut, members without pair, hostile names; and patterns of shards."""

        def tar_of(members: list[tuple[str, bytes, str]]) -> bytes:
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, content, kind in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    if kind != "file":
                        info.type, info.linkname, info.size = kind.encode(), "/etc/passwd", 0
                    with contextlib.suppress(ValueError, UnicodeError):
                        tar.addfile(info, io.BytesIO(content))
            return made.getvalue()

        pictures = [*self.pictures.values()]
        meta = [text_of({"caption": c, "split": "train", "key": "x"}) for c in CAPTIONS]
        base = [[f"{i}.png", pictures[i], "file"] for i in range(3)]
        base += [[f"{i}.json", meta[i], "file"] for i in range(3)]
        base += [[f"{i}.txt", CAPTIONS[i].encode(), "file"] for i in range(3)]
        patterns = [
            *("{0..99999999999}.tar", "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar"),
            *(
                "{9..0}.tar",
                "{0..}.tar",
                "{a..b}.tar",
                "::.tar",
                "{0..2}::x.tar",
                "{" * 300 + ".tar",
            ),
            *("{0..1}" * 40 + ".tar", "{{0..3}..9}.tar", "a\0.tar", "n" * 300 + ".tar"),
            "{" * 300 + ".tar",
            *("{00000000000000000000..1}.tar", "{1..2}.tar::{3..99999999}.tar", "*.tar"),
            *("{" + "9" * 5000 + ".." + "9" * 5001 + "}.tar", "{٠..٩}.tar"),
        ]

        @st.composite
        def cases(draw: Any) -> Case:
            which = draw(st.sampled_from(("tar", "member", "member", "bytes", "pattern")))
            if which == "pattern":
                pattern = draw(st.sampled_from(patterns))
                tree = copy.deepcopy(CONFIG)
                root = "{}/" + pattern
                tree["data"]["train"] = {"target": "webdataset", "params": {"root": root}}
                del tree["data"]["validation"]
                return Case(f"root {pattern[:60]}", {"c.yaml": yaml_of(tree)}, TRAIN)
            members, what = copy.deepcopy(base), ""
            if which == "member":
                i = draw(st.integers(0, len(members) - 1))
                text = members[i][0].endswith(("json", "txt"))
                members[i][1], what = draw(damaged(members[i][1], is_text=text))
                what = f"{members[i][0]}: {what}"
                if members[i][0].endswith("json") and draw(st.booleans()):
                    tree, what = draw(mutated({"caption": "a", "captions": ["a"], "split": "x"}))
                    members[i][1] = text_of(tree)
            elif which == "tar":
                for _ in range(draw(st.integers(1, 3))):
                    i = draw(st.integers(0, len(members) - 1))
                    name = draw(st.sampled_from(HOSTILE_NAMES))
                    name += draw(st.sampled_from(("", ".png", ".json", ".txt", ".a.png")))
                    action = draw(st.sampled_from(("name", "drop", "twice", "link", "device")))
                    what += f"{action} {members[i][0]!r:.20} {name!r:.20}; "
                    if action == "name":
                        members[i][0] = name
                    elif action == "drop":
                        del members[i]
                    elif action == "twice":
                        members.append(members[i])
                    else:
                        members[i] = [members[i][0], b"", "2" if action == "link" else "3"]
            content = tar_of([(n, c, k) for n, c, k in members])
            if which == "bytes":
                content, what = draw(damaged(content))
            return Case(what, {"train-0.tar": content}, draw(st.sampled_from(READ)))

        return cases()

    @st.composite
    @staticmethod
    def _file(draw: Any, tree: Mapping[str, Any], whole: bytes, most: int = 3) -> tuple[bytes, str]:
        """A checkpoint with other content, or damaged."""
        if draw(st.integers(0, 4)):
            changed, what = draw(mutated(tree, tensors=True, most=most))
            made = io.BytesIO()
            torch.save(changed, made)
            return made.getvalue(), what
        return draw(damaged(whole))

    def checkpoints(self) -> st.SearchStrategy[Case]:
        """Checkpoints, for `lgvq export`."""
        whole, plain = self.last.read_bytes(), load_file(self.root / "host/model.safetensors")
        about = (self.root / "host/config.json").read_bytes()
        numbers = text_of({"metrics": {"a/b": {"value": 1.0, "n": 3, "unit": "dB"}}})
        entries = ("state_dict", "lgvq_training", "global_step")
        small = {key: self.checkpoint[key] for key in entries}

        @st.composite
        def cases(draw: Any) -> Case:
            form = draw(st.sampled_from(("host", "safetensors", "heads", "diffusers")))
            out = ("export", "--format", form, "-o", "{}/out", "--ckpt")
            if draw(st.booleans()):
                tree = draw(st.sampled_from((small, small, dict(plain), small["state_dict"])))
                content, what = draw(self._file(tree, whole))
                return Case(f"{form}: {what}", {"x.ckpt": content}, (*out, "{}/x.ckpt"))
            which = draw(st.sampled_from(("weights", "config", "numbers", "foreign")))
            files = {"model.safetensors": save(plain), "config.json": about}
            if which == "weights":
                files["model.safetensors"], what = draw(odd_safetensors(plain))
            elif which == "config":
                tree, what = draw(mutated(json.loads(about)))
                files["config.json"] = text_of(tree)
            elif which == "foreign":
                value = draw(st.sampled_from(ODD)), draw(st.sampled_from(HOSTILE_NAMES))
                made = io.BytesIO()
                torch.save(value[draw(st.integers(0, 1))], made)
                return Case(f"{value!r:.80}", {"x.pt": made.getvalue()}, (*out, "{}/x.pt"))
            else:
                tree, what = draw(mutated(json.loads(numbers)))
                files["results.json"] = text_of(tree)
                if not draw(st.integers(0, 3)):
                    files["results.json"], what = draw(damaged(numbers, is_text=True))
            return Case(f"{form} {which}: {what}", files, (*out, "{}"))

        return cases()

    def resumes(self) -> st.SearchStrategy[Case]:
        """Checkpoints of a run, for `lgvq train --resume`."""
        whole, config = self.last.read_bytes(), self.config.read_bytes()
        words = ("train", "-b", "{}/c.yaml", "--name", "a", "--logdir", "{}/logs", "--no-progress")
        words = (*words, "--max-steps", "3", "--resume", "{}/x.ckpt")
        parts = {key: {key: value} for key, value in self.checkpoint.items()}

        @st.composite
        def cases(draw: Any) -> Case:
            key = draw(st.sampled_from(["", *parts]))
            if key and draw(st.integers(0, 3)):  # each entry as often as the weights
                part, what = draw(mutated(parts[key], tensors=True, most=2))
                tree = {k: v for k, v in self.checkpoint.items() if k != key} | part
                made = io.BytesIO()
                torch.save(tree, made)
                content = made.getvalue()
            else:
                content, what = draw(self._file(self.checkpoint, whole))
            return Case(what, {"x.ckpt": content, "c.yaml": config}, words)

        return cases()

    def retrofits(self) -> st.SearchStrategy[Case]:
        """Checkpoints of a host without heads, and heads, for `lgvq retrofit`."""
        whole = self.last.read_bytes()
        state = self.checkpoint["state_dict"]
        host = {k: v for k, v in state.items() if not k.startswith("loss.lgvq")}
        tree = copy.deepcopy(CONFIG)
        tree["model"]["params"]["lossconfig"]["params"]["lgvq"]["on_nonfinite"] = "raise"
        config = yaml_of(tree)
        words = ("retrofit", "-b", "{}/c.yaml", "-o", "{}/out", "--max-steps", "1", "--images", "2")
        words = (*words, "--no-progress", "--ckpt", "{}/x.ckpt")
        heads = load_file(next((self.root / "heads").glob("*.safetensors")))

        @st.composite
        def cases(draw: Any) -> Case:
            if draw(st.integers(0, 3)):
                content, what = draw(self._file({"state_dict": host, "global_step": 5}, whole))
                return Case(what, {"x.ckpt": content, "c.yaml": config}, words)
            files, what = draw(self._heads(heads))
            files = {f"h/{name}": content for name, content in files.items()}
            return Case(
                f"heads {what}",
                {"x.ckpt": whole, "c.yaml": config, **files},
                (*words, "--heads", "{}/h"),
            )

        return cases()

    @st.composite
    @staticmethod
    def _heads(draw: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, bytes], str]:
        """The two files of saved heads, one of them changed."""
        about = {"defaults": 2, "grid": [4, 4], "lgvq": LOSS["params"]["lgvq"]}  # type: ignore[index]
        files = {"lgvq_config.json": text_of(about), "lgvq_heads.safetensors": save(dict(tensors))}
        if draw(st.booleans()):
            files["lgvq_heads.safetensors"], what = draw(odd_safetensors(tensors))
        elif draw(st.booleans()):
            tree, what = draw(mutated(about))
            files["lgvq_config.json"] = text_of(tree)
        else:
            files["lgvq_config.json"], what = draw(damaged(text_of(about), is_text=True))
        return files, what

    def heads(self) -> st.SearchStrategy[Case]:
        """Folders of heads, for `Handle.from_pretrained`."""
        folder = self.root / "heads"
        (weights,) = folder.glob("*.safetensors")
        tensors = load_file(weights)
        own = {path.name for path in folder.iterdir()}
        assert {"lgvq_config.json", "lgvq_heads.safetensors"} <= own, own

        def read(here: Path) -> None:
            loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
            host = VQVAE(**HOST, quantizer="ema", lossconfig=loss)
            handle = Handle.from_pretrained(host, here)
            features = handle.encode_image(torch.zeros(1, 3, 16, 16))
            assert features.isfinite().all(), "garbage: features that are not finite"

        @st.composite
        def cases(draw: Any) -> Case:
            files, what = draw(self._heads(tensors))
            return Case(what, files, call=read)

        return cases()

    def caches(self) -> st.SearchStrategy[Case]:
        """Text caches, for `lgvq train` and `lgvq cache`."""
        folder = self.root / "cache"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        shard = next(name for name in files if name.startswith("shard"))
        tree = copy.deepcopy(CONFIG)
        block = tree["model"]["params"]["lossconfig"]["params"]["lgvq"]
        block["objectives"] = {"masked_text": {"weight": 0.01}}
        again = yaml_of(tree)
        block["guide"] = {"use": "cached", "folder": "{}/cache"}
        tree["data"]["validation"] = None
        config = yaml_of(tree)
        tensors = {name: load_file(folder / name) for name in files if name.endswith("tensors")}

        @st.composite
        def cases(draw: Any) -> Case:
            name = draw(st.sampled_from((shard, shard, "cache.json", "vocabulary.safetensors")))
            if name == "cache.json":
                if draw(st.integers(0, 3)):
                    changed, what = draw(mutated(json.loads(files[name])))
                    content = text_of(changed)
                else:
                    content, what = draw(damaged(files[name], is_text=True))
            else:
                content, what = draw(odd_safetensors(tensors[name]))
            words = TRAIN if draw(st.integers(0, 3)) else CACHE_AGAIN
            held = {f"cache/{key}": value for key, value in {**files, name: content}.items()}
            held |= {"c.yaml": config, "again.yaml": again}
            return Case(f"{words[0]} {name}: {what}", held, words)

        return cases()

    def results(self) -> st.SearchStrategy[Case]:
        """Result files, for `lgvq ablate`."""
        folder = self.root / "ablation"
        words = ("ablate", "-b", "{}/plan.yaml", "-o", "{}", "--no-progress")
        read = {
            "results.json": (*words, "--report"),
            "a/seed_0/run.json": (*words, "--resume", "auto"),
            "b/seed_0/run.json": (*words, "--resume", "auto"),
            "a/seed_0/job.json": (*words, "--resume", "auto"),
            "plan.yaml": (*words, "--resume", "auto"),
        }

        @st.composite
        def cases(draw: Any) -> Case:
            name = draw(st.sampled_from(["results.json", *read]))
            whole = (folder / name).read_bytes()
            is_plan = name == "plan.yaml"
            if draw(st.integers(0, 4)):
                tree = PLAN if is_plan else json.loads(whole)
                changed, what = draw(mutated(tree))
                content = yaml_of(changed) if is_plan else text_of(changed)
            else:
                content, what = draw(damaged(whole, is_text=True))
            return Case(f"{name}: {what}", {name: content}, read[name], folder=folder)

        return cases()


READ = (
    ("data", "check", "{}", "--no-progress", "--workers", "1"),
    ("data", "convert", "{}", "{}/out", "--no-progress", "--workers", "1", "--size", "16"),
)
TRAIN = (
    *("train", "-b", "{}/c.yaml", "--name", "a", "--logdir", "{}/logs", "--no-progress"),
    *("--max-steps", "1"),
)
TRAIN_FOLDER = (
    *TRAIN[:2],
    "{root}/config.yaml",
    *TRAIN[3:],
    "--data",
    "{}",
    "data.train.params.size=16",
)
CACHE_AGAIN = ("cache", "-b", "{}/again.yaml", "-o", "{}/cache", "--no-progress", "--maskings", "1")


@st.composite
def odd_safetensors(draw: Any, tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """A .safetensors file with other tensors, another header, or damaged."""
    whole = save(dict(tensors))
    size = int.from_bytes(whole[:8], "little")
    kind = draw(st.sampled_from(("tensors", "tensors", "tensors", "header", "bytes", "length")))
    if kind == "tensors":
        changed, what = draw(mutated(dict(tensors), tensors=True))
        made = {str(k): v for k, v in changed.items() if isinstance(v, Tensor)}
        usable = {
            k.encode("utf-8", "replace").decode(): v.detach().clone().contiguous()
            for k, v in made.items()
            if v.layout == torch.strided and not v.is_meta
        }
        return save(usable), what
    if kind == "header":
        header, what = draw(mutated(json.loads(whole[8 : 8 + size])))
        text = text_of(header)
        return len(text).to_bytes(8, "little") + text + whole[8 + size :], f"header: {what}"
    if kind == "length":
        length = draw(st.sampled_from((0, 1, size - 1, size + 1, 2**40, 2**63, 2**64 - 1)))
        return length.to_bytes(8, "little") + whole[8:], f"length {length}"
    return draw(damaged(whole))


# -- Running -------------------------------------------------------------------------------------


def attempt(case: Case, workshop: Workshop, seconds: float = SECONDS) -> Outcome:
    """Run a case in a folder of its own, and judge how it ended."""
    with tempfile.TemporaryDirectory(prefix="lgvq_case_") as name:
        here = Path(name)
        if case.folder is not None:
            shutil.copytree(case.folder, here, dirs_exist_ok=True)
        for file, content in case.files.items():
            path = here / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".yaml", ".yml"):
                content = content.replace(b"{}/", f"{here}/".encode())
            path.write_bytes(content)
        said, before = io.StringIO(), {*os.listdir("/tmp")}
        outcome = _run(case, workshop, here, said, seconds)
        outcome.what = case.what
        if outcome.verdict == "success" and (wrong := _garbage(here)):
            outcome = Outcome("garbage", wrong, case.what)
        if stray := {n for n in {*os.listdir("/tmp")} - before if "escaped" in n}:
            outcome = Outcome("escaped", str(stray), case.what)
        return outcome


def _run(case: Case, workshop: Workshop, here: Path, said: io.StringIO, seconds: float) -> Outcome:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {seconds} s")

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if case.call is not None:
                case.call(here)
                code: Any = 0
            else:
                fill = {"{}": str(here), "{root}": str(workshop.root)}
                words = [re.sub(r"\{(root)?\}", lambda m: fill[m[0]], w) for w in case.words]
                code = cli.main(words)
    except Hang as hang:
        at = traceback.extract_tb(hang.__traceback__)
        ours = [f for f in at if "lgvq_plugin" in f.filename]
        return Outcome("hang", f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "")
    except ConfigError:
        return Outcome("refused")
    except SystemExit as end:
        code = end.code
    except Exception as error:
        at = [f for f in traceback.extract_tb(error.__traceback__) if "lgvq_plugin" in f.filename]
        where = f"{Path(at[-1].filename).name}:{at[-1].lineno}" if at else ""
        return Outcome("traceback", f"{type(error).__name__}: {error!s:.150} ({where})")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        torch.set_num_threads(threads)
    return _judge(code, said.getvalue(), case)


def _judge(code: Any, text: str, case: Case) -> Outcome:
    lines = text.splitlines()
    errors = [line for line in lines if re.match(r"lgvq( \w+)*: (error|failed)", line)]
    if "Traceback (most recent call last)" in text:
        frames = [x.strip() for x in lines if x.strip().startswith("File ") and "lgvq_plugin" in x]
        at = re.sub(
            r'File ".*/(.*)", line (\d+), in (\w+)', r"\1:\2 \3", frames[-1] if frames else ""
        )
        return Outcome("traceback", f"{(errors or lines)[-1]:.200} ({at})")
    if code == 0:
        return Outcome("success")
    if code == 2 and len(errors) <= 1:  # `lgvq data check` prints its findings instead
        return Outcome("refused")
    if code == 1 and len(errors) == 1 and "finite" in errors[0]:
        return Outcome("diverged", errors[0])
    if code == 1 and case.words[0] == "ablate" and not errors:
        return Outcome("success")  # of a report that tells of a failed run
    return Outcome("messages", f"exit code {code}: {errors or lines[-3:]}"[:300])


def _garbage(here: Path) -> str:
    """Return what is wrong with the weights that a successful command has written, or ""."""
    written = [*here.glob("logs/*/checkpoints/last.ckpt"), *here.glob("out/checkpoints/last.ckpt")]
    written += [p for p in (here / "out", *here.glob("out/*.safetensors")) if p.is_file()]
    for path in written:
        is_safe = path.suffix == ".safetensors"
        content = load_file(path) if is_safe else torch.load(path, weights_only=True)
        for key, value in (content if is_safe else content["state_dict"]).items():
            if value.is_floating_point() and not value.isfinite().all():
                return f"{path.name}: {key} is not finite"
    return ""


def run_kind(
    strategy: st.SearchStrategy[Case],
    workshop: Workshop,
    count: int,
    *,
    seed: int = 0,
    seconds: float = SECONDS,
) -> list[Outcome]:
    """Run `count` cases of a kind; the same seed gives the same cases."""
    outcomes: list[Outcome] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(strategy)
    def one(case: Case) -> None:
        outcomes.append(attempt(case, workshop, seconds))

    one()
    return outcomes


@contextlib.contextmanager
def narrowed() -> Iterator[None]:
    """Draw no figures and start no jobs, which take seconds, and bound the memory."""
    draw, launch = figures.write_figures, jobs._launch
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    level = logging.root.manager.disable
    try:
        figures.write_figures = lambda *_: []
        jobs._launch = _refuse
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        logging.disable(logging.INFO)
        yield
    finally:
        logging.disable(level)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        figures.write_figures, jobs._launch = draw, launch


def _refuse(*_: Any) -> Any:
    import subprocess

    return subprocess.Popen(["false"])


def main() -> int:
    """Run the script; returns 1 if there are defects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="lgvq_stress_") as name, narrowed():
        workshop = Workshop(Path(name))
        kinds = {k: s for k, s in workshop.kinds().items() if k in (given.kinds or [k])}
        for kind, strategy in kinds.items():
            count = -(-given.cases // len(kinds))
            begin = time.monotonic()
            found[kind] = run_kind(strategy, workshop, count, seed=given.seed)
            took = f"{time.monotonic() - begin:.0f} s"
            print(f"{kind}: {len(found[kind])} cases in {took}", flush=True)
            print("".join(f"  {line}\n" for line in defects_of(found[kind])), end="", flush=True)
    print(f"\n| input | cases | {' | '.join(VERDICTS)} |\n|---|{'---:|' * (len(VERDICTS) + 1)}")
    for kind, outcomes in {**found, "all": [x for each in found.values() for x in each]}.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        print(f"| {kind} | {len(outcomes)} | {' | '.join(str(counts[v]) for v in VERDICTS)} |")
    return int(any(is_defect(x) for outcomes in found.values() for x in outcomes))


def is_defect(outcome: Outcome) -> bool:
    """Whether a case ended neither in success nor in one message."""
    return outcome.verdict not in VERDICTS[:3]


def defects_of(outcomes: list[Outcome]) -> list[str]:
    """Return one line per kind of defect: how it ended, and what was broken."""
    first: dict[str, Outcome] = {}
    for outcome in filter(is_defect, outcomes):
        first.setdefault(re.sub(r"[0-9]+", "", outcome.detail)[-60:], outcome)
    return [f"{x.verdict}: {x.detail}\n    by {x.what[:400]}" for x in first.values()]


if __name__ == "__main__":
    raise SystemExit(main())
