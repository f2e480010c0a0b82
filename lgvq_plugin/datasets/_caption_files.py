"""Read captions from tables (.jsonl, .csv) and from text files beside the images."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, suggest
from .base import CONVERTED_FROM

FILE_KEYS = ("file_name", "file", "image", "filepath", "path")
CAPTION_KEYS = ("captions", "caption", "text", "title", "name")
KEPT_KEYS = ("image_id", "questions", "objects", "attributes")
TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "captions.csv")
SIDECARS = (".txt", ".caption")
KEYWORD_KEYS = ("keywords", "emojilib")
MAX_KEYWORDS = 12  # a CLIP text tower reads 77 tokens
EXPECTED = (
    f"a table ({', '.join(TABLES)} or another *.csv) whose rows have one of the keys "
    f"{', '.join(FILE_KEYS)} and one of {', '.join(CAPTION_KEYS)}; or x.txt beside each x.jpg"
)


def find_table(root: Path, captions: str | Path | None) -> Path | None:
    """Return the table the user names, else the one that lies in `root`, else None.

    Raises:
        ConfigError: if the named one does not exist, or several unnamed ones could be meant.
    """
    if captions is not None:
        for path in (root / captions, Path(captions)):
            if path.is_file():
                return path
        raise ConfigError(f"captions: {captions} exists neither in {root} nor as a path of its own")
    for name in TABLES:
        if (root / name).is_file():
            return root / name
    others = sorted(root.glob("*.csv"))
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise ConfigError(f"{root} holds several tables ({names}); say which with `captions: NAME`")
    return others[0] if others else None


@dataclass(slots=True)
class Listed:
    """What a table tells of one file."""

    captions: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """What `lgvq data convert` kept: questions, labels, ids, and the file's old name."""


def read_table(path: Path, caption_key: str | None, template: str) -> dict[str, Listed]:
    """Return file name -> what is told of it, in the order of the table; its rows are joined.

    Args:
        path: a .jsonl or .csv file.
        caption_key: the column that holds the captions; None tries the usual names.
        template: text with `{}` into which a `name` is put.

    Raises:
        ConfigError: naming file and line where one cannot be parsed or lacks its keys.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"captions: {path} is none of {', '.join(readers)}")
    found: dict[str, Listed] = {}
    for line, row in readers[path.suffix.lower()](path):
        where = f"{path}:{line}"
        key = next((key for key in FILE_KEYS if row.get(key)), None)
        if key is None or not isinstance(row[key], str):
            raise ConfigError(
                f"{where}: no file name; expected one of {', '.join(FILE_KEYS)}, "
                f"got the keys {', '.join(map(str, row))}"
            )
        own = found.setdefault(row[key], Listed())
        told = _captions(row, caption_key, template, where)
        own.captions += [caption for caption in told if caption not in own.captions]
        if CONVERTED_FROM in row:
            own.extra = {key: row[key] for key in (*KEPT_KEYS, CONVERTED_FROM) if key in row}
    if not found:
        raise ConfigError(f"{path} is empty; expected {EXPECTED}")
    return found


def read_sidecar(image: Path) -> list[str] | None:
    """Return the lines of the .txt or .caption file beside an image, or None if there is none."""
    for suffix in SIDECARS:
        try:
            text = image.with_suffix(suffix).read_text("utf-8-sig", errors="replace")
        except FileNotFoundError:
            continue
        return [line for line in map(clean, text.splitlines()) if line]
    return None


def clean(caption: str) -> str:
    """Return the caption on one line, without surplus blanks.

    Example:
        >>> clean("  a dog\\n runs ")
        'a dog runs'
    """
    return " ".join(caption.split())


def _captions(row: Mapping[str, Any], key: str | None, template: str, where: str) -> list[str]:
    if key is not None and key not in row:
        raise ConfigError(f"{where}: no caption_key {key!r}{suggest(key, [str(k) for k in row])}")
    key = key or next((known for known in CAPTION_KEYS if known in row), None)
    if key is None:
        raise ConfigError(
            f"{where}: no caption; expected one of {', '.join(CAPTION_KEYS)}, or name the "
            f"column with `caption_key`; got the keys {', '.join(map(str, row))}"
        )
    given = row[key] if isinstance(row[key], list) else [row[key]]
    if not all(isinstance(text, str | None) for text in given):
        raise ConfigError(f"{where}: {key} must be text or a list of texts, got {row[key]!r:.80}")
    captions = [text for text in (clean(text or "") for text in given) if text]
    if key == "name":
        captions = [template.replace("{}", text) for text in captions]
        captions += _keyword_sentence(row, known=captions)
    return captions


def _keyword_sentence(row: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return ["cat, face and grin"] of a row's keyword lists, or [] if it has none."""
    listed = [word for key in KEYWORD_KEYS for word in row.get(key) or () if isinstance(word, str)]
    tidy = dict.fromkeys(clean(word.replace("_", " ")) for word in listed)
    told = [word for word in tidy if word and word not in known][:MAX_KEYWORDS]
    if not told:
        return []
    return [f"{', '.join(told[:-1])} and {told[-1]}" if told[1:] else told[0]]


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiter = max(",\t;|", key=header.count)
        rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        try:
            for row in rows:
                if None in row:
                    raise ConfigError(
                        f"{path}:{rows.line_num}: more fields than the header has; "
                        "put texts that hold the delimiter in double quotes"
                    )
                yield rows.line_num, row
        except csv.Error as error:
            raise ConfigError(f"{path}:{rows.line_num}: not CSV ({error})") from error
