"""The automatic checks: required data, the citation file, the make targets, and who may name what."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CITATION_KEYS = {"cff-version", "message", "type", "title", "authors", "version", "license"}
PAPER_KEYS = {"type", "title", "authors", "year"}

ONE_TEST = "def test_it({fixture}):\n    assert {fixture}.is_dir()\n"
REQUIREMENTS = {
    "test_data": ("CTXLENS_TEST_DATA", "CTXLENS_REQUIRE_DATA"),
    "test_models": ("CTXLENS_TEST_MODELS", "CTXLENS_REQUIRE_MODELS"),
}


def run_one_test(folder: Path, fixture: str, **environment: str) -> str:
    """The summary of a run of one test that asks for a fixture of `tests/conftest.py`."""
    (folder / "test_one.py").write_text(ONE_TEST.format(fixture=fixture))
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("CTXLENS_", "PYTEST_", "COV_"))
    }
    paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "test_one.py",
    ]
    result = subprocess.run(
        command, cwd=folder, env=kept | {"PYTHONPATH": paths} | environment, capture_output=True, text=True
    )
    return result.stdout


@pytest.mark.parametrize("fixture", REQUIREMENTS)
def test_missing_data_is_skipped_unless_it_is_required(tmp_path, fixture):
    variable, requirement = REQUIREMENTS[fixture]
    assert "1 skipped" in run_one_test(tmp_path, fixture)
    assert "1 passed" in run_one_test(tmp_path, fixture, **{variable: str(tmp_path), requirement: "1"})
    required = run_one_test(tmp_path, fixture, **{variable: "nowhere", requirement: "1"})
    assert "1 error" in required
    assert "skipped" not in required
    assert f"{variable}=nowhere is not a folder" in required


def citation_problems(text: str) -> list[str]:
    """What a CITATION.cff lacks, one sentence for each problem."""
    citation = yaml.safe_load(text)
    problems = [f"the key {key} is missing" for key in sorted(CITATION_KEYS - set(citation))]
    papers = citation.get("references", [])
    problems += [] if papers else ["there is no reference to the paper"]
    for paper in papers:
        problems += [f"a reference lacks {key}" for key in sorted(PAPER_KEYS - set(paper))]
    for author in [
        *citation.get("authors", []),
        *(one for paper in papers for one in paper.get("authors", [])),
    ]:
        if not {"name"} <= set(author) and not {"family-names"} <= set(author):
            problems.append(f"the author {author} is neither an entity nor a person")
    return problems


def test_the_citation_file_is_complete_and_agrees_with_the_package():
    import ctxlens

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert citation_problems(text) == []
    citation = yaml.safe_load(text)
    assert citation["version"] == ctxlens.__version__
    assert citation["license"] == "Apache-2.0"
    assert any("2411.02688" in str(paper) for paper in citation["references"])


def test_an_incomplete_citation_file_is_found():
    problems = citation_problems("title: x\nauthors: [{alias: y}]\nreferences: [{title: z}]\n")
    assert {"the key license is missing", "a reference lacks year"} <= set(problems)
    assert any("neither an entity nor a person" in problem for problem in problems)


TARGETS = ("install", "test", "slow", "lint", "types", "docs", "demo", "gate")


def make_targets() -> set[str]:
    """The targets that `make help` lists."""
    result = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^  (?:make )?([a-z]+) ", result.stdout, re.MULTILINE))


def test_make_without_a_target_lists_every_target():
    written = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert make_targets() == written
    assert written == {"help", *TARGETS}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"make-{target}")
def test_make_can_run_every_target(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
