"""Links of the pages to files of the repository that are outside of docs/, as links within the site.

On a forge such a link shows the file. On the site it leads to the page that has the file's text (the README's is the home page), to a copy
of a figure or a result file, or to a page that shows a source file. A link to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mkdocs.structure.files import File

__all__ = ["LinkedFile", "linked_files", "rewrite"]

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_COPIED = {".png", ".json", ".csv"}  # a browser shows these itself
_LANGUAGES = {".py": "python", ".sh": "bash", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".yaml": "yaml", ".toml": "toml"}


class LinkedFile(NamedTuple):
    """A file of the repository that a page links to."""

    root: Path
    path: str  # in the repository

    @property
    def uri(self) -> str:
        """Where it is on the site."""
        return f"source/{self.path}" + ("" if Path(self.path).suffix in _COPIED else ".md")

    def for_site(self, config: Any) -> File:
        """The file as mkdocs takes it, outside of the navigation."""
        from mkdocs.structure.files import File, InclusionLevel

        source = self.root / self.path
        if source.suffix in _COPIED:
            return File.generated(config, self.uri, abs_src_path=str(source), inclusion=InclusionLevel.NOT_IN_NAV)
        text = source.read_text()
        if source.suffix != ".md":
            text = f"````{_LANGUAGES.get(source.suffix, 'text')}\n{text}````\n"
        front = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
        return File.generated(config, self.uri, content=f"{front}# {self.path}\n\n{text}", inclusion=InclusionLevel.NOT_IN_NAV)


def linked_files(root: Path, pages: Mapping[str, str], elsewhere: Mapping[str, str]) -> list[LinkedFile]:
    """The files of the repository to which these pages (name on the site: text) link, without those that are pages of the site."""
    paths = {_path(found["target"], page, elsewhere) for page, text in pages.items() for found in _LINK.finditer(text)}
    return [LinkedFile(root, path) for path in sorted(paths - {""}) if not _is_page(path, elsewhere) and (root / path).is_file()]


def rewrite(markdown: str, page: str, root: Path, elsewhere: Mapping[str, str]) -> str:
    """The text of a page with its links into the repository changed to links within the site."""

    def changed(found: re.Match[str]) -> str:
        path = _path(found["target"], page, elsewhere)
        if not path:
            return found[0]
        anchor = "#" + found["target"].partition("#")[2] if "#" in found["target"] else ""
        if path == "README.md":
            target, anchor = "index.md", ""
        elif _is_page(path, elsewhere):
            target = elsewhere.get(path) or path.removeprefix("docs/")
        elif (root / path).is_file():
            target = LinkedFile(root, path).uri
        elif (root / path).is_dir():
            return found["text"]
        else:
            return found[0]  # mkdocs reports it
        target = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{found['image']}[{found['text']}]({target}{anchor})"

    return _LINK.sub(changed, markdown)


def _is_page(path: str, elsewhere: Mapping[str, str]) -> bool:
    return path == "README.md" or path in elsewhere or path.startswith("docs/")


def _path(target: str, page: str, elsewhere: Mapping[str, str]) -> str:
    """The path in the repository that a link means; empty for an address, an anchor, and a page that is in docs/ as the linking page is."""
    names = {name: path for path, name in elsewhere.items()}
    if "://" in target or target.startswith(("#", "mailto:")):
        return ""
    if page.startswith("source/"):
        origin = page.removeprefix("source/").removesuffix(".md")
    else:
        origin = names.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))
    return "" if (origin.startswith("docs/") and path.startswith("docs/")) or path.startswith("..") else path
