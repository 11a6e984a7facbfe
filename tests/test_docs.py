"""The site: all of the book and of the API is there, its links lead somewhere, and
nothing comes from another host. `make docs` builds it and names its folder.
"""

import importlib
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = Path(os.environ.get("SELFFLOW_SITE", ROOT / "no site")).resolve()
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not path.parent.name.startswith(".")
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "selfflow").rglob("[!_]*.py")
)
built = pytest.mark.skipif(not SITE.is_dir(), reason="no site: `make docs` builds it")


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    LOADS = {"link", "script", "img", "iframe", "source", "video", "audio"}

    def __init__(self, path):
        super().__init__()
        self.anchors = set()
        self.links = set()
        self.loads = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        for target in (values.get("href"), values.get("src")):
            if target and not target.startswith("data:"):
                (self.loads if tag in self.LOADS else self.links).add(target)


page = cache(Page)


def pages():
    pages = sorted(SITE.rglob("*.html"))
    return [path for path in pages if "_static" not in path.parts]  # theme's templates


def test_a_notebook_is_where_the_site_looks_for_chapters():
    for path in NOTEBOOKS:
        place = path.relative_to(ROOT / "nbs").as_posix()
        assert re.fullmatch(
            r"(index|\d\d_\w+|\d_\w+/\d\d_\w+|studies/\w+)\.ipynb", place
        ), f"{place} is in no table of contents (nbs/_site/book.md, notebooks.py)"


def test_the_site_is_built_and_published_by_the_workflow():
    workflow = (ROOT / ".github/workflows/site.yml").read_text()
    assert "run: make docs\n" in workflow
    assert "path: _docs/html\n" in workflow
    target = (ROOT / "Makefile").read_text().split("\ndocs:")[1].split("\n\n")[0]
    assert "-W" in target and "tests/test_docs.py" in target, "warnings are errors"


@built
def test_each_notebook_is_a_page_that_a_table_of_contents_names():
    listed = set()
    for contents in [SITE / "book.html", *SITE.glob("*/index.html")]:
        for target in page(contents).links:
            listed.add((contents.parent / urlsplit(target).path).resolve())
    for path in NOTEBOOKS:
        page_file = SITE / path.relative_to(ROOT / "nbs").with_suffix(".html")
        assert page_file.is_file(), path
        assert path.stem == "index" or page_file.resolve() in listed, path


@built
@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_has_an_entry_in_the_api(module):
    anchors = page(SITE / f"api/{module}.html").anchors
    names = importlib.import_module(module).__all__
    assert not {f"{module}.{name}" for name in names} - anchors


@built
def test_links_lead_to_a_page_and_to_a_place_on_it():
    broken = []
    for path in pages():
        for target in page(path).links | page(path).loads:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)) if parts.path else path
            there = other.exists()
            if there and parts.fragment and other.suffix == ".html":
                there = unquote(parts.fragment) in page(other.resolve()).anchors
            if not there:
                broken.append(f"{path.relative_to(SITE)}: {target}")
    assert not broken


@built
def test_nothing_is_loaded_from_another_host():
    for path in pages():
        for target in page(path).loads:
            assert not urlsplit(target).netloc, f"{path} loads {target}"
    for path in SITE.rglob("*.css"):
        assert not re.search(
            r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text("utf-8")
        ), path
