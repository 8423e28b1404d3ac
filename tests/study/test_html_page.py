"""report.html: one file with all figures, looked at with a browser."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from study.html_page import html_page

PAGE = """# A study

## First part

<!-- = a acc -->0.9<!-- --> begins a line.

See the [second part](#second-part), [a file](runs/r/summary.json) and [a paper](https://example.org/paper).

![A curve](fig/a%20curve.png)

## Second part

### Results

| run | {columns} |
| - | {rule} |
<!-- a comment -> end -->
| r<script>alert(1)</script> | {cells} |

### Results

`a-very-long-name-without-a-place-to-break-it-{long}`
"""


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "fig").mkdir()
    Figure(figsize=(12, 2)).savefig(tmp_path / "fig/a curve.png")
    names = [f"score {number}" for number in range(20)]
    text = PAGE.format(
        columns=" | ".join(names), rule=" | ".join(["-:"] * 20), cells=" | ".join(["0.8126"] * 20), long="x" * 200
    )
    return html_page(text, tmp_path)


def test_the_page_holds_its_figures_and_a_table_of_contents(page: str, tmp_path: Path) -> None:
    figure = base64.b64encode((tmp_path / "fig/a curve.png").read_bytes()).decode()
    assert f'<img src="data:image/png;base64,{figure}" alt="A curve"' in page
    assert "<title>A study</title>" in page
    contents = re.findall(r'<a href="#(.*?)">(.*?)</a></li>', page)
    assert [text for _, text in contents] == ["First part", "Second part", "Results", "Results"]
    assert [re.findall(f'<h[23] id="{anchor}">', page) for anchor, _ in contents] == [
        ['<h2 id="first-part">'],
        ['<h2 id="second-part">'],
        ['<h3 id="results">'],
        ['<h3 id="results-1">'],
    ]


def test_only_links_that_work_without_the_files_beside_the_page_remain(page: str) -> None:
    main = page[page.index("<main>") :]
    assert re.findall('href="(.*?)"', main) == ["#second-part", "https://example.org/paper"]
    assert "a file and" in main
    assert "a comment" not in main
    assert "<p>0.9 begins a line.</p>" in main


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("which", ["made up", "the study's"])
def test_a_browser_shows_every_figure_and_needs_no_horizontal_scrolling(
    page: str, tmp_path: Path, width: int, which: str
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    if which == "the study's":
        page = html_page((ROOT / "report.md").read_text(), ROOT)
    script = """<script>addEventListener("load", () => {
        const root = document.documentElement, details = document.querySelector("nav details")
        const folded = !details.open, column = document.querySelector("td").getBoundingClientRect().left
        document.querySelector(".table").scrollLeft = 100
        const fixed = document.querySelector("td").getBoundingClientRect().left === column
        document.querySelector("main img").click()
        const large = document.querySelector("dialog").open
        document.querySelector("dialog").click()
        details.open = true
        document.title = JSON.stringify({
            broken: [...document.querySelectorAll("main img")].filter(image => !image.naturalWidth).length,
            folded: folded, fixed: fixed, large: large && !document.querySelector("dialog").open,
            images: document.images.length, wide: root.scrollWidth - root.clientWidth, width: root.clientWidth,
            dead: [...document.querySelectorAll('a[href^="#"]')].filter(
                link => !document.getElementById(decodeURIComponent(link.hash.slice(1)))).length})
    })</script>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", script + "</body>"))
    # The new headless mode has no window below 500 pixels; a frame of the wanted width has.
    frame = f"""<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe><script>
        const page = () => document.querySelector("iframe").contentDocument
        addEventListener("load", () => setTimeout(() => {{ document.body.dataset.seen = page().title }}, 200))
    </script>"""
    (tmp_path / "frame.html").write_text(f"<body style='margin: 0'>{frame}</body>")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1000",
        "--virtual-time-budget=9000",
    ]
    shown = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    match = re.search('data-seen="(.*?)"', shown)
    assert match, shown
    seen = json.loads(html.unescape(match[1]))
    expected = {"broken": 0, "wide": 0, "width": width, "dead": 0, "folded": width == 400}
    assert seen == {**expected, "fixed": True, "large": True, "images": seen["images"]}
    assert seen["images"] > 0
