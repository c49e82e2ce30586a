"""Every path and link that the README and the pages of docs/ name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = re.compile(r"(?<![\w/.-])(?:qmix|calibration|tests|benchmarks)/[\w/]+\.py\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(page: Path, text: str) -> list[str]:
    """Return the sources and link targets in a page's text that do not exist."""
    sources = [path for path in SOURCE.findall(text) if not (ROOT / path).is_file()]
    targets = [(page.parent / path if path else page, path, anchor) for path, anchor in LINK.findall(text)]
    links = [path for target, path, _ in targets if not target.exists()]
    headings = [f"{path}#{name}" for at, path, name in targets if name and at.is_file() and name not in anchors(at)]
    return sources + links + headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_link_exists(page):
    assert missing(page, page.read_text("utf-8")) == []


def test_what_does_not_exist_is_found():
    text = (
        "`qmix/gone.py`, `qmix/errors.py` [a](gone.md) [b](README.md#gone) [c](#try-it) [d](https://example.org/x.md)"
    )
    assert missing(ROOT / "README.md", text) == ["qmix/gone.py", "gone.md", "README.md#gone"]


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    named = {path for path, _ in LINK.findall(index)}
    assert {path.name for path in (ROOT / "docs").iterdir()} - {"index.md"} == named


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("## Rooms")[2].partition("## ")[0], re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in (ROOT / "qmix").glob("*/__init__.py"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
