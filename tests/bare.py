"""ctxlens as the bare installation has it: everything that only an extra installs is hidden.

`python tests/bare.py VERB ...` runs the command line so, with whatever `ctxlens` comes first on the path.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    """A distribution's name in the one spelling in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Collection[str]) -> set[str]:
    """The installed distributions that requirements bring, directly or through others."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = normal(requirement.name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = [
            need
            for need in map(Requirement, needs)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
        ]
        if name not in found or requirement.extras:
            found.add(name)
            waiting += [Requirement(f"{need.name}{_brackets(need.extras)}") for need in wanted]
    return found


def _brackets(extras: Collection[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def modules_of_extras() -> set[str]:
    """The importable names that no distribution of the bare installation contains."""
    bare = closure(PROJECT["dependencies"]) | {normal(PROJECT["name"])}
    owners = importlib.metadata.packages_distributions()
    return {module for module, names in owners.items() if not bare & set(map(normal, names))}


class Hider:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, hidden: Collection[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's spec, or None if it is hidden."""
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(modules: Collection[str]) -> None:
    """Make modules impossible to import, and as if they were not installed."""
    sys.meta_path[:] = [Hider(finder, modules) for finder in sys.meta_path]


if __name__ == "__main__":
    hide(modules_of_extras())
    importlib.import_module("ctxlens.cli").main()
