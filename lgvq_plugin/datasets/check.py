"""A contact sheet: pictures as training will see them, captions below."""

import io
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..files import require_writable, write_bytes, write_json, write_text
from ..guides.base import AbstractGuide, build_guide
from ..sockets import ConfigError, suggest
from .base import EXPECTED, CaptionedFiles, Health, recognize

COLUMNS = 6
MARGIN = 8
LINE = 13  # pixels of a line of text
LINES = 5
LETTERS = 31  # that fit below a picture of 192 pixels


def write_sheet(path: Path, dataset: CaptionedFiles, indices: Sequence[int]) -> None:
    """Write a PNG with these samples of a data set that gives (H, W, 3) images."""
    from PIL import Image, ImageDraw, ImageFont

    samples = [dataset[index] for index in indices]
    side = samples[0]["image"].shape[0]
    wide, high = side + MARGIN, side + MARGIN + LINES * LINE + MARGIN
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "#e8e8e8")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(_font()), 10)
    for place, sample in enumerate(samples):
        left = MARGIN + place % columns * wide
        top = MARGIN + place // columns * high
        pixels = ((sample["image"] + 1) * 127.5).round().astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (left, top))
        told = sample["captions"][0] if sample["captions"] else "(no caption)"
        more = len(sample["captions"]) - 1
        words = f"{told}  (+{more})" if more > 0 else told
        for row, line in enumerate(_lines(words, sample["file"])):
            ink = "#777777" if row == 0 else "black"
            pen.text((left, top + side + 2 + row * LINE), line, fill=ink, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _lines(caption: str, file: str) -> list[str]:
    name = file if len(file) <= LETTERS else f"…{file[1 - LETTERS :]}"
    return [name, *textwrap.wrap(caption, LETTERS, max_lines=LINES - 1, placeholder=" …")]


def _font() -> Path:
    # matplotlib's wheel carries it: wide coverage of letters, the same on every machine.
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


# -- `lgvq data check`: what lies at a path, what of it cannot be used, and how it looks ---------


SHEET = 24  # pictures on a contact sheet
BATCH = 512  # captions a call of the tokenizer


@dataclass(frozen=True)
class Lengths:
    """How long captions are, in tokens of the guide, start and end included."""

    median: int
    most: int
    """95 % of the captions are no longer than this."""
    longest: int
    """As cut: no more than `limit`."""
    cut: int
    limit: int


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split; counts of images unless said otherwise."""

    images: int
    captions: int
    """Captions in all."""
    fewest_captions: int
    most_captions: int
    without_caption: int
    lengths: Lengths | None
    repeated_captions: int
    """Different captions that stand with more than one image; L_gsa takes them for negatives."""
    most_repeated: tuple[str, int]
    repeated_images: int
    """Files that have the very bytes of another one."""
    median_size: tuple[int, int]
    smallest_side: int
    problems: dict[str, int]
    """missing, empty, corrupt, bomb -> how many."""
    has_questions: bool = False
    template: str = ""
    """Captions were made from the names of class folders, by this text."""
    broken_captions: int = 0
    """Captions with U+FFFD in them: their bytes are of another encoding."""
    first_broken: tuple[str, str] = ("", "")
    """File and caption of the first of them."""
    unread: tuple[str, ...] = ()
    """Files that seem to hold captions and were not read; sought where captions are missing."""
    words: int = 0
    unknown_words: int = 0
    """Of those, words that the guide was not trained on; 0 for a guide that cannot tell."""
    unknown_examples: tuple[str, ...] = ()

    @property
    def readable(self) -> int:
        """Images that can be used."""
        return self.images - sum(self.problems.values())

    @property
    def is_usable(self) -> bool:
        """Whether a model can be trained or tested on it."""
        return self.readable > 0


@dataclass(frozen=True)
class Check:
    """The result of :func:`check`."""

    path: Path
    member: str
    splits: dict[str, SplitReport]
    shared_images: int
    """Files whose bytes stand in more than one split."""
    problems: list[Health]
    files: list[Path]
    """What was written."""

    @property
    def is_usable(self) -> bool:
        """Whether every split has readable images, and any split has captions."""
        return self.has_captions and all(report.is_usable for report in self.splits.values())

    @property
    def has_captions(self) -> bool:
        """Whether any image has a caption."""
        return any(report.captions for report in self.splits.values())


def check(
    path: str | Path,
    out: Path | None = None,
    *,
    member: str | None = None,
    split: str | None = None,
    guide: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: bool = True,
    **options: Any,
) -> Check:
    """Read everything at a path once; write `problems.txt`, `report.json` and pictures to `out`.

    Args:
        path: a folder, table or list of paths.
        out: where the files go; None writes nothing.
        member: the data set to take it for; None asks all.
        split: look at this one only.
        guide: the `lgvq.guide` block whose tokens captions are measured in; None is the
            embedded one.
        workers: threads that read and decode.
        progress: show a bar.
        options: of the data set, such as encoding and caption_key.

    Raises:
        ConfigError: if the layout is unknown, or its lists cannot be read at all.
    """
    layout = recognize(path, member)
    if split is not None and split not in layout.splits:
        raise ConfigError(f"--split: {split!r}{suggest(split, list(layout.splits))}")
    if out is not None:
        require_writable(out)
    ruler = build_guide(guide or {"use": "micro_clip"})
    splits, problems, written = {}, [], []
    homes: dict[str, set[str]] = {}
    for name in [split] if split else layout.splits:
        dataset = layout.build(name, size=192, crop="none", skip_corrupt=True, **options)
        found = list(_examine(dataset, name, workers, progress))
        template = str(layout.splits[name].get("caption_template", ""))
        splits[name] = _report(dataset, found, ruler, name, progress, template)
        problems += [health for health in found if health.problem]
        for health in found:
            homes.setdefault(health.digest, set()).add(name)
        good = [i for i, health in enumerate(found) if not health.problem]
        if good and out is not None:
            sheet = out / f"contact_sheet_{name}.png"
            write_sheet(sheet, dataset, _spread(good, SHEET))
            written.append(sheet)
    homes.pop("", None)
    shared = sum(len(where) > 1 for where in homes.values())
    result = Check(Path(path), layout.member, splits, shared, problems, written)
    if out is not None:
        _write(result, out)
    return result


def _write(result: Check, out: Path) -> None:
    problems, written = result.problems, result.files
    if problems:
        lines = (f"{h.problem}\t{h.file}\t{h.reason}\n" for h in problems)
        write_text(out / "problems.txt", "".join(lines))
        written.append(out / "problems.txt")
    else:
        (out / "problems.txt").unlink(missing_ok=True)
    write_json(out / "report.json", _plain(result))
    written.append(out / "report.json")


def _examine(dataset: CaptionedFiles, name: str, workers: int, progress: bool) -> Iterator[Health]:
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(dataset), desc=f"{name}: images", unit="img", disable=not progress) as bar,
    ):
        for health in pool.map(dataset.examine, range(len(dataset))):
            bar.update()
            yield health


def _report(
    dataset: CaptionedFiles,
    found: list[Health],
    guide: AbstractGuide,
    name: str,
    progress: bool,
    template: str,
) -> SplitReport:
    captions = [dataset.captions_of(i) for i in range(len(dataset))]
    counts = [len(own) for own in captions]
    homes = Counter(caption for own in captions for caption in dict.fromkeys(own))
    usual, times = homes.most_common(1)[0] if homes else ("", 0)
    digests = Counter(health.digest for health in found if health.digest)
    sizes = [(health.width, health.height) for health in found if health.width]
    texts = [text for own in captions for text in own]
    broken, unknown = dataset.broken_texts(), guide.unknown_words(texts)
    is_short = template or not all(counts)
    return SplitReport(
        images=len(dataset),
        captions=sum(counts),
        fewest_captions=min(counts),
        most_captions=max(counts),
        without_caption=counts.count(0),
        lengths=_lengths(texts, guide, name, progress),
        repeated_captions=sum(count > 1 for count in homes.values()),
        most_repeated=(usual, times),
        repeated_images=sum(count - 1 for count in digests.values()),
        median_size=(_median([w for w, _ in sizes]), _median([h for _, h in sizes])),
        smallest_side=min((min(size) for size in sizes), default=0),
        problems=dict(Counter(health.problem for health in found if health.problem)),
        has_questions="questions" in dataset.extra_of(0),
        template=template,
        broken_captions=len(broken),
        first_broken=broken[0] if broken else ("", ""),
        unread=tuple(map(str, dataset.unread_files())) if is_short else (),
        words=unknown.words if unknown else 0,
        unknown_words=unknown.unknown if unknown else 0,
        unknown_examples=unknown.examples if unknown else (),
    )


def _lengths(
    captions: list[str], guide: AbstractGuide, name: str, progress: bool
) -> Lengths | None:
    if not captions:
        return None
    counts, cut, rest = [], 0, iter(captions)
    with tqdm(total=len(captions), desc=f"{name}: captions", disable=not progress) as bar:
        while batch := list(islice(rest, BATCH)):
            tokens = guide.tokenize(batch)
            counts.append(tokens.attention_mask.sum(dim=1))
            cut += tokens.cut
            bar.update(len(batch))
    numbers = torch.cat(counts).sort().values
    return Lengths(
        median=int(numbers[len(numbers) // 2]),
        most=int(numbers[min(len(numbers) - 1, int(0.95 * len(numbers)))]),
        longest=int(numbers[-1]),
        cut=cut,
        limit=guide.max_length,
    )


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2] if values else 0


def _spread(indices: list[int], count: int) -> list[int]:
    """Return up to `count` of the indices, evenly spread over them."""
    step = max(1, len(indices) / count)
    return [indices[int(i * step)] for i in range(min(count, len(indices)))]


def _plain(result: Check) -> Mapping[str, Any]:
    plain = asdict(result)
    plain["splits"] = {
        name: {**plain["splits"][name], "readable": report.readable, "is_usable": report.is_usable}
        for name, report in result.splits.items()
    }
    plain |= {"path": str(result.path), "files": [str(path) for path in result.files]}
    return {**plain, "is_usable": result.is_usable}


def as_text(result: Check) -> str:
    """Return the report for people."""
    lines = [f"{result.path}: laid out as {result.member}"]
    for name, report in result.splits.items():
        lines += [f"\n{name}", *(f"  {line}" for line in _split_lines(report))]
    if result.shared_images:
        lines.append(f"\n{result.shared_images} image files stand in more than one split")
    if result.problems:
        first = result.problems[0]
        lines.append(f"\n{len(result.problems)} files cannot be used, first: {first.reason}")
        lines += [f"  {health.problem}  {health.file}" for health in result.problems[1:10]]
        lines.append("mend or remove them, or set `skip_corrupt: true` in the config")
    written = [f"wrote {path}" for path in result.files]
    lines += ["", *(written or ["nothing was written; `-o FOLDER` keeps this report and pictures"])]
    bad = [name for name, report in result.splits.items() if not report.is_usable]
    if not result.has_captions:
        lines.append(f"no image has a caption; expected {EXPECTED}")
        bad = list(result.splits)
    return "\n".join([*lines, f"unusable: {', '.join(bad)}" if bad else "usable"])


def _split_lines(report: SplitReport) -> Iterator[str]:
    average = report.captions / report.images
    width, height = report.median_size
    sizes = f"median {width} x {height}, smallest side {report.smallest_side}"
    yield f"images     {report.images:,}, {sizes if report.readable else 'none readable'}"
    yield (
        f"captions   {report.captions:,}, {average:.1f} an image ({report.fewest_captions} to "
        f"{report.most_captions})"
    )
    captioned = report.images - report.without_caption
    yield f"           {captioned:,} of {report.images:,} images have captions"
    if report.template:
        yield f"           made from the names of the images' folders: {report.template!r}"
    if report.has_questions:
        yield "questions  yes"
    if lengths := report.lengths:
        share = lengths.cut / max(1, report.captions)
        yield (
            f"tokens     median {lengths.median}, 95 % up to {lengths.most}, longest "
            f"{lengths.longest}; {lengths.cut:,} captions cut at {lengths.limit} ({share:.2%})"
        )
    if report.unknown_words:
        share, examples = report.unknown_words / report.words, ", ".join(report.unknown_examples)
        yield (
            f"words      {share:.0%} of {report.words:,} are unknown to this guide ({examples}); "
            "micro_clip knows the words of the embedded scenes, open_clip those of photographs"
        )
    if report.repeated_captions:
        text, times = report.most_repeated
        yield (
            f"repeated   {report.repeated_captions:,} captions stand with several images, most: "
            f"{text[:60]!r} with {times:,}"
        )
    if report.repeated_images:
        yield f"duplicates {report.repeated_images:,} files have the bytes of another"
    told = [f"{count:,} {kind}" for kind, count in report.problems.items()]
    if report.broken_captions:
        file, caption = report.first_broken
        told.append(
            f"{report.broken_captions:,} captions have bytes of another encoding, now U+FFFD, "
            f"first in {file}: {caption[:60]!r}; set `encoding:`, such as latin-1"
        )
    told += [f"{file} seems to hold captions and is not read" for file in report.unread]
    if report.without_caption == report.images:
        told.append("no image has a caption")
    yield f"problems   {'; '.join(told) or 'none'}"
