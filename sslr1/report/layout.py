"""HTML pages that are one file each and need no network: template/base.html and what extends it, one stylesheet, and
the scripts that a page names."""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

TEMPLATE = Path(__file__).parent / "template"


def render(name, scripts, **values) -> str:
    """A page of the template folder, in which values are words, never HTML. scripts: those that run on it, without
    their suffix; what they draw is `data` among the values, JSON in the page. No other script runs there, whatever a
    model has written."""
    script = "".join(_text(f"{one}.js") for one in ("page", *scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _templates()
        .get_template(name)
        .render(style=_text("page.css"), script=script, script_hash=digest, **{"data": {}, **values})
    )


def _text(name):
    return (TEMPLATE / name).read_text(encoding="utf-8")


@lru_cache
def _templates():
    import jinja2

    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE), **options)
