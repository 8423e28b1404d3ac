"""report.html: a page of Markdown as one file that holds its figures, to hand in or to send by mail."""

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from common.files import read_text

TEMPLATE = Path(__file__).with_name("page.html")


def html_page(markdown: str, folder: Path) -> str:
    """The HTML of `markdown` with every figure inside; paths of figures are relative to `folder`.

    Comments are left out, and other HTML in the page is shown as it is written. Links to files beside the page
    become plain text: the page is read where these files are not. Raises OSError where a figure cannot be read.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    # A comment alone on its line leaves no empty line, which would end a table or a list.
    tokens = renderer.parse(re.sub(r"(?ms)^<!--((?!-->).)*-->\n|<!--.*?-->", "", markdown))
    headings = _add_anchors(tokens)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image" and not re.match("https?:", str(child.attrGet("src"))):
                path = folder / unquote(str(child.attrGet("src")))
                kind, _ = mimetypes.guess_type(path.name)
                child.attrSet("src", f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
        token.children = _without_local_links(token.children or [])
    contents = [
        f'<li class="{tag}"><a href="#{anchor}">{html.escape(text)}</a></li>'
        for tag, text, anchor in headings
        if tag in ("h2", "h3")
    ]
    title = next((text for tag, text, _ in headings if tag == "h1"), "Report")
    return Template(read_text(TEMPLATE)).substitute(
        title=html.escape(title),
        contents="\n".join(contents),
        body=renderer.renderer.render(tokens, renderer.options, {}),
    )


def _add_anchors(tokens: Sequence[Token]) -> list[tuple[str, str, str]]:
    """Give each heading the anchor that GitHub gives it; the tag, text and anchor of each."""
    headings: list[tuple[str, str, str]] = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            same = sum(re.sub(r"-\d+$", "", other) == anchor for *_, other in headings)
            opening.attrSet("id", anchor := f"{anchor}-{same}" if same else anchor)
            headings.append((opening.tag, text, anchor))
    return headings


def _without_local_links(tokens: Sequence[Token]) -> list[Token]:
    kept: list[Token] = []
    within = False
    for token in tokens:
        if token.type == "link_open":
            within = not re.match(r"https?:|mailto:|#", str(token.attrGet("href")))
        if not (within and token.type in ("link_open", "link_close")):
            kept.append(token)
    return kept
