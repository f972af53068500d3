"""Whether a built sdist and wheel hold what they should: `python tests/package_contents.py FOLDER`."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[1]
SDIST_NEEDS = {
    "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "constraints.txt", "mkdocs.yml", "PKG-INFO",
}  # fmt: skip
"""Files that an sdist must hold besides the package, so that it can be built and tested."""
GENERATED = {"PKG-INFO"}
"""Files of an sdist that the build writes."""


def wheel_problems(names: Collection[str], package: Collection[str]) -> list[str]:
    """What is wrong with a wheel.

    Args:
        names: paths in the wheel.
        package: paths that belong to the package, such as `ctxlens/__init__.py`.
    """
    files = {name for name in names if not name.endswith("/")}
    held = {name for name in files if not name.split("/")[0].endswith(".dist-info")}
    problems = [f"the wheel lacks {name}" for name in sorted(set(package) - held)]
    problems += [
        f"the wheel holds {name}, which is not of the package" for name in sorted(held - set(package))
    ]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        problems.append("the wheel lacks its licence")
    return problems


def sdist_problems(names: Collection[str], tracked: Collection[str]) -> list[str]:
    """What is wrong with an sdist.

    Args:
        names: paths in the sdist, each below one folder.
        tracked: paths that version control knows.
    """
    held = {name.partition("/")[2] for name in names}
    problems = [f"the sdist lacks {name}" for name in sorted((SDIST_NEEDS | _package(tracked)) - held)]
    left = sorted(held - set(tracked) - GENERATED)
    return problems + [f"the sdist holds {name}, which version control does not know" for name in left]


def tracked_files(root: Path) -> set[str]:
    """The files of the project that version control knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return set(filter(None, listed.stdout.split("\0")))


def _package(tracked: Collection[str]) -> set[str]:
    return {name for name in tracked if name.startswith("ctxlens/")}


def check(folder: Path, tracked: Collection[str]) -> list[str]:
    """What is wrong with the one wheel and the one sdist in a folder; see `sdist_problems`."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists; expected one of each"]
    with zipfile.ZipFile(wheels[0]) as wheel, tarfile.open(sdists[0]) as sdist:
        files = [member.name for member in sdist.getmembers() if member.isfile()]
        return wheel_problems(wheel.namelist(), _package(tracked)) + sdist_problems(files, tracked)


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), tracked_files(ROOT))
    print("\n".join(found) if found else "the wheel and the sdist hold what they should")
    sys.exit(bool(found))
