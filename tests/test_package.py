"""The check of the built package, on archives whose contents are known."""

import io
import tarfile
import zipfile

from package_contents import ROOT, SDIST_NEEDS, check, sdist_problems, tracked_files, wheel_problems

PACKAGE = {"ctxlens/__init__.py", "ctxlens/py.typed", "ctxlens/report/page/report.css"}
LICENCE = "ctxlens_interp-0.1.0.dist-info/licenses/LICENSE"


def test_a_complete_wheel_has_no_problems():
    assert wheel_problems([*PACKAGE, LICENCE, "ctxlens/report/"], PACKAGE) == []


def test_what_a_wheel_lacks_or_holds_too_much_is_told():
    names = [*(PACKAGE - {"ctxlens/py.typed"}), "tests/conftest.py", "ctxlens/__pycache__/x.pyc"]
    assert wheel_problems(names, PACKAGE) == [
        "the wheel lacks ctxlens/py.typed",
        "the wheel holds ctxlens/__pycache__/x.pyc, which is not of the package",
        "the wheel holds tests/conftest.py, which is not of the package",
        "the wheel lacks its licence",
    ]


def test_what_an_sdist_lacks_and_what_a_run_left_is_told():
    tracked = SDIST_NEEDS - {"PKG-INFO"} | PACKAGE | {"experiments/x/selection.parquet", ".ci/run"}
    names = {f"ctxlens_interp-0.1.0/{name}" for name in (tracked - {".ci/run"}) | {"PKG-INFO"}}
    assert sdist_problems(names, tracked) == []
    names -= {"ctxlens_interp-0.1.0/LICENSE"}
    names |= {"ctxlens_interp-0.1.0/experiments/x/manifest.json"}
    assert sdist_problems(names, tracked) == [
        "the sdist lacks LICENSE",
        "the sdist holds experiments/x/manifest.json, which version control does not know",
    ]


def test_archives_are_read(tmp_path):
    tracked = SDIST_NEEDS | PACKAGE
    assert check(tmp_path, tracked) == [f"{tmp_path} holds 0 wheels and 0 sdists; expected one of each"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in (*PACKAGE, LICENCE):
            wheel.writestr(name, "")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sdist:
        for name in SDIST_NEEDS | PACKAGE - {"ctxlens/py.typed"}:
            sdist.addfile(tarfile.TarInfo(f"a/{name}"), io.BytesIO())
    assert check(tmp_path, tracked) == ["the sdist lacks ctxlens/py.typed"]


def test_the_package_has_its_types_templates_styles_and_data():
    tracked = tracked_files(ROOT) if (ROOT / ".git").exists() else None
    if tracked is None:
        tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ctxlens").rglob("*")}
    tracked = {name for name in tracked if name.startswith("ctxlens/")}
    assert "ctxlens/py.typed" in tracked
    for ending in (".css", ".js", ".j2", ".jinja", ".yaml", ".txt", ".md", ".safetensors", ".json", ".jsonl"):
        assert any(name.endswith(ending) for name in tracked), ending
