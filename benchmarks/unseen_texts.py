"""Extract texts that no choice was made on: nothing in them was used for training, calibration or tuning.

    apt-get download gimp-help-{de,en,es,fr,it} manpages manpages-{de,es,fr,it}     # Debian 12; free licences
    for package in *.deb; do dpkg -x "$package" root; done
    python benchmarks/unseen_texts.py root texts

writes texts/KIND-LANGUAGE.txt, with documents separated by lines of `---`, for `qmix compare --text` and
clip_unseen.py. Kinds are the GIMP manual (help pages, as `tiny` was trained on, but from none of its sources), manual
pages, and the help topics of the Python that runs this script, in English only. Documents are drawn at random, the
same each time.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

import click

LANGUAGES = ("en", "fr", "de", "es", "it")
DOCUMENT = 3000  # characters of a document at most, about a window
SHORTEST = 600
SKIPPED = {"head", "script", "style", "pre"}
ENDS = {"p", "li", "td", "dt", "dd", "h1", "h2", "h3", "h4", "title", "div"}
ROFF_CALL = re.compile(r"^\.(?:SH|SS|B|I|BR|IR|BI|IB|RB|RI|TP|PP|P)\b ?", re.MULTILINE)
ROFF_OTHER = re.compile(r"^['.].*\n", re.MULTILINE)
ROFF_ESCAPES = (
    ("\\-", "-"),
    ("\\(aq", "'"),
    ("\\(bu", "-"),
    ("\\(em", "-"),
    ("\\(lq", '"'),
    ("\\(rq", '"'),
    ("\\e", "\\"),
)
ROFF_MARKUP = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|[&%:/,|^]|s[-+]?\d|\(..|\[\w+\]|\*\(..)")


class _Paragraphs(HTMLParser):
    """The text of an HTML page, a paragraph a line."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self._skipping = "", 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._skipping += tag in SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in SKIPPED
        if tag in ENDS:
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.text += re.sub(r"\s+", " ", data)


def page_text(path: Path) -> str:
    parser = _Paragraphs()
    parser.feed(path.read_text("utf-8", errors="replace"))
    return parser.text


def manual_text(path: Path) -> str:
    """Return a manual page without its roff."""
    source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    text = ROFF_OTHER.sub("", ROFF_CALL.sub("", source))
    for escape, character in ROFF_ESCAPES:
        text = text.replace(escape, character)
    return ROFF_MARKUP.sub("", text)


def tidy(text: str) -> str:
    """At most `DOCUMENT` characters, cut at a line's end, with no line that would part documents."""
    lines = [line.strip() for line in text.splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if not re.fullmatch("-+", line))).strip()
    return text if len(text) <= DOCUMENT else text[:DOCUMENT].rpartition("\n")[0]


def sample(paths: Sequence[Path], read: Callable[[Path], str], characters: int) -> list[str]:
    """Documents drawn from the collection, the same each time, about so many characters in all."""
    found: list[str] = []
    for path in random.Random(0).sample(sorted(paths), len(paths)):
        text = tidy(read(path))
        if len(text) >= SHORTEST:
            found.append(text)
        if sum(map(len, found)) >= characters:
            break
    return found


@click.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--characters", default=60_000, show_default=True, help="of each file, about")
def main(root: Path, out: Path, characters: int) -> None:
    """Write the texts, and say how many characters each has."""
    out.mkdir(parents=True, exist_ok=True)
    share, made = root / "usr/share", {}
    for language in LANGUAGES:
        pages = [*(share / f"gimp/2.0/help/{language}").glob("*.html")]
        manuals = [*(share / "man" / ("" if language == "en" else language)).glob("man[1578]/*.gz")]
        made[f"gimp-{language}"] = sample(pages, page_text, characters)
        made[f"man-{language}"] = sample([path for path in manuals if not path.is_symlink()], manual_text, characters)
    long = [tidy(text) for _, text in sorted(topics.items()) if len(text) >= DOCUMENT]
    made["python-en"] = long[: characters // 2000]
    for name, documents in made.items():
        if not documents:
            raise click.ClickException(f"{name}: no documents below {root}; unpack the packages there")
        (out / f"{name}.txt").write_text("\n---\n".join(documents) + "\n", "utf-8")
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents))} characters")


if __name__ == "__main__":
    main()
