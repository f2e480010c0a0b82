"""Self-contained HTML pages: style, script, images and numbers in one file, no requests.

Templates are Jinja's, and those of HTML escape every value; a Content-Security-Policy allows only
the page's own script and style sheet.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from torch import Tensor

from ..config import require
from ..sockets import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


def page(
    title: str,
    template: str,
    sections: Mapping[str, str],
    *,
    lead: str = "",
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
    **values: Any,
) -> str:
    """Return a whole page.

    Args:
        title, lead: plain text; the lead is shown below the title.
        template: file in `templates/` that renders the content.
        sections: anchor -> heading, also passed to the template.
        data: JSON data for the scripts; non-finite values become null.
        scripts: files in `templates/` that follow page.js.
        values: variables of the template; everything but a `Markup` is escaped.
    """
    content = fragment(template, sections=sections, **values)
    style, *parts = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", *scripts)
    )
    script = "\n".join(parts)
    digests = [hashlib.sha256(text.encode()).digest() for text in (style, script)]
    hashes = [base64.b64encode(digest).decode() for digest in digests]
    return fragment(
        "base.html",
        title=title,
        lead=lead,
        sections=sections,
        content=Markup(content),
        data=finite(data or {}),
        style=Markup(style),
        script=Markup(script),
        hashes=hashes,
    )


def fragment(template: str, **values: Any) -> str:
    """Return a template alone; in HTML, everything but a `Markup` is escaped."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "counted": counted,
        "line": lambda text: Markup(" ").join(text.split()),  # without line breaks
        "is_finite": math.isfinite,
        "yaml": _as_yaml,
        "escaped": _escaped,
        "pieces": lambda name: re.findall(r"[^/_]*[/_]|[^/_]+", name),  # line breaks in between
        "place": lambda value, reach: f"{120 + 110 * value / (reach or 1):.1f}",  # in a whisker
    }
    return environment


def _as_yaml(value: Any) -> str:
    plain = json.loads(json.dumps(finite(value), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=88)


def _escaped(text: str) -> str:
    r"""Escape Markdown: "a|<b>" -> "a\|&lt;b>"."""
    text = " ".join(text.split())
    return re.sub(r"([|\[\]`])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def finite(value: Any) -> Any:
    """Return `value` with None for every non-finite float, which JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def number(value: float | None, *, signed: bool = False, digits: int = 4) -> str:
    """Format a number with `digits` significant digits and a minus sign, "–" for none.

    Example:
        >>> number(0.123456), number(-1.5, signed=True), number(21.4567), number(None)
        ('0.1235', '−1.500', '21.46', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
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
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def counted(count: int, noun: str) -> str:
    """Return "1 seed", "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def data_uri(content: bytes, kind: str) -> str:
    """Return content as a `data:` URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_bytes(image: Tensor) -> bytes:
    """Encode an image, (3, H, W) float in [-1, 1] (clamped) or uint8."""
    from torchvision.transforms.functional import to_pil_image

    if image.is_floating_point():
        image = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    file = io.BytesIO()
    to_pil_image(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def example_file(root: Path, path: str) -> Path:
    """Return the PNG file of an example.

    Raises:
        ConfigError: if it is outside `root` or not a PNG file.
    """
    from PIL import Image

    file, key = root / path, f"examples: {path!r}"
    is_inside = "\0" not in path and file.resolve().is_relative_to(root.resolve())
    require(is_inside, key, f"a path below {str(root)!r}", path)
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{key}: cannot be read as a PNG file: {error}") from error
    return file
