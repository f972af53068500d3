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
RUNS = ("manifest.json", ".parquet", ".DS_Store", ".pyc")
"""Ends of names that only runs and caches leave behind."""


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


def sdist_problems(names: Collection[str], package: Collection[str]) -> list[str]:
    """What is wrong with an sdist; see `wheel_problems`."""
    held = {name.partition("/")[2] for name in names}
    problems = [f"the sdist lacks {name}" for name in sorted((SDIST_NEEDS | set(package)) - held)]
    left = sorted(name for name in held if name.endswith(RUNS) and name not in package)
    return problems + [f"the sdist holds {name}, which a run or a cache has left" for name in left]


def tracked_files(root: Path) -> set[str]:
    """The files of the package, as version control knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "ctxlens"], cwd=root, capture_output=True, text=True, check=True
    )
    return set(filter(None, listed.stdout.split("\0")))


def check(folder: Path, package: Collection[str]) -> list[str]:
    """What is wrong with the one wheel and the one sdist in a folder."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists; expected one of each"]
    with zipfile.ZipFile(wheels[0]) as wheel, tarfile.open(sdists[0]) as sdist:
        files = [member.name for member in sdist.getmembers() if member.isfile()]
        return wheel_problems(wheel.namelist(), package) + sdist_problems(files, package)


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), tracked_files(ROOT))
    print("\n".join(found) if found else "the wheel and the sdist hold what they should")
    sys.exit(bool(found))
