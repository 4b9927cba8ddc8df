"""Check the built site: every link and picture leads somewhere, nothing is fetched from a network, formulas are drawn.

mkdocs build --strict -f docs/mkdocs.yml && python docs/check_site.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parents[1] / "site"
# the elements by which a browser fetches something without being asked
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The targets of links, what is fetched, the anchors, and text that was meant to be a formula."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.formulas, self.raw = 0, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element refers to."""
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.formulas += tag == "math"
        self.raw += "arithmatex" in found.get("class", "")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        # where the page is published, not something that is fetched
        if tag in FETCHED and FETCHED[tag] in found and found.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(found[FETCHED[tag]])


def faults(site: Path) -> Iterator[str]:
    """What is wrong, one sentence for each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        name = path.relative_to(site)
        for target in page.fetched:
            if urlsplit(target).scheme not in ("", "data"):
                yield f"{name} fetches {target}"
        if page.raw:
            yield f"{name}: {page.raw} formulas are not drawn"
        for target in [*page.links, *page.fetched]:
            url = urlsplit(target)
            if url.scheme or name.name == "404.html":
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists():
                yield f"{name}: no {target}"
            elif url.fragment and there in pages and unquote(url.fragment) not in pages[there].anchors:
                yield f"{name}: no anchor {target}"
    if not any(page.formulas for page in pages.values()):
        yield "there are no formulas"


if __name__ == "__main__":
    found = list(faults(SITE))
    print("\n".join(found) or f"{SITE}: no faults")
    sys.exit(bool(found))
