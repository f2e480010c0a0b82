"""Building blocks of self-contained pages: one HTML file, no request to anywhere.

page(title, template, ...) --> HTML with style, script, images and numbers inside

Templates are Jinja's and escape every value; the policy runs no script and no style sheet but ours.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from torch import Tensor


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
        title, lead: plain text, the latter below the title.
        template: file in `page/` that makes the content.
        sections: anchor -> heading of each, also given to the template.
        data: what the scripts read, as JSON; values that are not finite become null.
        scripts: names of files in `page/` after page.js.
        values: of the template's variables; everything but a `Markup` is escaped.

    Example:
        >>> names = ["overview", "codes", "words", "maps", "usage", "settings"]
        >>> sections = dict.fromkeys(names, "")
        >>> text = page("A & B", "explorer.html", sections, panels=[], maps=None, samples=0,
        ...     settings="<b>")
        >>> "<title>A &amp; B</title>" in text, "<pre>&lt;b&gt;</pre>" in text
        (True, True)
    """
    environment = _environment()
    content = environment.get_template(template).render(sections=sections, **values)
    style = _asset("page.css")
    script = "\n".join(_asset(name) for name in ("page.js", *scripts))
    return environment.get_template("base.html").render(
        title=title,
        lead=lead,
        sections=sections,
        content=Markup(content),
        data=finite(data or {}),
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
    )


def policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy under which only these run and nothing leaves the file."""
    sheet, code = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src 'sha256-{code}'; style-src-elem 'sha256-{sheet}'; "
        "style-src-attr 'unsafe-inline'"
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(str(resources.files(__package__) / "templates"))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "counted": counted,
        "is_finite": math.isfinite,
        "pieces": lambda name: re.findall(r"[^/_]*[/_]|[^/_]+", name),  # a line may break between
        "place": lambda value, reach: f"{120 + 110 * value / (reach or 1):.1f}",  # in a whisker
    }
    return environment


def _asset(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


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


def data_uri(content: bytes, kind: str) -> str:
    """Return content as a `data:` URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
