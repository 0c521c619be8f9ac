"""The worked changes of CONTRIBUTING.md apply to this tree, and the tests that they bring pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Pages that stand beside the package.
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md"]

HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+\d+(?:,\d+)? @@.*")


def worked_changes() -> dict[str, str]:
    """The diffs of CONTRIBUTING.md by the heading that they stand under."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = {section.split("\n")[0]: re.findall(r"^```diff\n(.*?)^```$", section, re.M | re.S) for section in sections}
    return {heading: diff for heading, diffs in found.items() for diff in diffs}


def apply_diff(diff: str, root: Path) -> list[str]:
    """Apply a unified diff as ``git apply`` does, where each hunk fits in exactly one place; return the new files."""
    created = []
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        old, new, *lines = part.splitlines()
        assert new.startswith("+++ b/"), new
        target = root / new.removeprefix("+++ b/")
        if old == "/dev/null":
            assert not target.exists(), f"{target} is there already"
            assert HUNK.fullmatch(lines[0])
            assert all(line.startswith("+") for line in lines[1:])
            target.write_text("".join(f"{line[1:]}\n" for line in lines[1:]), encoding="utf-8")
            created.append(target.relative_to(root).as_posix())
            continue
        text = target.read_text(encoding="utf-8")
        for hunk in re.split(HUNK, "\n".join(lines))[1:]:
            body = hunk.strip("\n").split("\n")
            before = "".join(f"{line[1:]}\n" for line in body if line[:1] in ("", " ", "-"))
            after = "".join(f"{line[1:]}\n" for line in body if line[:1] in ("", " ", "+"))
            assert text.count(before) == 1, f"{target}: not in exactly one place:\n{before}"
            text = text.replace(before, after)
        target.write_text(text, encoding="utf-8")
    return created


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the changes touch, and of what their tests need."""
    without_caches = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("orthoserde", "tests", "docs/reference"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without_caches)
    for file in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_there_is_a_worked_change_for_each_sort() -> None:
    assert list(worked_changes()) == ["Add a codec", "Add an integration", "Add a file version"]


#: What has to pass beside the test that a change brings: the floors of the house, and all files that are out there.
HELD_TO = {
    "Add a codec": "tests/test_layers.py",
    "Add an integration": "tests/test_layers.py",
    "Add a file version": "tests/golden",
}


@pytest.mark.parametrize("heading", HELD_TO)
def test_a_worked_change_applies_and_its_test_passes(heading: str, copy: Path) -> None:
    (copy / "change.diff").write_text(worked_changes()[heading], encoding="utf-8")
    subprocess.run(["git", "apply", "--check", "change.diff"], cwd=copy, check=True)  # as the page says
    tests = [path for path in apply_diff(worked_changes()[heading], copy) if path.startswith("tests/")]
    assert len(tests) == 1
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, HELD_TO[heading]],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_change_that_does_not_fit_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    diff = "--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n one\n-{}\n+2\n three\n"
    diff += "--- /dev/null\n+++ b/b.txt\n@@ -0,0 +1 @@\n+b\n"
    with pytest.raises(AssertionError, match="not in exactly one place"):
        apply_diff(diff.format("too"), tmp_path)
    assert apply_diff(diff.format("two"), tmp_path) == ["b.txt"]
    assert (tmp_path / "a.txt").read_text() == "one\n2\nthree\n"
    assert (tmp_path / "b.txt").read_text() == "b\n"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_refers_to_is_there(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text)
    named = re.findall(r"`((?:orthoserde|tests|docs)/[\w./-]+)`", text)
    assert links
    missing = [name for name in {*links, *named} if not name.startswith("https://") and not (ROOT / name).exists()]
    assert missing == []


def test_the_source_distribution_has_every_page() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (included,) = re.findall(r"^include = (\[.*\])$", text, flags=re.MULTILINE)
    # The README is always in it: it is the description of the project.
    assert {f"/{page}" for page in PAGES} - {"/README.md"} <= set(re.findall(r'"([^"]+)"', included))
