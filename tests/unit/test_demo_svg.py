"""The picture in README.md shows what the embedded model generates now."""

import html
import importlib.util
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("make_demo_svg", DOCS / "make_demo_svg.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pieces(svg: str) -> list[str]:
    """The coloured pieces of text, in order; rich's markup around them may change with its version."""
    texts = re.findall(r"<text [^>]*>(.*?)</text>", svg)
    return [piece for text in texts if (piece := html.unescape(text).replace("\xa0", " ").strip())]


def test_the_picture_is_up_to_date() -> None:
    script = load_script()
    committed = (DOCS / "demo.svg").read_text("utf-8")
    assert ElementTree.fromstring(committed).tag.endswith("svg")
    assert len(committed) < 150_000
    assert pieces(committed) == pieces(script.draw(script.MAX_NEW_TOKENS)), "run python docs/make_demo_svg.py"
