"""What a forge runs: workflows, the scripts that they call, pinned tools, and the release. The scripts are called here as functions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FROM_TAGS = {"github/codeql-action/init@v4", "github/codeql-action/analyze@v4"}  # the tag follows the queries


def script(path: str) -> types.ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tools" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(path: Path) -> dict[str, Any]:
    """A YAML file; the key ``on`` reads as true."""
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r'"([A-Za-z0-9_-]+)==([0-9][0-9.]*)', text))


# ---- workflows


def test_workflows_and_issue_forms_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    check = script("ci/check_workflows.py")
    if not (check.find("zizmor") and check.find("check-jsonschema")):
        pytest.skip("zizmor or check-jsonschema is not installed: pip install --group test")
    assert check.main() == 0, capsys.readouterr().out


def test_a_faulty_workflow_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = script("ci/check_workflows.py")
    if not (check.find("zizmor") and check.find("check-jsonschema")):
        pytest.skip("zizmor or check-jsonschema is not installed: pip install --group test")
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    (tmp_path / ".github" / "dependabot.yml").write_text("version: 2\nupdates: []\n")
    step = "echo ${{ github.event.issue.title }}"
    (tmp_path / ".github" / "workflows" / "bad.yml").write_text(
        f"on: issues\npermissions: {{}}\njobs:\n  one:\n    runs-on: x\n    steps: [{{run: '{step}'}}]\n    needed: two\n"
    )
    assert check.main(tmp_path) == 1
    said = capsys.readouterr().out
    assert "needed" in said and "template-injection" in said


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_have_the_least_permissions_a_limit_and_pinned_actions(path: Path) -> None:
    workflow = loaded(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 360 and "permissions" in job, name
        writes = {key for key, value in job["permissions"].items() if value == "write"}
        assert writes <= {"attach": {"contents"}, "publish": {"id-token"}, "newest": {"issues"}, "analyze": {"security-events"}}.get(
            name, {"contents"} if path.stem == "benchmark" else set()
        ), name
        for step in job["steps"]:
            action = step.get("uses", "")
            assert not action or action in FROM_TAGS or re.search(r"@[0-9a-f]{40}$", action), action
            assert "{{ secrets." not in json.dumps(step), "trusted publishing and the job's own token need no stored secret"


def test_the_matrix_has_the_oldest_and_the_newest_of_everything() -> None:
    rows = loaded(ROOT / ".github" / "workflows" / "check.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    found = {name: {row[name] for row in rows} for name in rows[0]}
    assert found["python"] == {"3.10", "3.11", "3.12", "3.13"}
    assert {"2.11.0", "2.15.0"} <= found["torch"] and found["transformers"] == {"5.17.0", "5.24.0"}
    assert found["runner"] == {"ubuntu-24.04", "ubuntu-24.04-arm"}
    for runner in found["runner"]:
        for oldest_or_newest in ("2.11.0", "2.15.0"):
            assert any(row["runner"] == runner and row["torch"] == oldest_or_newest for row in rows)


def test_every_script_is_called_and_exists() -> None:
    callers = [*WORKFLOWS, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml", ROOT / "tools" / "release.py"]
    text = "\n".join(path.read_text() for path in [*callers, *(ROOT / "tools" / "ci").glob("*.sh")])
    for name in re.findall(r"tools/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / name).is_file(), f"{name} is called and does not exist"
    for path in (ROOT / "tools" / "ci").glob("*.*"):
        assert path.name in text, f"nothing calls {path.name}"
        assert path.suffix != ".sh" or os.access(path, os.X_OK), f"{path.name} is not executable"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for path in WORKFLOWS for target in re.findall(r"run: make ([a-z-]+)", path.read_text())}
    assert {"check", "sweep"} <= called and called - {"docs"} <= targets


def test_pre_commit_and_workflows_use_the_pinned_tools() -> None:
    pinned = pins((ROOT / "pyproject.toml").read_text())
    hooks = pins((ROOT / ".pre-commit-config.yaml").read_text())
    assert {"ruff", "clang-format", "zizmor", "check-jsonschema"} <= set(hooks)
    assert {name: version for name, version in hooks.items() if name in pinned} == {name: pinned[name] for name in hooks if name in pinned}
    assert f"detect-secrets=={hooks['detect-secrets']}" in (ROOT / ".github" / "workflows" / "check.yml").read_text()


# ---- scripts


def test_the_nightly_report_names_what_changed_and_what_fails(tmp_path: Path) -> None:
    nightly = script("ci/nightly.py")
    assert nightly.changes("vllm", tmp_path)[0].endswith("is missing")
    text = nightly.report("trl", "1.17.0", ["the source of trl.x changed"], "1 failed ``` in it")
    assert "Newest trl: 1.17.0" in text and "- the source of trl.x changed" in text and text.count("```") == 2
    assert "Nothing that is used changed" in nightly.report("trl", "1.17.0", [], "")
    for tests in nightly.TESTS.values():
        assert all((ROOT / test).is_file() for test in tests)
    info = tmp_path / "liger_kernel-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liger_kernel\nVersion: 0.9.0\n")
    assert nightly.version_in(tmp_path, "liger-kernel") == "0.9.0"


@pytest.mark.parametrize(
    ("open_issues", "wanted"), [([], "create"), ([(7, "The newest trl does not work")], "comment"), ([(7, "x")], "create")]
)
def test_a_failure_opens_one_issue_and_comments_on_it_later(
    open_issues: list[tuple[int, str]], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, calls = script("ci/report_failure.py"), []

    def gh(*arguments: str, body: str | None = None) -> str:
        calls.append((arguments, body))
        return json.dumps([{"number": number, "title": title} for number, title in open_issues])

    monkeypatch.setattr(reporter, "gh", gh)
    monkeypatch.setenv("RUN_URL", "https://forge.invalid/run/1")
    (tmp_path / "report.md").write_text("clip_coef_fn is missing")
    reporter.main("trl", str(tmp_path / "report.md"))
    (arguments, body) = calls[-1]
    assert arguments[1] == wanted and ("7" in arguments) == (wanted == "comment")
    assert body is not None and "clip_coef_fn is missing" in body and "forge.invalid/run/1" in body


def test_the_history_has_a_line_per_commit_and_shows_the_newest_first(tmp_path: Path) -> None:
    history = script("ci/benchmark_history.py")
    case = {"name": "loss", "stats": {"median": 1.5e-3}}
    result = {"datetime": "2026-12-01T10:00:00.123", "machine_info": {"cpu": {"brand_raw": "Xeon"}}, "benchmarks": [case]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    for commit in ("a" * 40, "b" * 40, "b" * 40):
        history.main(str(tmp_path / "result.json"), commit, str(tmp_path / "history.jsonl"), str(tmp_path / "README.md"))
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["commit"][0] for line in lines] == ["a", "b"] and lines[0]["microseconds"] == {"loss": 1500.0}
    page = (tmp_path / "README.md").read_text()
    assert page.index("b" * 12) < page.index("a" * 12) and "| 1500.0 |" in page and "lower is better" in page


def test_secrets_are_found_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("detect_secrets", reason="detect-secrets is not installed: pre-commit and the workflow bring it")
    secrets, token = script("ci/check_secrets.py"), "ghp_" + "aB3dE5gH7j" * 3 + "k1M2n3"
    (tmp_path / "leak.py").write_text(f"x = 1\ntoken = '{token}'\n")
    (tmp_path / "fine.py").write_text("token = os.environ['TOKEN']\n")
    assert secrets.main([str(tmp_path / "leak.py"), str(tmp_path / "fine.py")]) == 1
    said = capsys.readouterr().out
    assert "leak.py:2: GitHub Token" in said and "fine.py" not in said and token not in said


# ---- releases


def commit(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A committed project with what a release reads."""
    (tmp_path / "grpo_fast").mkdir()
    for name in ("grpo_fast/version.py", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    commit(tmp_path, "init", "-q")
    commit(tmp_path, "add", "-A")
    commit(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path


def test_a_dry_run_shows_tag_and_notes_and_changes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = script("release.py")
    release.main(["--dry-run"], project)
    said = capsys.readouterr().out
    assert f"v{release.version(ROOT)} can be released" in said and "### Added" in said and "## [" not in said
    assert release.git(project, "tag") == "" and not (project / "dist").exists()


def test_a_release_is_tagged_with_its_notes_after_the_checks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, built = script("release.py"), []
    monkeypatch.setattr(release, "build_and_check", lambda root, output, kinds: built.append(kinds))
    for name, value in {"NAME": "x", "EMAIL": "x@x.invalid"}.items():
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", value)
    release.main([], project)
    tag = f"v{release.version(ROOT)}"
    assert built == [["sdist", "pure", "cpu", "cuda"]] and "### Added" in release.git(project, "tag", "-l", "--format=%(contents)", tag)
    with pytest.raises(SystemExit, match=f"the tag {tag} exists"):
        release.main(["--dry-run"], project)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("CITATION.cff", "version: 0", "version: 9", "CITATION.cff has no line 'version: "),
        ("CITATION.cff", "date-released: 2", "date-released: 1", "CITATION.cff has no line 'date-released: "),
        ("CHANGELOG.md", "## [0.2.0]", "## [0.2.9]", "CHANGELOG.md has nothing under"),
        ("grpo_fast/version.py", "__version__ = ", "version = ", "has no line __version__"),
    ],
)
def test_what_is_not_ready_is_refused(project: Path, file: str, old: str, new: str, message: str) -> None:
    release, text = script("release.py"), (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new, 1))
    with pytest.raises(SystemExit, match="the tree has changes" if "version.py" not in file else message):
        release.main(["--dry-run"], project)
    commit(project, "commit", "-aqm", "y")
    with pytest.raises(SystemExit, match=re.escape(message)):
        release.main(["--dry-run"], project)


def test_readme_citation_and_changelog_name_this_version() -> None:
    release = script("release.py")
    number = release.version(ROOT)
    assert f"version = {{{number}}}" in (ROOT / "README.md").read_text()
    assert release.section((ROOT / "CHANGELOG.md").read_text(), number)[1].count("\n- ") > 5
    assert f"version: {number}\n" in (ROOT / "CITATION.cff").read_text()


def test_only_tracked_files_get_into_a_release(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (project / "forgotten.py").write_text("")
    target = tmp_path_factory.mktemp("tree")
    script("ci/wheels.py").tracked_files(project, target)
    assert sorted(path.name for path in target.rglob("*.*")) == ["CHANGELOG.md", "CITATION.cff", "version.py"]


def test_a_wrong_kind_of_artifact_is_named() -> None:
    run = subprocess.run([sys.executable, "tools/ci/wheels.py", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "expected some of sdist, pure, cpu, cuda" in run.stderr
