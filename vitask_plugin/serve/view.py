"""What was judged, as HTML: pictures are part of it, so that no path and no further request is needed to show them."""

import base64
import io
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

from jinja2 import Environment, Template
from markupsafe import escape
from PIL import Image

from vitask_plugin.serve.judging import TSM_ALONE, WITH, WITHOUT, Judged, Opinion

# Of each opinion its line in words and its column in the table.
TITLES = {WITHOUT: "Model", WITH: "Model with the TSM's exemplar (EP)", TSM_ALONE: "TSM by itself"}
COLUMNS = {WITHOUT: "model", WITH: "with EP", TSM_ALONE: "TSM"}
EMPTY = '<p class="vitask-empty">What the model says of your image will be here.</p>'


def head_html(title: str, summary: str) -> str:
    """What stands above everything."""
    return f"<h1>{escape(title)}</h1><p>{escape(summary)}</p>"


def result_html(judged: Judged) -> str:
    """The part of the page about one image."""
    classes = _ordered(judged.opinions)
    return _template().render(judged=judged, classes=classes, titles=TITLES, columns=COLUMNS)


def _ordered(opinions: Mapping[str, Opinion]) -> list[str]:
    """Classes, the likeliest of the model's last opinion first."""
    opinion = opinions.get(WITH, opinions.get(WITHOUT))
    likely = opinion.probabilities if opinion else {}
    return sorted(likely, key=likely.__getitem__, reverse=True)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["url"] = _url
    text = resources.files(__package__).joinpath("result.html").read_text(encoding="utf-8")
    return environment.from_string(text)


def _url(picture: Image.Image, side: int) -> str:
    """A data address of the picture, scaled down to `side` pixels if it is larger."""
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
