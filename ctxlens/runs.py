"""Run folders: a manifest that records where the results come from, and the finished parts of long work.

A run folder holds `manifest.json` (study, configuration, seed, package versions, model identity)
and the results of that study. Opening the folder again with the same study and configuration
resumes it; another one is refused, so that no result is overwritten by accident.

Long work keeps each finished part in the folder (`Parts`), so that the same command resumes even after a
kill.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic

MANIFEST = "manifest.json"
Progress = Callable[[int, int], None]
"""Called with the finished amount and the total, in the unit that the caller documents."""

StageProgress = Callable[[str, int, int], None]
"""Called like `Progress`, with the name of the stage as the first argument."""

_DISTRIBUTION = "ctxlens-interp"
_REPORTED_PACKAGES = (
    _DISTRIBUTION, "torch", "transformers", "transformer-lens", "trl", "datasets", "numpy", "scipy", "plotly",
)  # fmt: skip


@runtime_checkable
class Savable(Protocol):
    """What `Run.save` requires of a result."""

    def write(self, path: Path) -> None: ...


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, for manifests."""
    versions = {"python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            key = "ctxlens" if name == _DISTRIBUTION else name
            versions[key] = importlib.metadata.version(name)
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
        """Create the folder, or resume the run in it.

        Args:
            folder: the run folder.
            study: the name of the study, for instance `"needle"`.
            config: everything the result depends on (settings, seed, model identity), as JSON values.
            overwrite: start over if the folder holds a run. The old folder is renamed with the ending `.old`,
                so nothing is lost.

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
                f"{folder} already holds files that are not a ctxlens run; choose an empty or new folder."
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
            InputError: the folder does not hold a run.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} holds no ctxlens run (no {MANIFEST}); give the --out folder of one.")
        return cls(folder, _read_manifest(folder / MANIFEST))

    def record(self, key: str, value: Any) -> Run:
        """Add an entry to the manifest later; reopening the folder does not compare it."""
        path = self.folder / MANIFEST
        known = _read_manifest(path) if path.is_file() else self.manifest
        manifest = {**known, key: json.loads(json.dumps(value, default=str))}
        write_atomic(path, json.dumps(manifest, indent=2))
        return Run(self.folder, manifest)

    def path(self, name: str) -> Path:
        """The path of a file of this run."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the named result has been written."""
        return self.path(name).exists()

    def save(self, name: str, result: Savable) -> Path:
        """Write a result under a name, atomically."""
        return write_atomic(self.path(name), result.write)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file, atomically."""
        return write_atomic(self.path(name), json.dumps(value, indent=2, default=str))

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))


TIMINGS = "timings.json"
Work = TypeVar("Work")


@dataclass(frozen=True)
class Stage(Generic[Work]):
    """One stage of a study.

    Attributes:
        name: its name in files and progress.
        title: what it does, in words.
        run: does it, on what the stages share, and reports the progress.
        always: whether it runs again although it is finished, because it only reads the other stages' files.
    """

    name: str
    title: str
    run: Callable[[Work, Progress], object]
    always: bool = False


def run_stages(
    run: Run, stages: Sequence[Stage[Work]], work: Work, progress: StageProgress | None = None
) -> None:
    """Run the stages that are not finished, in order, and keep their times in `timings.json`.

    Args:
        run: the run folder.
        stages: the stages.
        work: what the stages share; each stage gets it.
        progress: called as progress(stage, done, total); with (0, 1) at the start of a stage, and with
            done = total at its end.
    """
    timings = run.read_json(TIMINGS) if run.has(TIMINGS) else {}
    for stage in stages:
        tell = _Teller(stage.name, progress)
        tell(0, 1)
        if stage.always or stage.name not in timings:
            wall, cpu = time.perf_counter(), time.process_time()
            stage.run(work, tell)
            timings[stage.name] = {
                "what": stage.title,
                "wall_seconds": round(time.perf_counter() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            run.write_json(TIMINGS, timings)
        tell(tell.total, tell.total)


class _Teller:
    """Reports the progress of one stage, and remembers how much there was to do."""

    def __init__(self, stage: str, progress: StageProgress | None) -> None:
        self.stage, self.progress, self.total = stage, progress, 1

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        if self.progress:
            self.progress(self.stage, done, total)


def digest(value: Any) -> str:
    """A short fingerprint of JSON values: the first 16 hexadecimal digits of a SHA-256.

    Equal values give equal fingerprints whatever the order of their keys. A value that JSON cannot represent
    counts as its `str`.
    """
    content = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PartFormat:
    """How a finished part becomes a file.

    Attributes:
        suffix: ending of the file's name.
        save: writes a part at a path.
        load: reads it back.
    """

    suffix: str
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]


JSON_PARTS = PartFormat(
    ".json",
    lambda value, path: path.write_text(json.dumps(value, default=str), encoding="utf-8"),
    lambda path: json.loads(path.read_text(encoding="utf-8")),
)
"""Parts that are JSON values."""


class Parts:
    """Finished parts of a result until it is complete: each in its own file, or in memory without a run.

    A part is written atomically, so a killed process leaves only whole parts. Parts belong to one result of
    one run: what they were made of and when the run was created are in the name of their folder, so that
    parts of other settings are never mistaken for them.

    ```python
    parts = Parts(run, "needle", {"config": config.as_dict()})
    answers = [parts.get(str(number), lambda: ask(cell)) for number, cell in enumerate(cells)]
    run.save("needle.parquet", join(answers))
    parts.remove()
    ```
    """

    def __init__(self, out: Run | None, name: str, made_of: Any, *, form: PartFormat = JSON_PARTS) -> None:
        """Open the parts of a result.

        Args:
            out: the run folder; None: parts are kept in memory only.
            name: the result's name in the folder.
            made_of: JSON values on which the parts depend.
            form: how a part becomes a file.
        """
        self._form = form
        self._memory: dict[str, Any] = {}
        self._folder: Path | None = None
        if out is not None:
            key = digest([made_of, out.manifest.get("created")])
            self._folder = out.path("parts") / f"{name}-{key}"

    @classmethod
    def in_folder(cls, out: Run, folder: str, *, form: PartFormat = JSON_PARTS) -> Parts:
        """Open parts in a folder with a fixed name, for jobs that work on one result independently.

        The name of the folder does not say what the parts were made of, so the caller must check each part.

        Args:
            out: the run folder.
            folder: path of the parts' folder inside the run folder.
            form: how a part becomes a file.
        """
        parts = cls(None, folder, None, form=form)
        parts._folder = out.path(folder)
        return parts

    def has(self, part: str) -> bool:
        """Whether a part is finished."""
        return part in self._memory if self._folder is None else self.path(part).is_file()

    def read(self, part: str) -> Any:
        """A finished part."""
        return self._memory[part] if self._folder is None else self._form.load(self.path(part))

    def write(self, part: str, content: Any) -> None:
        """Keep a part and remove its side files, which are no longer needed."""
        if self._folder is None:
            self._memory[part] = content
            return
        write_atomic(self.path(part), lambda path: self._form.save(content, path))
        for path in self._folder.glob(f"{part}.side-*"):
            path.unlink(missing_ok=True)

    def get(self, part: str, compute: Callable[[], Any]) -> Any:
        """Read a part if it is finished; otherwise compute and keep it."""
        if not self.has(part):
            self.write(part, compute())
        return self.read(part)

    def side_path(self, part: str, name: str) -> Path | None:
        """Path of an extra file for an unfinished part; None without a run folder."""
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{part}.side-{name}"

    def remove(self) -> None:
        """Remove all parts, once the complete result is written."""
        self._memory.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
                self._folder.parent.rmdir()

    def path(self, part: str) -> Path:
        """The file of a part.

        Raises:
            ValueError: the parts are kept in memory.
        """
        if self._folder is None:
            raise ValueError("parts that are kept in memory have no files; open them with a run folder.")
        return self._folder / f"{part}{self._form.suffix}"


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
