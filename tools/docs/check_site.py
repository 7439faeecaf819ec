"""Check the built site without a network: every link and anchor leads somewhere, and nothing is loaded from another host.

    python tools/docs/check_site.py site

mkdocs checks the links between Markdown files only: not those that plugins and the theme make, and not those of generated pages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["Page", "main", "problems"]

_LINKED = {"a": "href", "img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """The anchors of an HTML page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []  # that a browser fetches without a click
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        target = values.get(_LINKED.get(tag, ""))
        if target and "canonical" not in (values.get("rel") or ""):
            (self.links if tag == "a" else self.loaded).append(target)


def problems(site: Path) -> list[str]:
    """What is wrong, one line for each broken link."""
    site = site.resolve()
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    return sorted({found for path in pages if path.name != "404.html" for found in _of_page(site, path, pages)})


def _of_page(site: Path, path: Path, pages: dict[Path, Page]) -> Iterable[str]:
    page = pages[path]
    for target in (*page.links, *page.loaded):
        address = urlsplit(target)
        if address.scheme == "data" or (address.scheme in ("http", "https", "mailto") and target in page.links):
            continue
        where = f"{path.relative_to(site)}: {target}"
        if address.scheme or address.netloc:
            yield f"{where}: is loaded from another host"
            continue
        file = (path.parent / unquote(address.path)).resolve() if address.path else path
        file = file / "index.html" if file.is_dir() else file
        if not file.is_file():
            yield f"{where}: there is no such file"
        elif address.fragment and file in pages and unquote(address.fragment) not in pages[file].anchors:
            yield f"{where}: there is no such anchor"


def main() -> int:
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or "every link of the site leads somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
