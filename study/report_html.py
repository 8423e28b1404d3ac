"""report.html: the page of report.md as one file that holds its figures, to hand in or to send by mail."""

import base64
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markdown_it.token import Token

from common.errors import Fault


@dataclass(frozen=True)
class Heading:
    """An entry of the table of contents: `h2` or `h3`, its text, and its anchor in the page."""

    level: str
    text: str
    anchor: str


def html_page(markdown: str, folder: Path) -> str:
    """The HTML of `markdown` with every figure inside; paths of figures are relative to `folder`.

    Links to files beside the page become plain text: the page is read where these files are not. Raises Fault
    naming a figure that cannot be read.
    """
    renderer = MarkdownIt("commonmark").enable("table")
    renderer.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = renderer.parse(markdown)
    headings = _add_anchors(tokens)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", _inside(folder / unquote(str(child.attrGet("src")))))
        token.children = _without_local_links(token.children or [])
    body = renderer.renderer.render(tokens, renderer.options, {})
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    title = next((heading.text for heading in headings if heading.level == "h1"), "Report")
    shown = [heading for heading in headings if heading.level in ("h2", "h3")]
    page: str = environment.get_template("report.html.j2").render(title=title, headings=shown, body=body)
    return page


def _add_anchors(tokens: Sequence[Token]) -> list[Heading]:
    """Give each heading the anchor that GitHub gives it, so that links within the page work in both."""
    headings: list[Heading] = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            same = sum(re.sub(r"-\d+$", "", heading.anchor) == anchor for heading in headings)
            opening.attrSet("id", anchor := f"{anchor}-{same}" if same else anchor)
            headings.append(Heading(opening.tag, text, anchor))
    return headings


def _inside(path: Path) -> str:
    """The file as a data URI."""
    kind, _ = mimetypes.guess_type(path.name)
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}; python -m study.report draws the figures of the page") from None
    return f"data:{kind};base64,{content}"


def _without_local_links(tokens: Sequence[Token]) -> list[Token]:
    kept: list[Token] = []
    within = False
    for token in tokens:
        if token.type == "link_open":
            target: Any = token.attrGet("href")
            within = not re.match(r"https?:|mailto:|#", target)
        if not (within and token.type in ("link_open", "link_close")):
            kept.append(token)
    return kept
