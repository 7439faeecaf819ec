"""The structure of the package: one folder per concern, imports in one direction."""

from __future__ import annotations

from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "grpo_fast"
PUBLIC_NAMES = {"tasks.py", "temperature.py"}  # import paths that stay, whose code is elsewhere
MOST_LEVELS = 10


@pytest.fixture(scope="module")
def package_imports() -> dict[str, set[str]]:
    """Which packages of grpo_fast each package imports; imports inside functions count."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("grpo_fast", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        if module.count(".") == 0:
            continue
        importer = module.split(".")[1]
        found.setdefault(importer, set())
        for imported in graph.find_modules_directly_imported_by(module):
            if imported.count(".") and imported.split(".")[1] != importer:
                found[importer].add(imported.split(".")[1])
    found["loss"].discard("integrations")  # LossConfig.like
    return found


def test_the_packages_stand_on_few_levels_and_import_in_one_direction(package_imports: dict[str, set[str]]) -> None:
    levels: dict[str, int] = {}

    def level(package: str, above: tuple[str, ...] = ()) -> int:
        assert package not in above, f"packages import each other in a circle: {' -> '.join([*above, package])}"
        if package not in levels:
            levels[package] = 1 + max((level(lower, (*above, package)) for lower in package_imports[package]), default=0)
        return levels[package]

    highest = max(level(package) for package in package_imports if package not in ("tasks", "temperature", "__main__"))
    assert 5 < highest <= MOST_LEVELS, levels


def test_the_root_of_the_package_holds_public_names_only() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "version.py", *PUBLIC_NAMES}
    for name in PUBLIC_NAMES:
        lines = (PACKAGE / name).read_text().splitlines()
        assert not [line for line in lines if line.startswith(("def ", "class "))], f"{name} defines something: it belongs into a package"


def test_every_package_says_what_it_is_for() -> None:
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py")) and not path.is_symlink()]
    assert len(folders) >= 14
    for folder in folders:
        first = (folder / "__init__.py").read_text().lstrip()
        assert first.startswith('"""') and len(first.splitlines()[0]) > 20, f"{folder.name}/__init__.py has no docstring"


def test_the_triton_kernels_import_nothing_of_the_package() -> None:
    """The linter does not see them: the install maps kernels/fused to grpo_fast.kernels."""
    files = list((PACKAGE.parent / "kernels" / "fused").glob("*.py"))
    assert len(files) > 4
    for path in files:
        assert "import grpo_fast" not in path.read_text() and "from grpo_fast" not in path.read_text(), path
