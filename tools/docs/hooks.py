"""What `mkdocs build` does beyond mkdocs: pages made from the sources, links to files of the repository, and formulas as MathML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api_pages
import error_messages
import formulas
import repository_links
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

# Pages that lie outside of docs/, in the repository where readers of the code look for them; the name of each on the site.
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "kernels/README.md": "kernels.md", "CHANGELOG.md": "changelog.md"}


def on_config(config: Any) -> Any:
    """Put the pages that are generated into the navigation."""
    reference = next(group["Reference"] for group in config["nav"] if "Reference" in group)
    position = reference.index({"API": "api/"})
    reference[position] = {"API": [{name: page} for page, name in api_pages.titles().items()]}
    if (ROOT / "CHANGELOG.md").exists():
        reference.append({"Changelog": "changelog.md"})
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are generated, and the pages, figures and sources outside of docs/ that pages link to."""
    made = {name: (ROOT / path).read_text() for path, name in ELSEWHERE.items() if (ROOT / path).exists()}
    made |= api_pages.pages(ROOT) | {"troubleshooting.md": error_messages.page(ROOT / "grpo_fast")}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    written = {file.src_uri: ROOT / "docs" / file.src_uri for file in files if file.src_uri not in made and file.is_documentation_page()}
    texts = {name: path.read_text() for name, path in written.items()} | {name: made[name] for name in ELSEWHERE.values() if name in made}
    for file in repository_links.linked_files(ROOT, texts, ELSEWHERE):
        files.append(file.for_site(config))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    return repository_links.rewrite(markdown, page.file.src_uri, ROOT, ELSEWHERE)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    return formulas.as_mathml(html)
