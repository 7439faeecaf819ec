"""Every code block of the documentation is run by a test, or says why not."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from doc_blocks import PAGES, ROOT, all_blocks

# Page and language: how many blocks there are, and the test that runs them. A new block belongs into that test first, then here.
RUN_BY = {
    ("concepts.md", "python"): (1, "tests/test_docs_guides.py::test_concepts"),
    ("custom-loss.md", "python"): (1, "tests/test_docs.py::test_custom_loss"),
    ("custom-loss.md", "yaml"): (1, "tests/test_docs_guides.py::test_settings_are_taken"),
    ("index.md", "python"): (1, "tests/test_docs_guides.py::test_index"),
    ("kept-sets.md", "python"): (2, "tests/test_docs_guides.py::test_kept_sets"),
    ("liger.md", "python"): (3, "tests/test_docs.py::test_liger"),
    ("lora.md", "python"): (1, "tests/test_docs_guides.py::test_lora"),
    ("moe.md", "yaml"): (1, "tests/test_docs_guides.py::test_settings_are_taken"),
    ("openrlhf.md", "python"): (4, "tests/test_docs.py::test_openrlhf"),
    ("papers.md", "python"): (17, "tests/test_papers.py::test_the_settings_give_the_value_of_the_paper"),
    ("plain.md", "python"): (5, "tests/test_docs.py::test_plain"),
    ("quickstart.md", "python"): (2, "tests/test_docs_guides.py::test_quickstart"),
    ("README.md", "bash"): (3, "tests/test_readme.py::test_every_command_is_run_somewhere"),
    ("README.md", "python"): (4, "tests/test_readme.py::test_every_python_block_is_run"),
    ("results.md", "bash"): (1, "tests/test_readme.py::test_every_command_is_run_somewhere"),
    ("rewards.md", "python"): (1, "tests/test_docs_guides.py::test_rewards"),
    ("samplers.md", "python"): (1, "tests/test_docs_guides.py::test_samplers"),
    ("temperature.md", "bash"): (6, "tests/test_study_docs.py::test_every_command_runs"),
    ("training.md", "bash"): (2, "tests/test_train_cli.py::test_the_settings_and_commands_of_the_page_are_taken"),
    ("training.md", "python"): (1, "tests/test_examples.py::test_code_of_the_page_on_training_runs"),
    ("training.md", "yaml"): (1, "tests/test_train_cli.py::test_the_settings_and_commands_of_the_page_are_taken"),
    ("trl.md", "python"): (3, "tests/test_docs.py::test_trl"),
    ("verl.md", "python"): (2, "tests/test_docs.py::test_verl"),
    ("vllm.md", "yaml"): (1, "tests/test_docs_guides.py::test_settings_are_taken"),
}


def test_every_block_is_run_or_marked() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for page in PAGES:
        for block in all_blocks(page):
            assert block.language, f"{page}: a block without a language; expected one, or `text` for what is not code:\n{block.code}"
            if block.why_not_run is None:
                found[page, block.language] += 1
    known = {block: number for block, (number, _) in RUN_BY.items()}
    assert dict(found) == known, "Fix: run the new block in a test and count it here, or write <!-- not run: why --> above it"


@pytest.mark.parametrize("test", sorted({test for _, test in RUN_BY.values()}))
def test_the_tests_exist_and_read_the_page(test: str) -> None:
    file, _, name = test.partition("::")
    source = (ROOT / file).read_text()
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    for page, language in (block for block, (_, by) in RUN_BY.items() if by == test):
        assert f'"{page}"' in source or f"docs/{page}" in source, f"{file} does not read {page} ({language})"
    assert function.body
