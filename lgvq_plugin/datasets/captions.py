"""Read captions from tables, from Flickr's lists, and from text files beside the images.

.jsonl .csv .tsv .json     rows with a file name and captions; delimiters , tab ; |
.txt .token                such a table, or lines `x.jpg#0<TAB>a dog` (Flickr8k, Flickr30k)
x.txt x.caption            beside x.jpg, one caption a line
"""

import ast
import codecs
import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Literal, TextIO

from ..sockets import ConfigError, suggest
from .base import CAPTION_KEYS, CONVERTED_FROM, EXPECTED, FILE_KEYS, TABLES
from .images import SUFFIXES

logger = logging.getLogger(__name__)

KEPT_KEYS = ("image_id", "questions", "objects", "attributes")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".txt", ".token")
OTHER_SUFFIXES = (".parquet", ".xlsx", ".xls", ".xml", ".yaml", ".yml", ".pkl", ".pickle", ".mat")
SIDECARS = (".txt", ".caption")
KEYWORD_KEYS = ("keywords", "emojilib")
MAX_KEYWORDS = 12  # a CLIP text tower reads 77 tokens
MAX_TEXTS = 50  # .txt files in a folder above which only those with a telling name are opened
TELLING = re.compile(r"caption|token|annotation|metadata|description|prompt|sentence", re.I)
SPLIT_WORDS = {
    **dict.fromkeys(("val", "valid", "dev", "eval", "validation"), "validation"),
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "fold")
"""All but the first only where they hold one of SPLIT_WORDS: `set` may be anything."""
SPLIT_FOLDER = re.compile(r"(.+?)[._-]?(?:images?|imgs?|set|split|\d{4})?", re.I)
"""Of train, train2017, val_images."""
SPLIT_LIST = re.compile(
    r"(?:^|[._-])(train|val|valid|validation|dev|test)(?:[._-]?images)?\.\w+$", re.I
)
SPLIT_NAMES = frozenset(SPLIT_WORDS.values())
_NUMBERED = re.compile(r"#\d+$")
_LINE = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))(?:#\d+)?(?:\s*[|,;]\s*|\s+)(\S.*)", re.I
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """How the columns of a table are named, and its encoding."""

    file_key: str | None = None
    """The column with the images' paths; None tries the usual names."""
    caption_key: str | None = None
    """The column with the captions; None tries the usual names."""
    encoding: str = "utf-8"


@dataclass(slots=True)
class Listed:
    """What a table holds of one file."""

    captions: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """What `lgvq data convert` kept: questions, labels, ids, and the file's old name."""
    split: str | None = None


def find_table(
    root: Path, captions: str | Path | None, columns: Columns | None = None
) -> Path | None:
    """Return the table the user names, else the one in `root` or one folder below, else None.

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
    columns = columns or Columns()
    for folders in ([root], _folders(root)):
        tables = [path for path in _texts(folders, TABLE_SUFFIXES) if is_table(path, columns)]
        found = [path for path in tables if not SPLIT_LIST.search(path.name)]
        found = tables if len(tables) == 1 else found  # train.csv alone
        if len(found) > 1:
            names = ", ".join(path.relative_to(root).as_posix() for path in found)
            raise ConfigError(f"{root} has several tables ({names}); name one: `captions: NAME`")
        if found:
            return found[0]
    return None


def is_table(path: Path, columns: Columns | None = None) -> bool:
    """Return whether a file has image names and captions, judged by its first rows."""
    columns = columns or Columns()
    if path.suffix.lower() not in TABLE_SUFFIXES or "lemma" in path.name.lower():
        return False
    try:
        rows = [row for _, row in islice(_rows(path, columns), 20)]
    except (ConfigError, RecursionError):
        return False
    if not rows or _key(rows[0], columns.file_key, FILE_KEYS) is None:
        return False
    return _key(rows[0], columns.caption_key, CAPTION_KEYS) is not None


def read_table(
    path: Path, columns: Columns | None = None, template: str = "{}"
) -> dict[str, Listed]:
    """Return file name -> what the table holds of it, in its order; rows of a file are joined.

    Args:
        path: of one of `TABLE_SUFFIXES`.
        columns: names of its columns, and its encoding.
        template: text with `{}` into which a `name` is put.

    Raises:
        ConfigError: naming file and line where one cannot be parsed or lacks its keys.
    """
    columns = columns or Columns()
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"captions: {path} is none of {', '.join(TABLE_SUFFIXES)}")
    found: dict[str, Listed] = {}
    short: list[str] = []
    for line, row in _rows(path, columns):
        where = f"{path}:{line}"
        if None in row.values() and path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
            short.append(where)
        key = _key(row, columns.file_key, FILE_KEYS)
        name = row[key] if key else None
        if not isinstance(name, str) or not name.strip():
            wanted = columns.file_key or f"one of {', '.join(FILE_KEYS)}"
            raise ConfigError(
                f"{where}: no file name; expected {wanted} (`file_key` names the column), "
                f"got the keys {', '.join(map(str, row))}"
            )
        own = found.setdefault(name.strip(), Listed())
        told = _captions(row, columns.caption_key, template, where)
        own.captions += [caption for caption in told if caption not in own.captions]
        own.split = _split_of(row, own.split, where)
        if CONVERTED_FROM in row:
            own.extra = {key: row[key] for key in (*KEPT_KEYS, CONVERTED_FROM) if key in row}
    if not found:
        raise ConfigError(f"{path} is empty; expected {EXPECTED}")
    if short:
        logger.warning("%s: %d rows have fewer fields than the header", short[0], len(short))
    return found


def split_name(value: Any) -> str | None:
    """Return the name of a split as a table or list gives it; None if it gives none.

    Karpathy's `restval` belongs to the train split, as is usual.

    Example:
        >>> split_name("Val"), split_name("restval"), split_name("")
        ('validation', 'train', None)
    """
    text = "" if value is None else str(value).strip()
    return SPLIT_WORDS.get(text.lower(), text) or None


def split_of_folders(parts: Sequence[str]) -> str | None:
    """Return the split that the first folder which names one stands for.

    Example:
        >>> split_of_folders(["images", "val2017"]), split_of_folders(["dogs"])
        ('validation', None)
    """
    for part in parts:
        name = SPLIT_FOLDER.fullmatch(part)
        if name and (split := SPLIT_WORDS.get(name[1].lower())):
            return split
    return None


def read_split_lists(table: Path) -> dict[str, str]:
    """Return image name -> split from lists beside a table, as Flickr_8k.trainImages.txt."""
    found: dict[str, str] = {}
    for path in sorted(table.parent.glob("*.txt")):
        name = SPLIT_LIST.search(path.name)
        if name is None or path == table:
            continue
        with open_text(path) as lines:
            found |= {PurePath(line.strip()).name: SPLIT_WORDS[name[1].lower()] for line in lines}
    return found


def read_sidecar(image: Path, encoding: str = "utf-8") -> list[str] | None:
    """Return the lines of the .txt or .caption file beside an image, or None if there is none."""
    for suffix in SIDECARS:
        path = image.with_suffix(suffix)
        if path.is_file():
            with open_text(path, encoding) as lines:
                return [line for line in map(clean, lines) if line]
    return None


def unread_files(root: Path, names: Iterable[str], read: Sequence[Path]) -> list[Path]:
    """Return the files in `root` and one folder below that seem to hold captions of images.

    Args:
        root: the folder of the data set.
        names: of its images.
        read: files that the data set was read from.
    """
    sought = [PurePath(name).name for name in islice(names, 100)]
    found = []
    for path in _texts([root, *_folders(root)], (*TABLE_SUFFIXES, *OTHER_SUFFIXES)):
        if path in read:
            continue
        with path.open("rb") as file:
            start = file.read(2**17).decode("utf-8", errors="replace")
        if TELLING.search(path.stem) or any(name in start for name in sought):
            found.append(path)
    return found


def clean(caption: str) -> str:
    """Return the caption on one line, without surplus blanks.

    Example:
        >>> clean("  a dog\\n runs ")
        'a dog runs'
    """
    return " ".join(caption.split())


def texts_of(value: Any, where: str) -> list[str]:
    """Return the captions that a field holds: a text, a list of texts, or nothing.

    Raises:
        ConfigError: naming `where` if it holds anything else, such as a number or an object.

    Example:
        >>> texts_of([" a dog ", None, ""], "a.json"), texts_of(None, "a.json")
        (['a dog'], [])
    """
    given = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | None) for text in given):
        raise ConfigError(f"{where} must be text or a list of texts, got {value!r:.80}")
    return [text for text in (clean(text or "") for text in given) if text]


def split_line(line: str) -> tuple[str, str]:
    """Return the image and the caption of a line; the caption is "" if it has none.

    Example:
        >>> split_line("a.jpg#0\\tA dog ."), split_line("my dogs/a.jpg")
        (('a.jpg', 'A dog .'), ('my dogs/a.jpg', ''))
    """
    name, tab, caption = line.strip().partition("\t")
    if not tab and not name.lower().endswith(SUFFIXES) and (found := _LINE.fullmatch(name)):
        name, caption = found.groups()
    return _NUMBERED.sub("", name.strip()), clean(caption)


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """Open a text file; UTF-16 is known by its byte order mark, broken bytes become U+FFFD.

    Raises:
        ConfigError: if it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            mark = file.read(2)
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        if is_utf8:
            is_wide = mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if is_wide else "utf-8-sig"
        return path.open(encoding=encoding, errors="replace", newline=newline)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(content: bytes, encoding: str = "utf-8") -> str:
    """Return the text of a file's bytes, as :func:`open_text` reads them."""
    if codecs.lookup(encoding).name == "utf-8":
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "utf-16" if is_wide else "utf-8-sig"
    return content.decode(encoding, errors="replace")


def _folders(root: Path) -> list[Path]:
    """Return the folders in `root` that may hold a table: none that are named after a split."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    plain = sorted(name for name in names if name[0] != "." and name.lower() not in SPLIT_WORDS)
    return [root / name for name in plain] if len(plain) <= 20 else []


def _texts(folders: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes that belong to no single image."""
    found = []
    for folder in folders:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name[0] != "." and e.is_file())
        stems = {Path(name).stem for name in names if name.lower().endswith(SUFFIXES)}
        own = [n for n in names if n.lower().endswith(suffixes) and Path(n).stem not in stems]
        if len(own) > MAX_TEXTS:
            own = [name for name in own if TELLING.search(name)]
        found += [folder / name for name in own]
    return found


def _key(row: Mapping[str, Any], given: str | None, usual: Sequence[str]) -> str | None:
    """Return the row's key that is `given`, or else the first usual one, in any case."""
    if given is not None:
        return given if given in row else None
    known = {str(key).strip().lower(): key for key in reversed([*row])}
    filled = (known[name] for name in usual if name in known and row[known[name]] not in (None, ""))
    return next(filled, None) or next((known[name] for name in usual if name in known), None)


def _captions(row: Mapping[str, Any], key: str | None, template: str, where: str) -> list[str]:
    if key is not None and key not in row:
        raise ConfigError(f"{where}: no caption_key {key!r}{suggest(key, [str(k) for k in row])}")
    key = _key(row, key, CAPTION_KEYS)
    if key is None:
        raise ConfigError(
            f"{where}: no caption; expected one of {', '.join(CAPTION_KEYS)}, or name the "
            f"column with `caption_key`; got the keys {', '.join(map(str, row))}"
        )
    captions = texts_of(_as_list(row[key]), f"{where}: {key}")
    if key == "name":
        captions = [template.replace("{}", text) for text in captions]
        captions += _keyword_sentence(row, known=captions)
    return captions


def _as_list(value: Any) -> Any:
    """Return the list that a cell spells out, as in '["a dog", "a hound"]', or else the value."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[\s*(['\"]).*\1\s*,?\s*\]\s*", value, re.S):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value.strip())
            except (ValueError, SyntaxError):
                continue
    return value


def _split_of(row: Mapping[str, Any], before: str | None, where: str) -> str | None:
    names = {str(key).strip().lower(): key for key in reversed([*row])}
    told = [split_name(row[names[name]]) for name in SPLIT_COLUMNS if name in names]
    own = told[0] if "split" in names else next((s for s in told if s in SPLIT_NAMES), None)
    if before and own and own != before:
        raise ConfigError(f"{where}: the same image is in split {before!r} and in split {own!r}")
    return own or before


def _keyword_sentence(row: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return ["cat, face and grin"] of a row's keyword lists, or [] if it has none."""
    listed = [word for key in KEYWORD_KEYS for word in row.get(key) or () if isinstance(word, str)]
    tidy = dict.fromkeys(clean(word.replace("_", " ")) for word in listed)
    told = [word for word in tidy if word and word not in known][:MAX_KEYWORDS]
    if not told:
        return []
    return [f"{', '.join(told[:-1])} and {told[-1]}" if told[1:] else told[0]]


def _rows(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_rows(path, columns)
    if suffix == ".json":
        return _json_rows(path, columns)
    if suffix in (".txt", ".token"):
        with open_text(path, columns.encoding) as lines:
            header = [part.strip().strip('"') for part in re.split(r"[,\t;|]", next(lines, ""))]
        row = dict.fromkeys(header, "x")
        keys = (columns.file_key, FILE_KEYS), (columns.caption_key, CAPTION_KEYS)
        if not all(_key(row, given, usual) for given, usual in keys):
            return _line_rows(path, columns)
    return _csv_rows(path, columns)


def _line_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(path, columns.encoding) as lines:
        for number, line in enumerate(lines, 1):
            name, caption = split_line(line)
            # Flickr8k's files of human scores pair an image with another one's caption number.
            is_pair = re.match(rf"\S+(?:{'|'.join(map(re.escape, SUFFIXES))})#\d+ ", caption)
            if name and (not caption or is_pair or "." not in name):
                raise ConfigError(f"{path}:{number}: expected x.jpg<TAB>caption, got {line[:60]!r}")
            if name:
                yield number, {"file": name, "caption": caption}


def _jsonl_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(path, columns.encoding) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}")
            yield number, row


def _json_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read a list of rows, {file: captions}, COCO's captions, or Karpathy's dataset_*.json."""
    try:
        with open_text(path, columns.encoding) as file:
            content = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if isinstance(content, dict):
        listed = next((content[k] for k in ("images", "annotations", "data") if k in content), None)
        if not isinstance(listed, list):
            if not all(name.lower().endswith(SUFFIXES) for name in content):
                raise ConfigError(f"{path}: expected {{file: captions}}, a list of rows, or images")
            content = [{"file": name, "captions": texts} for name, texts in content.items()]
        elif isinstance(content.get("annotations"), list) and "images" in content:
            content = _joined(content, path)
        else:
            content = listed
    if not isinstance(content, list):
        raise ConfigError(f"{path}: expected a list of rows, got {type(content).__name__}")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number}: expected an object, got {row!r:.60}")
        told = row.get("sentences")
        if isinstance(told, list) and told and isinstance(told[0], dict):
            row = {**row, "sentences": [one.get("raw") for one in told if isinstance(one, dict)]}
        yield number, row


def _joined(content: Mapping[str, Any], path: Path) -> list[Any]:
    told: dict[Any, list[Any]] = {}
    for note in content["annotations"]:
        number = note.get("image_id") if isinstance(note, dict) else None
        if isinstance(number, int | str) and "caption" in note:
            told.setdefault(number, []).append(note["caption"])
    if not told:
        raise ConfigError(f"{path}: its annotations hold no captions")
    return [
        {**image, "captions": told.get(image.get("id"), [])} if isinstance(image, dict) else image
        for image in content["images"]
    ]


def _csv_rows(path: Path, columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(path, columns.encoding, newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiter = max(",\t;|", key=header.count)
        # Flickr30k's results.csv separates by " | " and quotes nothing.
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, quoting=quoting)
        try:
            names = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            for row in rows:
                surplus = row.pop(None, None)
                if (
                    surplus
                    and names
                    and names[-1] == _key(dict.fromkeys(names), columns.caption_key, CAPTION_KEYS)
                ):  # an unquoted caption with the delimiter in it, in the last column
                    row[names[-1]] = f"{delimiter} ".join([row[names[-1]], *surplus])
                elif surplus:
                    raise ConfigError(
                        f"{path}:{rows.line_num}: more fields than the header has; "
                        "put texts that hold the delimiter in double quotes"
                    )
                _refuse_swallowed(row, f"{path}:{rows.line_num}")
                yield rows.line_num, row
        except csv.Error as error:
            raise ConfigError(f"{path}:{rows.line_num}: not CSV ({error})") from error


def _refuse_swallowed(row: Mapping[str, Any], where: str) -> None:
    for text in row.values():
        rest = text.partition("\n")[2] if isinstance(text, str) else ""
        if rest and any(f"{suffix}{mark}" in rest for suffix in SUFFIXES for mark in ",\t;|#"):
            raise ConfigError(f"{where}: a double quote is not closed: {text[:60]!r}")
