"""Run folders: atomic writes, and a manifest that says what a folder's results came from.

A run folder holds `manifest.json` (study, configuration, seed, package versions, model identity)
and the results of that study. Opening the folder again with the same study and configuration
resumes it; with another one it is refused, so that no result is ever overwritten unasked.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic

MANIFEST = "manifest.json"
_REPORTED_PACKAGES = (
    "ctxlens", "torch", "transformers", "transformer-lens", "trl", "datasets", "numpy", "scipy", "plotly",
)  # fmt: skip


@runtime_checkable
class Savable(Protocol):
    """What `Run.save` needs of a result."""

    def save(self, path: Path) -> None: ...


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, for manifests."""
    versions = {"python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Run:
    """One run folder, opened by `Run.open` (a new or resumed run) or `Run.read` (an existing one)."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(
        cls, folder: str | Path, *, study: str, config: Mapping[str, Any], overwrite: bool = False
    ) -> Run:
        """Make the folder, or resume the run in it.

        Args:
            folder: the run folder.
            study: what is run, for instance `"needle"`.
            config: everything the result depends on (settings, seed, model identity), as JSON values.
            overwrite: start anew when the folder holds a run; the old one is kept beside it under the
                name with `.old`, so nothing is lost.

        Raises:
            RunExistsError: the folder holds another run, or files of something else.
            InputError: the folder cannot be written to.
        """
        folder = Path(folder)
        wanted = {"study": study, "config": json.loads(json.dumps(config, default=str))}
        path = folder / MANIFEST
        if path.is_file() and not overwrite:
            found = _read_manifest(path)
            if {key: found.get(key) for key in wanted} != wanted:
                raise RunExistsError(
                    f"{folder} already holds another run ({_difference(found, wanted)}); choose another "
                    "folder, or pass --overwrite where the command has it."
                )
            return cls(folder, found)
        if folder.is_file():
            raise InputError(f"{folder} is a file; give a folder for the results.")
        if path.is_file():
            _set_aside(folder)
        elif folder.is_dir() and any(folder.iterdir()):
            raise RunExistsError(
                f"{folder} already holds files that are no ctxlens run; choose an empty or new folder."
            )
        manifest = {
            **wanted,
            "versions": package_versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_atomic(path, json.dumps(manifest, indent=2))
        return cls(folder, manifest)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Open an existing run for reading.

        Raises:
            InputError: there is no run in the folder.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} holds no ctxlens run (no {MANIFEST}); give the --out folder of one.")
        return cls(folder, _read_manifest(folder / MANIFEST))

    def record(self, key: str, value: Any) -> Run:
        """Add what became known later to the manifest; opening the folder again does not compare it."""
        manifest = {**self.manifest, key: json.loads(json.dumps(value, default=str))}
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=2))
        return Run(self.folder, manifest)

    def path(self, name: str) -> Path:
        """The path of a file of this run."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the named result has been written."""
        return self.path(name).exists()

    def save(self, name: str, result: Savable) -> Path:
        """Write a result under a name, atomically."""
        return write_atomic(self.path(name), result.save)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file, atomically."""
        return write_atomic(self.path(name), json.dumps(value, indent=2, default=str))

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))


def _set_aside(folder: Path) -> None:
    """Rename a run folder to the first free name of `folder.old`, `folder.old2` and so on."""
    folder = folder.resolve()
    names = (folder.with_name(f"{folder.name}.old{number or ''}") for number in (None, *range(2, 1000)))
    place = next(name for name in names if not name.exists())
    try:
        folder.rename(place)
    except OSError as error:
        raise InputError(f"Cannot set {folder} aside: {error.strerror}; choose another folder.") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a run manifest ({error}); remove it or choose another folder."
        ) from error


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("study") != wanted["study"]:
        return f"study {found.get('study')!r}, not {wanted['study']!r}"
    old, new = found.get("config") or {}, wanted["config"]
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "other settings: " + ", ".join(keys[:4])
