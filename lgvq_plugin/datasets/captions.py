"""Read captions from tables, from Flickr's lists, and from text files beside the images.

.jsonl .csv .tsv .json     rows with a file name and captions; delimiters , tab ; |
.txt .token                such a table, or lines `x.jpg#0<TAB>a dog` (Flickr8k, Flickr30k)
x.txt x.caption            beside x.jpg, one caption per line
"""

import ast
import codecs
import csv
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Literal, TextIO

from ..sockets import ConfigError, suggest
from .images import SUFFIXES
from .splits import CONVERTED_FROM, SPLIT_COLUMNS, SPLIT_LIST, SPLIT_WORDS, first_file, split_of_row

logger = logging.getLogger(__name__)

FILE_KEYS = (
    *("file_name", "filename", "file", "image", "filepath", "path", "image_name"),
    *("image_path", "image_file", "img", "img_path", "image_id"),
)
CAPTION_KEYS = (
    *("captions", "caption", "text", "title", "comment", "sentence", "sentences"),
    *("description", "prompt", "raw", "name"),
)
TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "captions.csv")
EXPECTED = (
    f"a table ({', '.join(TABLES)}, captions.txt or another .csv, .tsv, .jsonl or .json) with the "
    "images' paths (file_name, image, filepath, ...; `file_key` names another column) and captions "
    "(caption, text, title, ...; `caption_key`); lines x.jpg#0<TAB>caption, as "
    "Flickr8k.token.txt; x.txt beside each x.jpg; or tar shards of x.jpg with x.txt or x.json"
)
KEPT_KEYS = ("image_id", "questions", "objects", "attributes", CONVERTED_FROM)
"""What `lgvq data convert` writes beside captions."""
JSON_LINES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (*JSON_LINES, ".csv", ".tsv", ".json", ".txt", ".token")
OTHER_SUFFIXES = (".parquet", ".xlsx", ".xls", ".xml", ".yaml", ".yml", ".pkl", ".pickle", ".mat")
SIDECARS = (".txt", ".caption")
KEYWORD_KEYS = ("keywords", "emojilib")
MAX_KEYWORDS = 12  # a CLIP text tower reads 77 tokens
MAX_TEXTS = 50  # with more .txt files in a folder, only those with a telling name are opened
TELLING = re.compile(r"caption|token|annotation|metadata|description|prompt|sentence", re.I)
_SUFFIX = f"(?:{'|'.join(map(re.escape, SUFFIXES))})"
_LINE = re.compile(rf'"?(.+?{_SUFFIX})"?(?:#\d+)?(\s*[|,;]\s*|\s+)(\S.*)', re.I)
_SCORES = re.compile(rf"\S+{_SUFFIX}#\d+\s", re.I)  # Flickr8k's scores: image, caption of another


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The names of a table's columns, None for the usual ones, and its encoding."""

    file_key: str | None = None
    caption_key: str | None = None
    encoding: str = "utf-8"


USUAL = Columns()


@dataclass(slots=True)
class TableEntry:
    """What a table holds about one file; `extra` are questions, labels, ids and the old name."""

    captions: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    split: str | None = None


def find_table(root: Path, captions: str | Path | None, columns: Columns = USUAL) -> Path | None:
    """Return the table the user names, else the one in `root` or one folder below, else None.

    A named one that does not exist is an error, and so are several that could be meant.
    """
    if captions is not None:
        if found := first_file([root / captions, Path(captions)]):
            return found
        raise ConfigError(f"captions: {captions} exists neither in {root} nor as a path of its own")
    if found := first_file(root / name for name in TABLES):
        return found
    for folders in ([root], _folders(root)):
        tables = tables_in(folders, columns)
        if len(tables) > 1:  # else train.csv alone
            tables = [path for path in tables if not SPLIT_LIST.search(path.name)]
        if len(tables) > 1:
            names = ", ".join(path.relative_to(root).as_posix() for path in tables)
            raise ConfigError(f"{root} has several tables ({names}); name one: `captions: NAME`")
        if tables:
            return tables[0]
    return None


def tables_in(folders: Iterable[Path], columns: Columns = USUAL) -> list[Path]:
    """Return the files directly in these folders that :func:`is_table` accepts."""
    return [path for path in _texts(folders, TABLE_SUFFIXES) if is_table(path, columns)]


def is_table(path: Path, columns: Columns = USUAL) -> bool:
    """Return whether a file has image names and captions, judged by its first rows."""
    if path.suffix.lower() not in TABLE_SUFFIXES or "lemma" in path.name.lower():
        return False
    rows: list[Mapping[str, Any]] = []
    with suppress(ConfigError, RecursionError):
        rows = [row for _, row in islice(_rows(path, columns), 20)]
    return bool(rows) and _has_columns(rows[0], columns)


def read_table(path: Path, columns: Columns = USUAL, template: str = "{}") -> dict[str, TableEntry]:
    """Return file name -> what the table holds about it, in its order; rows of a file are joined.

    A `name` is put into the `{}` of `template`. Raises ConfigError with file and line where a row
    cannot be parsed or lacks its keys.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"captions: {path} is none of {', '.join(TABLE_SUFFIXES)}")
    found: dict[str, TableEntry] = {}
    short: list[str] = []
    is_json = path.suffix.lower() in (*JSON_LINES, ".json")
    for line, row in _rows(path, columns):
        where = f"{path}:{line}"
        if None in row.values() and not is_json:
            short.append(where)
        key = _key(row, columns.file_key, FILE_KEYS)
        name = row[key] if key else None
        if not isinstance(name, str) or not name.strip():
            wanted = columns.file_key or f"one of {', '.join(FILE_KEYS)}"
            wanted += f" (`file_key` names the column), got the keys {', '.join(map(str, row))}"
            raise ConfigError(f"{where}: no file name; expected {wanted}")
        own = found.setdefault(name.strip(), TableEntry())
        captions = _captions(row, columns.caption_key, template, where)
        own.captions += [caption for caption in captions if caption not in own.captions]
        split = split_of_row(row) or own.split
        if own.split not in (None, split):
            both = f"split {own.split!r} and in split {split!r}"
            raise ConfigError(f"{where}: the same image is in {both}")
        own.split = split
        if CONVERTED_FROM in row:
            own.extra = {key: row[key] for key in KEPT_KEYS if key in row}
    if not found:
        raise ConfigError(f"{path} is empty; expected {EXPECTED}")
    if short:
        logger.warning("%s: %d rows have fewer fields than the header", short[0], len(short))
    return found


def read_split_lists(table: Path) -> dict[str, str]:
    """Return image name -> split from lists beside a table, as Flickr_8k.trainImages.txt."""
    found: dict[str, str] = {}
    for path in sorted(table.parent.glob("*.txt")):
        name = SPLIT_LIST.search(path.name)
        if name and path != table:
            names = (PurePath(line).name for line in read_lines(path))
            found |= dict.fromkeys(names, SPLIT_WORDS[name[1].lower()])
    return found


def read_sidecar(image: Path, encoding: str = "utf-8") -> list[str] | None:
    """Return the lines of the .txt or .caption file beside an image, or None if there is none."""
    path = first_file(map(image.with_suffix, SIDECARS))
    return None if path is None else read_lines(path, encoding)


def unread_files(root: Path, names: Iterable[str], read: Sequence[Path]) -> list[Path]:
    """Return the files in `root` and one folder below that seem to hold captions of images.

    These have a telling name, or name one of the images `names`; files in `read` are left out.
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


# Text


def clean(caption: str) -> str:
    """Return the caption on one line, without surplus blanks."""
    return " ".join(caption.split())


def texts_of(value: Any, where: str) -> list[str]:
    """Return the captions in a field: a text, a list of texts, or nothing.

    Anything else, such as a number or an object, is a ConfigError that names `where`.

    Example:
        >>> texts_of([" a dog ", None, ""], "a.json"), texts_of(None, "a.json")
        (['a dog'], [])
    """
    given = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | None) for text in given):
        raise ConfigError(f"{where} must be text or a list of texts, got {value!r:.80}")
    return [text for text in (clean(text or "") for text in given) if text]


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn the system's error about a file that cannot be read into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror or error}") from error


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """Open a text file, else raise ConfigError; UTF-16 is known by its byte order mark."""
    with reading(path):
        with path.open("rb") as file:
            encoding = _encoding(file.read(2), encoding)
        return path.open(encoding=encoding, errors="replace", newline=newline)


def decode(content: bytes, encoding: str = "utf-8") -> str:
    """Return the text of a file's bytes, as :func:`open_text` reads them."""
    return content.decode(_encoding(content, encoding), errors="replace")


def _encoding(start: bytes, encoding: str) -> str:
    if codecs.lookup(encoding).name != "utf-8":
        return encoding
    is_wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_wide else "utf-8-sig"


def read_json(path: Path, encoding: str | None = None) -> Any:
    """Return the contents of a JSON file; with an encoding broken bytes become U+FFFD."""
    with reading(path):
        content = path.read_bytes()
    return parse_json(content if encoding is None else decode(content, encoding), path)


def parse_json(text: str | bytes, where: object) -> Any:
    """Return the value that JSON text spells out; ConfigErrors name `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as JSON ({error}): {text[:60]!r}") from error


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a text file, which must exist, without surplus blanks or empty lines."""
    with open_text(path, encoding) as lines:
        return [line for line in map(clean, lines) if line]


def read_captions(path: Path, encoding: str = "utf-8") -> tuple[str, ...]:
    """Return the captions in a text file, one per line; () if there is no such file."""
    return tuple(read_lines(path, encoding)) if path.is_file() else ()


def caption_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str, str]]:
    """Yield (number, image, caption) of each line that is not empty, see :func:`split_line`."""
    for number, line in _numbered_lines(path, encoding):
        yield number, *split_line(line, f"{path}:{number}")


def _numbered_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with open_text(path, encoding) as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def split_line(line: str, where: str = "line") -> tuple[str, str]:
    """Return the image and the caption of a line; the caption is "" if it has none.

    A field of digits between the two, the number of the caption, is left out; further columns
    behind tabs are a ConfigError.

    Example:
        >>> split_line("a.jpg#0\\tA dog ."), split_line("my dogs/a.jpg")
        (('a.jpg', 'A dog .'), ('my dogs/a.jpg', ''))
        >>> split_line('a.jpg,"a ""red"" dog"'), split_line("a.jpg\\t0\\ta dog")
        (('a.jpg', 'a "red" dog'), ('a.jpg', 'a dog'))
    """
    name, tab, caption = line.strip().partition("\t")
    if tab:
        columns = [text for text in caption.split("\t") if text.strip()]
        while len(columns) > 1 and columns[0].strip().isdigit():
            columns.pop(0)
        if len(columns) > 1:
            raise ConfigError(
                f"{where}: {len(columns) + 1} columns and no header that names them; expected "
                f"x.jpg<TAB>caption, or a first line such as image<TAB>caption, got {line[:60]!r}"
            )
        caption = columns[0] if columns else ""
    elif not name.lower().endswith(SUFFIXES) and (found := _LINE.fullmatch(name)):
        name, separator, caption = found.groups()
        if mark := separator.strip():
            caption = re.sub(rf"^\d+\s*{re.escape(mark)}\s*(?=\D)", "", caption)
    name = re.sub(r"#\d+$", "", name.strip().strip('"'))
    if re.fullmatch(r'"([^"]|"")*"', caption.strip()):
        caption = caption.strip()[1:-1].replace('""', '"')
    return name, clean(caption)


# Rows of tables

Rows = Iterator[tuple[int, Mapping[str, Any]]]


def _rows(path: Path, columns: Columns) -> Rows:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _jsonl_rows(path, columns)
    if suffix == ".json":
        return _json_rows(path, columns)
    if suffix in (".txt", ".token"):
        with open_text(path, columns.encoding) as lines:
            header = [part.strip().strip('"') for part in re.split(r"[,\t;|]", next(lines, ""))]
        if not _has_columns(dict.fromkeys(header, "x"), columns):
            return _line_rows(path, columns)
    return _csv_rows(path, columns)


def _line_rows(path: Path, columns: Columns) -> Rows:
    for number, name, caption in caption_lines(path, columns.encoding):
        if not caption or "." not in name or _SCORES.match(caption):
            got = f"got {name[:30]!r} {caption!r}"
            raise ConfigError(f"{path}:{number}: expected x.jpg<TAB>caption, {got}")
        yield number, {"file": name, "caption": caption}


def _jsonl_rows(path: Path, columns: Columns) -> Rows:
    for number, line in _numbered_lines(path, columns.encoding):
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}")
        yield number, row


def _json_rows(path: Path, columns: Columns) -> Rows:
    """Read a list of rows, {file: captions}, COCO's captions, or Karpathy's dataset_*.json."""
    content = read_json(path, columns.encoding)
    if isinstance(content, dict):
        listed = next((content[k] for k in ("images", "annotations", "data") if k in content), None)
        if isinstance(listed, list):
            notes = content.get("annotations") if "images" in content else None
            content = _joined(listed, notes, path) if isinstance(notes, list) else listed
        elif all(name.lower().endswith(SUFFIXES) for name in content):
            content = [{"file": name, "captions": texts} for name, texts in content.items()]
        else:
            raise ConfigError(f"{path}: expected {{file: captions}}, a list of rows, or images")
    if not isinstance(content, list):
        raise ConfigError(f"{path}: expected a list of rows, got {type(content).__name__}")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number}: expected an object, got {row!r:.60}")
        texts = row.get("sentences")
        if isinstance(texts, list) and texts and isinstance(texts[0], dict):
            row = {**row, "sentences": [one.get("raw") for one in texts if isinstance(one, dict)]}
        yield number, row


def _joined(images: list[Any], notes: list[Any], path: Path) -> list[Any]:
    """Give COCO's images the captions of its annotations."""
    captions: dict[Any, list[Any]] = defaultdict(list)
    for note in notes:
        number = note.get("image_id") if isinstance(note, dict) else None
        if isinstance(number, int | str) and "caption" in note:
            captions[number].append(note["caption"])
    if not captions:
        raise ConfigError(f"{path}: its annotations hold no captions")
    return [
        {**row, "captions": captions.get(row.get("id"), [])} if isinstance(row, dict) else row
        for row in images
    ]


def _csv_rows(path: Path, columns: Columns) -> Rows:
    with open_text(path, columns.encoding, newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiter = max(",\t;|", key=header.count)
        # Flickr30k's results.csv separates by " | " and quotes nothing.
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, quoting=quoting)
        try:
            names = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            captions = _caption_columns(dict.fromkeys(names), columns.caption_key)
            file = _key(dict.fromkeys(names), columns.file_key, FILE_KEYS)
            _refuse_twins(names, [file, *captions], path)
            ends_in_caption = names[-1:] == captions
            for row in rows:
                where = f"{path}:{rows.line_num}"
                surplus = row.pop(None, None)
                if surplus and ends_in_caption:  # an unquoted caption with the delimiter in it
                    row[names[-1]] = f"{delimiter} ".join([row[names[-1]], *surplus])
                elif surplus:
                    hint = "put texts that hold the delimiter in double quotes"
                    raise ConfigError(f"{where}: more fields than the header has; {hint}")
                for text in filter(_has_swallowed, row.values()):
                    raise ConfigError(f"{where}: a double quote is not closed: {text[:60]!r}")
                yield rows.line_num, row
        except csv.Error as error:
            raise ConfigError(f"{path}:{rows.line_num}: not CSV ({error})") from error


def _refuse_twins(names: Sequence[str], read: Sequence[str | None], path: Path) -> None:
    times = Counter(name.lower() for name in names)
    for name in names:
        count = times[name.lower()]
        if count > 1 and (name in read or name.lower() in SPLIT_COLUMNS):
            hint = f"rename the columns, several captions of an image to {name}1, {name}2, ..."
            raise ConfigError(f"{path}:1: the header names {name!r} {count} times; {hint}")


def _has_swallowed(text: Any) -> bool:
    """Return whether a cell holds further rows, after a quote that is not closed."""
    rest = text.partition("\n")[2] if isinstance(text, str) else ""
    return any(f"{suffix}{mark}" in rest for suffix in SUFFIXES for mark in ",\t;|#")


# Cells of rows


def _key(row: Mapping[str, Any], given: str | None, usual: Sequence[str]) -> str | None:
    """Return the row's key that is `given`, or else the first usual one, in any case."""
    if given is not None:
        return given if given in row else None
    known = {str(key).strip().lower(): key for key in reversed([*row])}
    filled = (known[name] for name in usual if name in known and row[known[name]] not in (None, ""))
    return next(filled, None) or next((known[name] for name in usual if name in known), None)


def _has_columns(row: Mapping[str, Any], columns: Columns) -> bool:
    has_file = _key(row, columns.file_key, FILE_KEYS) is not None
    return has_file and bool(_caption_columns(row, columns.caption_key))


def _caption_columns(row: Mapping[str, Any], given: str | None) -> list[str]:
    """Return the keys of a row's captions: caption, or all of caption, caption1, caption_2."""
    first = _key(row, given, CAPTION_KEYS)
    if first is None and given is None:
        first = next((key for key in row if _unnumbered(key) in CAPTION_KEYS), None)
    if first is None:
        return []
    stem = _unnumbered(first)
    return [first, *(k for k in row if k != first and _unnumbered(k) == stem != k.strip().lower())]


@lru_cache(1000)
def _unnumbered(key: str) -> str:
    return re.sub(r"[ _-]?\d+$", "", str(key).strip().lower())


def _captions(row: Mapping[str, Any], given: str | None, template: str, where: str) -> list[str]:
    keys = _caption_columns(row, given)
    if given is not None and not keys:
        raise ConfigError(f"{where}: no caption_key {given!r}{suggest(given, row)}")
    if not keys:
        expected = f"one of {', '.join(CAPTION_KEYS)}, or name the column with `caption_key`"
        got = ", ".join(map(str, row))
        raise ConfigError(f"{where}: no caption; expected {expected}; got the keys {got}")
    captions = [text for key in keys for text in texts_of(_as_list(row[key]), f"{where}: {key}")]
    if keys == ["name"]:
        captions = [template.replace("{}", text) for text in captions]
        captions += _keyword_sentence(row, known=captions)
    return captions


def _as_list(value: Any) -> Any:
    """Return the list that a cell spells out, as in '["a dog", "a hound"]', or else the value."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[\s*(['\"]).*\1\s*,?\s*\]\s*", value, re.S):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return parse(value.strip())
    return value


def _keyword_sentence(row: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return ["cat, face and grin"] of a row's keyword lists, or [] if it has none."""
    lists = [row[key] for key in KEYWORD_KEYS if isinstance(row.get(key), list | tuple)]
    listed = [word for words in lists for word in words if isinstance(word, str)]
    tidy = dict.fromkeys(clean(word.replace("_", " ")) for word in listed)
    words = [word for word in tidy if word and word not in known][:MAX_KEYWORDS]
    *first, last = words or [""]
    return [f"{', '.join(first)} and {last}" if first else last] if words else []


# Files of a folder


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
