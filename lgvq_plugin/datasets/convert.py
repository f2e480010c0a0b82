"""`lgvq data convert`: shrink a data set once, so that training decodes small files.

out/convert.json      what is being written: resuming with other settings is refused
out[/split]/000000.tar ... sizes.json                    --format webdataset
out[/split]/images/...  metadata.jsonl                   --format folder (an HF imagefolder)

Work is cut into parts of `shard_size` images; a part is there whole or not at all.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import Any

from tqdm import tqdm

from ..config import differing
from ..files import replacing, write_bytes, write_json, write_text
from ..sockets import ConfigError, suggest
from .base import CONVERTED_FROM, CaptionedFiles, recognize
from .commands import check_settings

PLAN = "convert.json"
ROWS = ".rows"  # the table of --format folder, part by part
BAD = ".problems"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the bytes that are written."""

    format: str = "webdataset"
    """webdataset or folder."""
    size: int = 256
    """Pixels of the shorter side; smaller images stay as they are."""
    square: bool = False
    """Cut the largest square from the middle; training can then no longer crop at random."""
    shard_size: int = 1000
    """Images of a part."""

    def __post_init__(self) -> None:
        check_settings(self.format, size=self.size, shard_size=self.shard_size)


@dataclass(frozen=True)
class Conversion:
    """The result of :func:`convert`."""

    out: Path
    written: dict[str, int]
    """Split -> images that are there now."""
    resumed: int
    """Images that an earlier run had written."""
    problems: list[str]
    """What was left out: "file<tab>reason"."""


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
    """Write a smaller copy of a data set; run it again after a kill and it goes on.

    Args:
        path: a folder, table or list of paths.
        out: a new folder, or one that this command began to fill.
        settings: format, size and so on.
        member: the data set to take it for; None asks all.
        split: this one only.
        workers: threads; each writes a part.
        progress: show a bar.
        options: of the data set, such as encoding and caption_key.

    Raises:
        ConfigError: if the layout is unknown, or `out` holds something else.
    """
    if out.resolve().is_relative_to(Path(path).resolve()):
        raise ConfigError(f"{out} lies in {path}, which would then hold both; choose another place")
    layout = recognize(path, member)
    if split is not None and split not in layout.splits:
        raise ConfigError(f"--split: {split!r}{suggest(split, list(layout.splits))}")
    splits = [split] if split else list(layout.splits)
    sources = {name: layout.build(name, skip_corrupt=True, **options) for name in splits}
    homes = {name: _home(out, name) for name in splits}
    if len({*homes.values()}) < len(homes):
        raise ConfigError(f"choose one with --split: {', '.join(splits)} would share a folder")
    _write_plan(out, settings, sources)
    parts = [
        part
        for name, source in sources.items()
        for part in _parts(source, homes[name], out / BAD / name, settings)
    ]
    todo = [part for part in parts if not part.target.is_file()]
    resumed = sum(len(part.indices) for part in parts) - sum(len(part.indices) for part in todo)
    _run(todo, settings, workers, resumed, progress)
    written = {}
    for name, home in homes.items():
        own = [part for part in parts if part.home == home]
        written[name] = _finish(home, own, settings.format)
    problems = [line for part in parts for line in part.problems()]
    if problems:
        write_text(out / "problems.txt", "".join(f"{p}\n" for p in problems))
    return Conversion(out, written, resumed, problems)


@dataclass(frozen=True)
class _Part:
    """A run of images that is written in one go."""

    source: CaptionedFiles
    home: Path
    indices: range
    target: Path
    """Its tar, or its rows of the table; there once the part is done."""
    bad: Path
    names: dict[int, str]
    """Names without suffix that images get in a folder."""

    def problems(self) -> list[str]:
        """Return "file<tab>reason" of the images left out."""
        return self.bad.read_text().splitlines() if self.bad.is_file() else []


def _home(out: Path, split: str) -> Path:
    name = split.rstrip("0123456789")  # train2017
    return out if name == "all" else out / name


def _write_plan(out: Path, settings: Settings, sources: dict[str, CaptionedFiles]) -> None:
    plan = {
        **vars(settings),
        "sources": {name: _digest(source) for name, source in sources.items()},
    }
    path = out / PLAN
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is broken ({error}); choose another folder") from error
        changed = differing(before, plan)
        if changed:
            told = ", ".join(changed)
            raise ConfigError(
                f"{out} was begun with other settings ({told}); choose another folder"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty and holds no {PLAN}; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def _digest(source: CaptionedFiles) -> str:
    """Return a hash of names and captions, so that a changed source is noticed."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        row = [source.file_of(index), *source.captions_of(index)]
        digest.update(json.dumps(row).encode())
    return f"{len(source)} images, sha256 {digest.hexdigest()}"


def _parts(source: CaptionedFiles, home: Path, bad: Path, settings: Settings) -> list[_Part]:
    in_folder = settings.format == "folder"
    names = _names(source) if in_folder else {}
    parts = []
    for number, first in enumerate(range(0, len(source), settings.shard_size)):
        indices = range(first, min(first + settings.shard_size, len(source)))
        file = f"{number:06d}.jsonl" if in_folder else f"{number:06d}.tar"
        target = home / ROWS / file if in_folder else home / file
        own = {index: names[index] for index in indices} if in_folder else {}
        parts.append(_Part(source, home, indices, target, bad / f"{number:06d}.txt", own))
    return parts


def _names(source: CaptionedFiles) -> dict[int, str]:
    """Return index -> the file's old name without suffix; those that would clash are numbered."""
    plain = {}
    for index in range(len(source)):
        old = PurePosixPath(source.file_of(index).rpartition(":")[2])
        kept = [word for word in old.with_suffix("").parts if word not in ("/", "..", "images")]
        plain[index] = "/".join(kept)
    times = Counter(plain.values())
    return {i: name if times[name] == 1 else f"{name}_{i:09d}" for i, name in plain.items()}


def _run(parts: list[_Part], settings: Settings, workers: int, done: int, progress: bool) -> None:
    total = done + sum(len(part.indices) for part in parts)
    stop, lock = Event(), Lock()
    with tqdm(total=total, initial=done, unit="img", disable=not progress) as bar:

        def tick() -> None:
            if stop.is_set():
                raise InterruptedError("another part failed")
            with lock:
                bar.update()

        pool = ThreadPoolExecutor(workers)
        write = _write_shard if settings.format == "webdataset" else _write_files
        try:
            for future in as_completed([pool.submit(write, p, settings, tick) for p in parts]):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _write_shard(part: _Part, settings: Settings, tick: Any) -> None:
    bad: list[str] = []
    with replacing(part.target) as whole, tarfile.open(whole, "w") as tar:
        for index in part.indices:
            tick()
            image = _shrunken(part, index, settings, bad)
            if image is None:
                continue
            captions = part.source.captions_of(index)
            _add(tar, f"{index:09d}{image[1]}", image[0])
            _add(tar, f"{index:09d}.txt", "\n".join(captions).encode())
            _add(tar, f"{index:09d}.json", _row(part.source, index))
        _write_problems(part, bad)  # before the shard itself says that it is done


def _write_files(part: _Part, settings: Settings, tick: Any) -> None:
    rows: list[bytes] = []
    bad: list[str] = []
    for index in part.indices:
        tick()
        image = _shrunken(part, index, settings, bad)
        if image is None:
            continue
        name = f"images/{part.names[index]}{image[1]}"
        path = part.home / name
        write_bytes(path, image[0])
        rows.append(_row(part.source, index, file_name=name))
    _write_problems(part, bad)
    write_bytes(part.target, b"".join(row + b"\n" for row in rows))


def _shrunken(
    part: _Part, index: int, settings: Settings, bad: list[str]
) -> tuple[bytes, str] | None:
    try:
        return part.source.shrunken(index, settings.size, square=settings.square)
    except ConfigError as error:  # missing, corrupt, a bomb: named, and the others go on
        bad.append(f"{part.source.file_of(index)}\t{' '.join(str(error).split())}")
        return None


def _write_problems(part: _Part, bad: list[str]) -> None:
    part.bad.unlink(missing_ok=True)
    if bad:
        write_text(part.bad, "".join(f"{line}\n" for line in bad))


def _row(source: CaptionedFiles, index: int, **first: str) -> bytes:
    row = {**first, "captions": source.captions_of(index), CONVERTED_FROM: source.file_of(index)}
    row.update(source.extra_of(index))
    return json.dumps(row, default=lambda array: array.tolist()).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner: the same input gives the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _finish(home: Path, parts: list[_Part], form: str) -> int:
    """Write the table or the sizes of the shards; return how many images there are."""
    for leftover in home.glob("*.part"):  # of runs that were killed
        leftover.unlink(missing_ok=True)
    counts = {p.target.name: len(p.indices) - len(p.problems()) for p in parts}
    if form == "folder":
        table = b"".join(part.target.read_bytes() for part in parts)
        write_bytes(home / "metadata.jsonl", table)
    else:
        write_json(home / "sizes.json", counts)
    return sum(counts.values())
