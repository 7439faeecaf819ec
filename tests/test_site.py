"""The sources of the documentation site: generated pages, links and formulas. tests/test_site_browser.py opens the built site."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import grpo_fast as gf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "docs"))


def test_the_api_has_every_public_name() -> None:
    import api_pages

    pages = api_pages.pages(ROOT)
    assert [name for name in gf.__all__ if f"::: grpo_fast.{name}\n" not in pages["api/grpo_fast.md"]] == []
    for module in api_pages.MODULES:
        names = api_pages.public_names(ROOT, module)
        assert names == importlib.import_module(module).__all__ if "integrations" not in module else names
        assert all(f"::: {module}.{name}\n" in pages[f"api/{module}.md"] for name in names)
    listed = {f"grpo_fast.{path.stem}" for path in (ROOT / "grpo_fast").glob("*.py") if "__all__" in path.read_text()}
    listed |= {f"grpo_fast.{path.parent.name}" for path in (ROOT / "grpo_fast").glob("*/__init__.py") if "__all__ =" in path.read_text()}
    assert sorted(listed - {"grpo_fast.__init__"} - set(api_pages.MODULES)) == [], "a public module without a page"


def test_troubleshooting_has_every_message_with_a_fix() -> None:
    import error_messages

    page = error_messages.page(ROOT / "grpo_fast")
    assert page.count('class="message"') > 200
    found = error_messages.messages(ROOT / "grpo_fast")
    assert any(m.error == "ValueError" and m.problem.startswith("prompts[…] is empty") and "bos token" in m.fix for m in found)
    assert not [m for m in found if not m.fix or not m.problem or "Fix:" in m.problem]
    headings = re.findall(r"^## (.*)$", page, re.M)
    assert headings[:2] == ["Loss", "Fused head"] and not set(headings) & set(error_messages._TOPICS), "each folder has a heading"
    without = {path.name for path in (ROOT / "grpo_fast").rglob("*.py") if "Fix: " in path.read_text()}
    assert len({m.module for m in found}) >= 0.8 * len(without)


def test_a_message_is_read_whole() -> None:
    import error_messages

    raised = 'def f(x):\n    "Fix: no message"\n    raise ValueError(f"x is {x!r}; " "expected 1. " + f"Fix: {x + 1}, or leave it out.")\n'
    ((text, error),) = [each for each in error_messages._texts(ast.parse(raised)) if "Fix: " in each[0]]
    assert (text, error) == ("x is …; expected 1. Fix: …, or leave it out.", "ValueError")


def test_the_help_of_the_commands_is_that_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of each subcommand; how wide a table is drawn depends on the versions of typer and rich."""
    pytest.importorskip("transformers")
    import command_line

    monkeypatch.setattr(command_line.os, "environ", dict(command_line.os.environ))

    def options(text: str) -> dict[str, list[str]]:
        sections = re.split(r"^## ", text, flags=re.M)[1:]
        return {section.split("\n")[0]: sorted(set(re.findall(r"--[\w-]+", section))) for section in sections}

    assert options(command_line.text()) == options(command_line.PAGE.read_text()), "Fix: python tools/docs/command_line.py"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("plain.md#without-logits", "plain.md#without-logits"),
        ("https://example.org/../x", "https://example.org/../x"),
        ("#here", "#here"),
        ("../README.md#results", "index.md"),
        ("../kernels/README.md", "kernels.md"),
        ("../bench/results/cpu.png", "source/bench/results/cpu.png"),
        ("../grpo_fast/loss/reference.py", "source/grpo_fast/loss/reference.py.md"),
    ],
)
def test_links_into_the_repository_stay_on_the_site(target: str, expected: str) -> None:
    import repository_links

    elsewhere = {"kernels/README.md": "kernels.md"}
    assert repository_links.rewrite(f"see ![a figure]({target}).", "page.md", ROOT, elsewhere) == f"see ![a figure]({expected})."
    assert repository_links.rewrite("[`examples/`](../examples)", "page.md", ROOT, elsewhere) == "`examples/`"
    linked = repository_links.linked_files(ROOT, {"page.md": f"[x]({target})"}, elsewhere)
    assert [each.uri for each in linked] == ([expected] if expected.startswith("source/") else [])


def test_the_checker_finds_broken_links_and_foreign_scripts(tmp_path: Path) -> None:
    import check_site

    (tmp_path / "a.html").write_text('<h2 id="one">x</h2><a href="b.html#two">ok</a><a href="#one">ok</a><a href="https://x.org">ok</a>')
    (tmp_path / "b.html").write_text(
        '<h2 id="two">x</h2><a href="a.html#none">bad</a><a href="c.html">bad</a><script src="https://x.org/s.js"></script>'
    )
    assert check_site.problems(tmp_path) == [
        "b.html: a.html#none: there is no such anchor",
        "b.html: c.html: there is no such file",
        "b.html: https://x.org/s.js: is loaded from another host",
    ]


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: make docs")
    import formulas

    page = formulas.as_mathml(
        '<p>a <span class="arithmatex">\\(x_1 &lt; 2\\)</span></p><div class="arithmatex">\\[\n\\frac{a}{b}\n\\]</div>'
    )
    assert page.count("<math") == 2 and "arithmatex" not in page and "<mfrac>" in page and "&#x0003C;" in page


def test_every_page_is_in_the_navigation() -> None:
    import yaml

    listed: list[Any] = [yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]]
    named = set()
    while listed:
        entry = listed.pop()
        listed += entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else []
        named |= {entry} if isinstance(entry, str) else set()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
