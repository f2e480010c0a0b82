"""`lgvq data check|convert PATH`; torch is imported once the arguments are checked.

`convert` shrinks a data set once, so that training decodes small files:
out/convert.json      what is being written: resuming with other settings is refused
out[/split]/000000.tar ... sizes.json                    --format webdataset
out[/split]/images/...  metadata.jsonl                   --format folder (an HF imagefolder)

Work is cut into parts of `shard_size` images; a part is written completely or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from ..config import differing, require
from ..files import remove_parts, replacing, write_bytes, write_json, write_text
from ..sockets import ConfigError, path_of, suggest
from . import MEMBERS
from .splits import CONVERTED_FROM

if TYPE_CHECKING:
    from .listed import ListedImages

FORMATS = ("webdataset", "folder")
PLAN = "convert.json"
ROWS = ".rows"  # the table of --format folder, part by part
BAD = ".problems"


def main(argv: list[str]) -> int:
    """Run `lgvq data check PATH [...]` or `lgvq data convert PATH OUT [...]`.

    Returns 0, or 2 if a data set was recognized but cannot be used; wrong input is a ConfigError.
    """
    given = _parser().parse_args(argv)
    if given.workers < 1:
        raise ConfigError(f"--workers must be >= 1, got {given.workers}")
    if not given.path.expanduser().exists():
        raise ConfigError(f"{given.path} does not exist; expected a folder of images or a table")
    if given.member is not None:
        path_of("datasets", given.member)
    names = ("member", "split", "workers", "encoding", "file_key", "caption_key")
    options = {name: value for name in names if (value := getattr(given, name)) is not None}
    return given.run(given, progress=not given.no_progress, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lgvq data", description="Work with captioned images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|convert")
    check = commands.add_parser(
        "check",
        help="report what a path holds and whether it can be trained on",
        description="Recognize a data set, decode every image, measure every caption. Nothing "
        "is written without -o. Exit code 2: it cannot be used.",
    )
    convert = commands.add_parser(
        "convert",
        help="write a smaller copy that trains faster",
        description="Shrink every image to `--size` (shorter side) and write tar shards or a "
        "folder. Run it again to resume after a kill. Files that cannot be read are "
        "left out and named in OUT/problems.txt.",
    )
    for command, run in ((check, _check), (convert, _convert)):
        add = command.add_argument
        add("path", type=Path, metavar="PATH", help="folder, table or list of paths")
        add("--as", dest="member", metavar="NAME", help=f"one of {', '.join(MEMBERS)}")
        add("--split", help="this split only")
        add("--encoding", help="of the files with captions (default: utf-8)")
        add("--file-key", help="the column with the images' paths")
        add("--caption-key", help="the column with the captions")
        add("--workers", type=int, default=os.cpu_count() or 1, help="threads")
        add("--no-progress", action="store_true", help="no progress bar")
        command.set_defaults(run=run)
    written = "write problems.txt, report.json and contact sheets there"
    check.add_argument("-o", "--out", type=Path, help=written)
    guide = "count captions in this guide's tokens"
    check.add_argument("--guide", default="micro_clip", help=guide)
    check.add_argument("--max-length", type=int, help="tokens per caption (default: 30)")
    add = convert.add_argument
    add("out", type=Path, metavar="OUT", help="a new folder")
    add("--format", default="webdataset", metavar="|".join(FORMATS))
    add("--size", type=int, default=256, help="shorter side (default: 256)")
    add("--square", action="store_true", help="also cut the square in the middle")
    add("--shard-size", type=int, default=1000, help="images per shard")
    return parser


def _check(given: argparse.Namespace, **options: Any) -> int:
    path_of("guides", given.guide)
    from .check import as_text, check

    guide = {"use": given.guide}
    if given.max_length is not None:
        guide["max_length"] = given.max_length
    result = check(given.path, given.out, guide=guide, **options)
    print(as_text(result))
    return 0 if result.is_usable else 2


def _convert(given: argparse.Namespace, **options: Any) -> int:
    settings = Settings(
        format=given.format, size=given.size, square=given.square, shard_size=given.shard_size
    )
    result = convert(given.path, given.out, settings, **options)
    for split, count in result.written.items():
        print(f"{split}: {count:,} images")
    if result.resumed:
        print(f"{result.resumed:,} of them were written by an earlier run")
    if result.problems:
        print(f"{len(result.problems):,} files left out, named in {result.out / 'problems.txt'}")
    where = f"target: {given.format}, params: {{root: {result.out}}}"
    print(f"wrote {result.out}; in a config: {where}")
    return 0 if all(result.written.values()) else 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the bytes that are written."""

    format: str = "webdataset"
    """webdataset or folder."""
    size: int = 256
    """Pixels of the shorter side; smaller images stay as they are."""
    square: bool = False
    """Cut the largest square from the middle; training can then no longer crop at random."""
    shard_size: int = 1000
    """Images per part."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format: {self.format!r}{suggest(self.format, FORMATS)}")
        for name in ("size", "shard_size"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))


@dataclass(frozen=True)
class Conversion:
    """The result of :func:`convert`."""

    out: Path
    written: dict[str, int]  # split -> number of images written so far
    resumed: int  # images that an earlier run had written
    problems: list[str]  # what was left out: "file<tab>reason"


def convert(
    path: str | Path,
    out: Path,
    settings: Settings,
    *,
    member: str | None = None,
    split: str | None = None,
    workers: int = 1,
    progress: bool = True,
    **options: Any,
) -> Conversion:
    """Write a smaller copy of a data set; run it again after a kill to resume.

    Args:
        path: a folder, table or list of paths.
        out: a new folder, or one that this command began to fill.
        settings: format, size and so on.
        member: the data set to read it as; None tries all.
        split: this one only.
        workers: threads; each writes a part.
        progress: show a bar.
        options: of the data set, such as encoding and caption_key.
    """
    from .base import recognize  # imports torch

    if out.resolve().is_relative_to(Path(path).resolve()):
        both = f"{out} is inside {path}, which would then hold both"
        raise ConfigError(f"{both}; choose another place")
    layout = recognize(path, member)
    splits = layout.chosen(split)
    sources = {name: layout.build(name, skip_corrupt=True, **options) for name in splits}
    # train2017 goes to out/train
    homes = {s: out if s == "all" else out / s.rstrip("0123456789") for s in splits}
    if len({*homes.values()}) < len(homes):
        raise ConfigError(f"choose one with --split: {', '.join(splits)} would share a folder")
    _write_plan(out, settings, sources)
    remove_parts(out)
    parts = {s: _parts(sources[s], settings, homes[s], out / BAD / s) for s in splits}
    every = [part for own in parts.values() for part in own]
    todo = [part for part in every if not part.target.is_file()]
    resumed = sum(len(part.indices) for part in every if part.target.is_file())
    _run(todo, workers, resumed, progress)
    written = {name: _finish(homes[name], own, settings.format) for name, own in parts.items()}
    problems = [line for part in every for line in part.problems()]
    if problems:
        write_text(out / "problems.txt", "".join(f"{p}\n" for p in problems))
    return Conversion(out, written, resumed, problems)


@dataclass(frozen=True)
class _Part:
    """A run of images that is written in one go."""

    source: ListedImages
    settings: Settings
    home: Path
    indices: range
    target: Path  # its tar, or its rows of the table; exists once the part is done
    bad: Path
    names: dict[int, str]  # without suffix, that images get in a folder

    def write(self, tick: Callable[[], None]) -> None:
        """Write the part, and what had to be left out; `tick` is called before each image."""
        bad: list[str] = []
        images = self._images(tick, bad)
        if self.settings.format == "folder":
            write_bytes(self.target, b"".join(self._write_file(*image) for image in images))
        else:
            with replacing(self.target) as whole, tarfile.open(whole, "w") as tar:
                for image in images:
                    self._add_sample(tar, *image)
        self.bad.unlink(missing_ok=True)
        if bad:
            write_text(self.bad, "".join(bad))

    def problems(self) -> list[str]:
        """Return "file<tab>reason" of the images left out."""
        return self.bad.read_text().splitlines() if self.bad.is_file() else []

    def _images(self, tick: Callable[[], None], bad: list[str]) -> Iterator[tuple[int, bytes, str]]:
        """Yield (index, encoded image, suffix)."""
        from .images import shrink  # imports NumPy

        for index in self.indices:
            tick()
            record = self.source.records[index]
            try:
                image = shrink(record.path, self.settings.size, square=self.settings.square)
            except ConfigError as error:  # missing, corrupt, a bomb
                bad.append(f"{record.file}\t{' '.join(str(error).split())}\n")
            else:
                yield index, *image

    def _add_sample(self, tar: tarfile.TarFile, index: int, image: bytes, suffix: str) -> None:
        captions = "\n".join(self.source.records[index].captions).encode()
        for ending, content in ((suffix, image), (".txt", captions), (".json", self._row(index))):
            # no time and no owner: the same input gives the same bytes
            info = tarfile.TarInfo(f"{index:09d}{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    def _write_file(self, index: int, image: bytes, suffix: str) -> bytes:
        """Return its row of the table."""
        name = f"images/{self.names[index]}{suffix}"
        write_bytes(self.home / name, image)
        return self._row(index, file_name=name) + b"\n"

    def _row(self, index: int, **first: str) -> bytes:
        record = self.source.records[index]
        row = {**first, "captions": record.captions, CONVERTED_FROM: record.file, **record.extra}
        return json.dumps(row, default=lambda array: array.tolist()).encode()


def _write_plan(out: Path, settings: Settings, sources: dict[str, ListedImages]) -> None:
    digests = {name: _digest(source) for name, source in sources.items()}
    plan, path = {**vars(settings), "sources": digests}, out / PLAN
    remove_parts(path)  # of a run that was killed at its start
    if path.is_file():
        try:
            changed = ", ".join(differing(json.loads(path.read_text()), plan))
        except ValueError as error:
            raise ConfigError(f"{path} is broken ({error}); choose another folder") from error
        if changed:
            begun = f"{out} was begun with other settings ({changed})"
            raise ConfigError(f"{begun}; choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty and holds no {PLAN}; choose a new folder")
    else:
        write_json(path, plan)


def _digest(source: ListedImages) -> str:
    """Return a hash of names and captions, so that a changed source is noticed."""
    digest = hashlib.sha256()
    for record in source.records:
        digest.update(json.dumps([record.file, *record.captions]).encode())
    return f"{len(source)} images, sha256 {digest.hexdigest()}"


def _parts(source: ListedImages, settings: Settings, home: Path, bad: Path) -> list[_Part]:
    in_folder, size = settings.format == "folder", settings.shard_size
    names, parts = _names(source) if in_folder else {}, []
    for number, first in enumerate(range(0, len(source), size)):
        indices = range(first, min(first + size, len(source)))
        target = home / ROWS / f"{number:06d}.jsonl" if in_folder else home / f"{number:06d}.tar"
        rejects = bad / f"{number:06d}.txt"
        parts.append(_Part(source, settings, home, indices, target, rejects, names))
    return parts


def _names(source: ListedImages) -> dict[int, str]:
    """Return index -> the file's old name without suffix; those that would clash are numbered."""
    plain = {}
    for index, record in enumerate(source.records):
        old = PurePosixPath(record.file.rpartition(":")[2])
        kept = [word for word in old.with_suffix("").parts if word not in ("/", "..", "images")]
        plain[index] = "/".join(kept)
    times = Counter(plain.values())
    return {i: name if times[name] == 1 else f"{name}_{i:09d}" for i, name in plain.items()}


def _run(parts: list[_Part], workers: int, done: int, progress: bool) -> None:
    from tqdm import tqdm

    total = done + sum(len(part.indices) for part in parts)
    stop, lock, pool = Event(), Lock(), ThreadPoolExecutor(workers)
    with tqdm(total=total, initial=done, unit="img", disable=not progress) as bar:

        def tick() -> None:
            if stop.is_set():
                raise InterruptedError("another part failed")
            with lock:
                bar.update()

        try:
            for future in as_completed([pool.submit(part.write, tick) for part in parts]):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _finish(home: Path, parts: list[_Part], form: str) -> int:
    """Write the table or the sizes of the shards; return the number of images written."""
    counts = {p.target.name: len(p.indices) - len(p.problems()) for p in parts}
    if form == "folder":
        table = b"".join(part.target.read_bytes() for part in parts)
        write_bytes(home / "metadata.jsonl", table)
    else:
        write_json(home / "sizes.json", counts)
    return sum(counts.values())
