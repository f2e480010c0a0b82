"""`lgvq data check`: what a path holds, what of it cannot be used, and how it looks."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
from tqdm import tqdm

from ..files import remove_parts, replacing, require_writable, write_json, write_text
from ..guides.base import AbstractGuide, UnknownWords, build_guide
from .base import recognize
from .captions import EXPECTED
from .images import Health, examine
from .listed import ListedImages

PICTURES = 24  # on a contact sheet
SIDE = 192  # pixels of a picture
BATCH = 512  # captions per call of the tokenizer


@dataclass(frozen=True)
class Lengths:
    """Lengths of captions in tokens of the guide, start and end included."""

    median: int
    most: int  # 95 % of the captions are no longer than this
    longest: int  # after cutting: no more than `limit`
    cut: int
    limit: int


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split; counts of images unless noted otherwise."""

    images: int
    captions: int  # in total
    fewest_captions: int
    most_captions: int
    without_caption: int
    lengths: Lengths | None
    repeated_captions: int  # different ones that several images share: negatives of L_gsa
    most_repeated: tuple[str, int]
    repeated_images: int  # files with the same bytes as another one
    median_size: tuple[int, int]
    smallest_side: int
    problems: dict[str, int]  # missing, empty, corrupt, bomb -> number of files
    has_questions: bool
    template: str  # captions were made from the names of class folders, by this text
    broken_captions: int  # with U+FFFD in them: their bytes are of another encoding
    first_broken: tuple[str, str]  # file and caption
    unread: tuple[str, ...]  # files that seem to hold captions, sought where these are missing
    unlisted: tuple[str, ...]  # images in the folder that the table does not list
    words: int
    unknown_words: int  # that the guide was not trained on; 0 if its training words are unknown
    unknown_examples: tuple[str, ...]
    readable: int  # images that can be used
    is_usable: bool  # whether a model can be trained or tested on it


@dataclass(frozen=True)
class Check:
    """The result of :func:`check`."""

    path: Path
    member: str
    splits: dict[str, SplitReport]
    shared_images: int  # files whose bytes occur in more than one split
    problems: list[Health]
    files: list[Path]  # what was written

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
        member: the data set to read it as; None tries all.
        split: check only this one.
        guide: the `lgvq.guide` block in whose tokens captions are measured; None: the embedded one.
        workers: threads that read and decode.
        progress: show a bar.
        options: of the data set, such as encoding and caption_key.
    """
    layout = recognize(path, member)
    if out is not None:
        require_writable(out)
        remove_parts(out, inside=False)
    encoder = build_guide(guide or {"use": "micro_clip"})
    reports, problems, written = {}, [], []
    splits_with = defaultdict(set)
    for name in layout.chosen(split):
        dataset = layout.build(name, size=SIDE, crop="none", skip_corrupt=True, **options)
        with ThreadPoolExecutor(workers) as pool:
            jobs = pool.map(lambda record: examine(record.file, record.path), dataset.records)
            shown = tqdm(jobs, f"{name}: images", len(dataset), unit="img", disable=not progress)
            found = list(shown)
        lengths = _lengths(dataset, encoder, name, progress)
        reports[name] = _report(dataset, found, encoder, lengths)
        problems += [health for health in found if health.problem]
        for health in found:
            splits_with[health.digest].add(name)
        good = [i for i, health in enumerate(found) if not health.problem]
        if good and out is not None:
            written.append(out / f"contact_sheet_{name}.png")
            step = max(1, len(good) / PICTURES)
            chosen = (good[int(i * step)] for i in range(min(PICTURES, len(good))))
            _write_sheet(written[-1], [dataset[index] for index in chosen])
    splits_with.pop("", None)
    shared = sum(len(names) > 1 for names in splits_with.values())
    result = Check(Path(path), layout.member, reports, shared, problems, written)
    if out is not None:
        (out / "problems.txt").unlink(missing_ok=True)
        if problems:
            lines = (f"{h.problem}\t{h.file}\t{h.reason}\n" for h in problems)
            write_text(out / "problems.txt", "".join(lines))
            written.append(out / "problems.txt")
        write_json(out / "report.json", {**asdict(result), "is_usable": result.is_usable})
        written.append(out / "report.json")
    return result


def _lengths(
    dataset: ListedImages, guide: AbstractGuide, name: str, progress: bool
) -> Lengths | None:
    captions = [text for record in dataset.records for text in record.captions]
    if not captions:
        return None
    counts, cut = [], 0
    for first in tqdm(range(0, len(captions), BATCH), f"{name}: captions", disable=not progress):
        tokens = guide.tokenize(captions[first : first + BATCH])
        counts += tokens.attention_mask.sum(dim=1).tolist()
        cut += tokens.cut
    counts.sort()
    most = counts[min(len(counts) - 1, int(0.95 * len(counts)))]
    return Lengths(median_high(counts), most, counts[-1], cut, guide.max_length)


def _report(
    dataset: ListedImages, found: list[Health], guide: AbstractGuide, lengths: Lengths | None
) -> SplitReport:
    captions = [record.captions for record in dataset.records]
    counts = [*map(len, captions)]
    times = Counter(caption for own in captions for caption in dict.fromkeys(own))
    digests = Counter(health.digest for health in found if health.digest)
    widths = [health.width for health in found if health.width] or [0]
    heights = [health.height for health in found if health.width] or [0]
    broken, lacks_captions = dataset.broken_texts(), bool(dataset.template) or not all(counts)
    unknown = guide.unknown_words([text for own in captions for text in own])
    unknown = unknown or UnknownWords(words=0, unknown=0, examples=())
    problems = Counter(health.problem for health in found if health.problem)
    readable = len(dataset) - problems.total()
    return SplitReport(
        images=len(dataset),
        captions=sum(counts),
        fewest_captions=min(counts),
        most_captions=max(counts),
        without_caption=counts.count(0),
        lengths=lengths,
        repeated_captions=sum(count > 1 for count in times.values()),
        most_repeated=next(iter(times.most_common(1)), ("", 0)),
        repeated_images=sum(count - 1 for count in digests.values()),
        median_size=(median_high(widths), median_high(heights)),
        smallest_side=min(widths + heights),
        problems=dict(problems),
        has_questions="questions" in dataset.records[0].extra,
        template=dataset.template,
        broken_captions=len(broken),
        first_broken=broken[0] if broken else ("", ""),
        unread=tuple(map(str, dataset.unread_files())) if lacks_captions else (),
        unlisted=tuple(map(str, dataset.unlisted_images())),
        words=unknown.words,
        unknown_words=unknown.unknown,
        unknown_examples=unknown.examples,
        readable=readable,
        is_usable=readable > 0,
    )


def as_text(result: Check) -> str:
    """Return the report as readable text."""
    lines = [f"{result.path}: laid out as {result.member}"]
    for name, report in result.splits.items():
        lines += [f"\n{name}", *(f"  {line}" for line in _split_lines(report))]
    if result.shared_images:
        lines.append(f"\n{result.shared_images} image files occur in more than one split")
    if result.problems:
        first = result.problems[0]
        lines.append(f"\n{len(result.problems)} files cannot be used, first: {first.reason}")
        lines += [f"  {health.problem}  {health.file}" for health in result.problems[1:10]]
        lines.append("fix or remove them, or set `skip_corrupt: true` in the config")
    written = [f"wrote {path}" for path in result.files]
    lines += ["", *(written or ["nothing was written; `-o FOLDER` keeps this report and pictures"])]
    bad = [name for name, report in result.splits.items() if not report.is_usable]
    if not result.has_captions:
        lines.append(f"no image has a caption; expected {EXPECTED}")
        bad = list(result.splits)
    return "\n".join([*lines, f"unusable: {', '.join(bad)}" if bad else "usable"])


def _split_lines(report: SplitReport) -> Iterator[str]:
    width, height = report.median_size
    sizes = f"median {width} x {height}, smallest side {report.smallest_side}"
    yield f"images     {report.images:,}, {sizes if report.readable else 'none readable'}"
    spread = f"{report.fewest_captions} to {report.most_captions}"
    mean = report.captions / report.images
    yield f"captions   {report.captions:,}, {mean:.1f} per image ({spread})"
    captioned = report.images - report.without_caption
    yield f"           {captioned:,} of {report.images:,} images have captions"
    if report.template:
        yield f"           made from the names of the images' folders: {report.template!r}"
    if report.has_questions:
        yield "questions  yes"
    if lengths := report.lengths:
        cut = f"{lengths.cut:,} captions cut at {lengths.limit}"
        yield (
            f"tokens     median {lengths.median}, 95 % up to {lengths.most}, longest "
            f"{lengths.longest}; {cut} ({lengths.cut / max(1, report.captions):.2%})"
        )
    if report.unknown_words:
        share, examples = report.unknown_words / report.words, ", ".join(report.unknown_examples)
        yield (
            f"words      {share:.0%} of {report.words:,} are unknown to this guide ({examples}); "
            "micro_clip knows the words of the embedded scenes, open_clip those of photographs"
        )
    if report.repeated_captions:
        text, times = report.most_repeated
        most = f"most: {text[:60]!r} with {times:,}"
        yield f"repeated   {report.repeated_captions:,} captions describe several images, {most}"
    if report.repeated_images:
        yield f"duplicates {report.repeated_images:,} files have the same bytes as another"
    yield f"problems   {'; '.join(_problems(report)) or 'none'}"


def _problems(report: SplitReport) -> Iterator[str]:
    for kind, count in report.problems.items():
        yield f"{count:,} {kind}"
    if report.broken_captions:
        file, caption = report.first_broken
        yield (
            f"{report.broken_captions:,} captions have bytes of another encoding, now U+FFFD, "
            f"first in {file}: {caption[:60]!r}; set `encoding:`, such as latin-1"
        )
    for file in report.unread:
        yield f"{file} seems to hold captions and is not read"
    if report.unlisted:
        left_out = "images of the folder are not in the table and left out"
        yield f"{len(report.unlisted):,} {left_out}, first: {report.unlisted[0]}"
    if report.without_caption == report.images:
        yield "no image has a caption"


def _write_sheet(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of pictures as training sees them, captions below."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    margin, line, rows, letters = 8, 13, 5, 31
    wide, high = SIDE + margin, SIDE + 2 * margin + rows * line
    columns = min(6, len(samples))
    shape = columns * wide + margin, -(-len(samples) // columns) * high + margin
    sheet = Image.new("RGB", shape, "#e8e8e8")
    # matplotlib's own font: wide coverage of letters, the same on every machine.
    ttf = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(ttf), 10)
    for place, sample in enumerate(samples):
        left, top = margin + place % columns * wide, margin + place // columns * high
        pixels = ((sample["image"] + 1) * 127.5).round().astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (left, top))
        caption, *more = sample["captions"] or ["(no caption)"]
        caption += f"  (+{len(more)})" if more else ""
        name = sample["file"]
        name = name if len(name) <= letters else f"…{name[1 - letters :]}"
        lines = textwrap.wrap(caption, letters, max_lines=rows - 1, placeholder=" …")
        for row, text in enumerate([name, *lines]):
            color = "black" if row else "#777777"
            pen.text((left, top + SIDE + 2 + row * line), text, fill=color, font=font)
    with replacing(path) as part:
        sheet.save(part, "PNG")
