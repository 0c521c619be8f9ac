"""The site of the pages: what sphinx-build has made of them in build/site, just before, in ``nox -s docs``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import orthoserde

pytestmark = pytest.mark.site

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "site"

#: Elements that a browser fetches without being asked, and the attribute that says from where.
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
    "embed": "src",
    "object": "data",
}
FETCHED_LINKS = {"stylesheet", "preload", "prefetch", "modulepreload", "icon", "preconnect", "dns-prefetch", "manifest"}

ELSEWHERE = re.compile(r"(?:[a-z]+:)?//", flags=re.IGNORECASE)


class Page(HTMLParser):
    """What a page has a browser fetch, and the names that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in FETCHED and values.get(FETCHED[tag]):
            self.fetched.append(values[FETCHED[tag]])
        if tag == "link" and FETCHED_LINKS & set(values.get("rel", "").split()):
            self.fetched.append(values.get("href", ""))
        if "id" in values:
            self.anchors.add(values["id"])


def pages() -> dict[str, Page]:
    found = {path.relative_to(SITE).as_posix(): Page(path.read_text("utf-8")) for path in SITE.rglob("*.html")}
    assert "index.html" in found, "no site in build/site: nox -s docs builds it"
    return found


def test_no_page_fetches_anything_from_elsewhere() -> None:
    fetched = {url for page in pages().values() for url in page.fetched}
    assert "_static/searchtools.js" in {url.partition("?")[0] for url in fetched}
    assert [url for url in fetched if ELSEWHERE.match(url)] == []


def test_no_style_fetches_anything_from_elsewhere() -> None:
    styles = [path.read_text("utf-8") for path in SITE.rglob("*.css")]
    assert any("--pst-color" in style for style in styles)
    for style in styles:
        urls = re.findall(r"url\(\s*[\"']?([^\"')]+)", style) + re.findall(r"@import\s+[\"']([^\"']+)", style)
        assert [url for url in urls if ELSEWHERE.match(url)] == []


def test_every_page_of_the_folder_is_on_the_site() -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert written - set(pages()) == set()


def test_every_public_name_can_be_linked_to() -> None:
    anchors = {anchor for page in pages().values() for anchor in page.anchors}
    assert {f"orthoserde.{name}" for name in orthoserde.__all__ if name != "__version__"} - anchors == set()


def test_the_search_knows_words_and_names() -> None:
    index = (SITE / "searchindex.js").read_text("utf-8")
    assert all(word in index for word in ("hourglass", "IncompatibleModelError", "completion"))


@pytest.mark.parametrize("link", ["no-such-page.md", "index.md#no-such-heading", "no-such-picture.svg"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path)
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.md").write_text(f"# Page\n\n[text]({link})\n", encoding="utf-8")
    options = ["-W", "-q", "-D", "html_css_files=", "-b", "dummy"]
    command = [sys.executable, "-m", "sphinx", *options, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert link.rpartition("#")[2] in done.stderr
