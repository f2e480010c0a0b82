"""Building blocks of self-contained pages: one HTML file, no request to anywhere.

page(title, sections, data=...) --> HTML with style, script, images and numbers inside
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever would leave the file."""

escape = html.escape


def page(
    title: str,
    sections: Sequence[tuple[str, str, str]],
    *,
    lead: str = "",
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        sections: (anchor, heading, HTML) of each.
        lead: HTML below the title.
        data: what the scripts read, as JSON; values that are not finite become null.
        scripts: names of files in `page/` after page.js.

    Example:
        >>> text = page("A & B", [("one", "One", "<p>text</p>")])
        >>> "<title>A &amp; B</title>" in text, text.count('href="#one"')
        (True, 1)
    """
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(name)}</h2>{inside}</section>'
        for anchor, name, inside in sections
    )
    script = "\n".join(_asset(name) for name in ("page.js", *scripts))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head><body>"
        f'<header><div class="wide"><h1>{escape(title)}</h1>{lead}</div></header>'
        f'<nav aria-label="Sections"><div class="wide">{links}'
        '<button id="theme" type="button" title="Light or dark">◐<span class="unseen"> '
        f"Light or dark</span></button></div></nav><main>{body}</main>"
        '<dialog id="zoom"><form method="dialog"><button aria-label="Close">×</button></form>'
        '<div class="inside"></div></dialog>'
        f'<script type="application/json" id="data">{to_json(data or {})}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def to_json(value: Any) -> str:
    """Return JSON that may stand inside a script element.

    Example:
        >>> to_json({"a": float("nan"), "b": "</script>"})
        '{"a": null, "b": "\\\\u003c/script>"}'
    """
    return json.dumps(finite(value), ensure_ascii=False).replace("<", "\\u003c")


def finite(value: Any) -> Any:
    """Return `value` with None for every float that is not finite, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def number(value: float | None, *, signed: bool = False, digits: int = 4) -> str:
    """Return a number to read: `digits` significant ones, a true minus sign, no exponent if short.

    Example:
        >>> number(0.123456), number(-1.5, signed=True), number(21.4567), number(None)
        ('0.1235', '−1.500', '21.46', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    sign = "+" if signed and value > 0 else ""
    size = abs(value)
    if value == 0:
        text = "0"
    elif float(value).is_integer() and size < 10**digits and not signed:
        text = str(int(value))
    elif 1e-4 <= size < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{value:.{min(places, 6 if size < 0.01 else digits)}f}"
    else:
        text = f"{value:.{digits - 2}e}"
    return sign + text.replace("-", "−")


def counted(count: int, noun: str) -> str:
    """Return "1 seed", "3 seeds".

    Example:
        >>> counted(1, "seed"), counted(0, "image")
        ('1 seed', '0 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table(
    name: str,
    heads: Sequence[str],
    rows: Iterable[str],
    *,
    caption: str,
    sortable: bool = True,
) -> str:
    """Return a table that scrolls sideways where it does not fit.

    Args:
        name: id of the table.
        heads: HTML of every `<th>...</th>`.
        rows: HTML of every `<tr>...</tr>`; cells sort by their `data-value`, else by text.
        caption: HTML.
        sortable: whether a click on a head sorts.
    """
    return (
        f'<div class="scroll"><table id="{name}"{" class=sortable" if sortable else ""}>'
        f"<caption>{caption}</caption><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def data_uri(content: bytes, kind: str) -> str:
    """Return content as a `data:` URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def download(name: str, text: str, kind: str) -> str:
    """Return a link that saves `text` as the file `name`."""
    uri = data_uri(text.encode(), f"{kind};charset=utf-8")
    return f'<a class="button" download="{escape(name)}" href="{uri}">{escape(name)}</a>'


def png_bytes(image: Tensor) -> bytes:
    """Encode an image, (3, H, W) in [-1, 1] (clamped), or (H, W) or (3, H, W) uint8."""
    import numpy as np
    from PIL import Image

    if image.is_floating_point():
        image = ((image.clamp(-1, 1) + 1) * 127.5).round()
    pixels = np.asarray(image.detach().cpu()).astype(np.uint8)
    pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return file.getvalue()


def write_png(path: Path, image: Tensor) -> None:
    """Write what :func:`png_bytes` encodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image))
