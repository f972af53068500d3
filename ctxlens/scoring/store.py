"""Shards of scores in a run folder: written atomically, checked before they are used, then merged.

Shards are `ctxlens.runs.Parts` in a folder with a fixed name. A folder whose name depends on the settings
would not do: independent jobs share the folder, the last step merges it without knowing the settings, and
shards that belong to other data or settings must be refused instead of ignored. So every shard carries its
plan and the fingerprint of its conversations, and `ShardStore` compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.chat.data import Fingerprint
from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic
from ctxlens.results.scores import read_head, read_turns, write_turns
from ctxlens.runs import PartFormat, Parts, Run, package_versions
from ctxlens.scoring.shard import Shard

if TYPE_CHECKING:
    import pyarrow as pa

RESULT = "scores.parquet"
"""The name of the merged scores in a run folder."""

_FOLDER = "score-shards"
_DATA = f"{_FOLDER}/data.json"
_VERSIONS = ("ctxlens", "torch", "transformers", "transformer-lens")


def _save_shard(shard: Shard, path: Path) -> None:
    write_turns(path, [shard.turns], shard.meta, shard.meta["head"]["layers"])


def _load_shard(path: Path) -> Shard:
    """Read a whole shard; its checksums are verified."""
    import pyarrow as pa

    meta, _ = read_head(path)
    return Shard(pa.concat_tables(list(read_turns(path))), meta)


_SHARDS = PartFormat(".parquet", _save_shard, _load_shard)


class ShardStore:
    """The shards of one run, written and compared by one of its jobs."""

    def __init__(self, out: Run, head: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        """Open the shards of a run.

        Args:
            out: the run folder.
            head: what all shards have in common: `plan` (a digest of everything that the scores depend on
                except the conversations), `layers`, and further entries for the merged file.
            notice: called with a message for each damaged shard.
        """
        self.out, self.head, self.notice = out, dict(head), notice
        self.parts = _open_shards(out)

    def has(self, index: int, fingerprint: str) -> bool:
        """Whether a shard is finished, undamaged and made of these conversations.

        Raises:
            RunExistsError: the shard holds scores of other conversations, another model or other settings.
        """
        if not self.parts.has(_name(index)):
            return False
        try:
            meta = self.parts.read(_name(index)).meta
        except InputError as error:
            self.notice(f"scoring a damaged shard again: {error}")
            return False
        if (meta["head"]["plan"], meta["fingerprint"]) != (self.head["plan"], fingerprint):
            raise RunExistsError(
                f"{self.out.folder} holds unfinished scores of other conversations, another model or other "
                f"settings; choose another folder, or remove {_FOLDER} in it."
            )
        return True

    def save(self, index: int, shard: Shard) -> None:
        """Write a shard, with the head and the package versions in its `meta`."""
        known = package_versions()
        versions = {name: known[name] for name in _VERSIONS if name in known}
        meta = {"head": self.head, **shard.meta, "versions": versions}
        self.parts.write(_name(index), Shard(shard.turns, meta))

    def close(self, shards: int, data: Mapping[str, Any]) -> None:
        """Record the number of shards and a description of the data, once all conversations have been read.

        Raises:
            RunExistsError: another process has read other conversations.
        """
        seen = {"plan": self.head["plan"], "shards": shards, **data}
        if self.out.has(_DATA) and self.out.read_json(_DATA) != seen:
            raise RunExistsError(
                f"{self.out.folder} holds shards of other conversations, another model or other settings; "
                "every part must be given the same data set and options."
            )
        self.out.write_json(_DATA, seen)


def finished_scores(out: Run, plan: str, fingerprint: Callable[[], str]) -> Mapping[str, Any] | None:
    """The `meta` of the finished scores of a run; None if they are not finished.

    Raises:
        RunExistsError: the run holds scores of other conversations, another model or other settings.
    """
    if not out.has(RESULT):
        return None
    meta, _ = read_head(out.path(RESULT))
    if (meta.get("plan"), meta.get("fingerprint")) != (plan, fingerprint()):
        raise RunExistsError(
            f"{out.folder} already holds scores of other conversations, another model or other settings; "
            "choose another folder."
        )
    _open_shards(out).remove()
    return meta


def merge_shards(out: Run) -> Mapping[str, Any]:
    """Merge the shards of a run into `scores.parquet`, and list skipped conversations in `skipped.json`.

    The shards are removed once the file is written. A run that is already merged does not change.

    Returns:
        The `meta` of the scores.

    Raises:
        InputError: no part is finished, shards are missing or damaged, or no conversation could be scored.
    """
    if out.has(RESULT):
        return read_head(out.path(RESULT))[0]
    if not out.has(_DATA):
        raise InputError(
            f"no part of the scoring in {out.folder} is finished; run ctxlens score with it as --out."
        )
    data = out.read_json(_DATA)
    parts = _open_shards(out)
    names = [_name(index) for index in range(data["shards"])]
    paths = [parts.path(name) for name in names]
    missing = [str(index) for index, name in enumerate(names) if not parts.has(name)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards are missing in {out.folder} ({', '.join(missing[:8])}"
            f"{', …' if len(missing) > 8 else ''}); run the parts that have not finished, then merge again."
        )
    metas = [read_head(path)[0] for path in paths]
    _check_shards(paths, metas, data)
    meta = _merge_metas(metas, data, out.manifest.get("config"))
    out.write_json("skipped.json", [*data["unread"], *meta["skipped"]])
    out.record("data", {**data["reading"], "left_out": meta["left_out"]})
    _remove_leftovers(out)
    turns = (table for path in paths for table in read_turns(path))
    write_atomic(out.path(RESULT), lambda place: write_turns(place, turns, meta, meta["layers"]))
    parts.remove()
    return meta


def merge_in_memory(
    shards: Sequence[Shard], head: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[pa.Table, Mapping[str, Any]]:
    """Merge shards that are held in memory into one table of turns and its `meta`."""
    import pyarrow as pa

    metas = [{"head": head, **shard.meta, "versions": {}} for shard in shards]
    return pa.concat_tables([shard.turns for shard in shards]), _merge_metas(metas, data, None)


def _check_shards(paths: Sequence[Path], metas: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> None:
    total = Fingerprint()
    for path, meta in zip(paths, metas, strict=True):
        if meta["head"]["plan"] != data["plan"]:
            raise InputError(
                f"{path} was scored with another model or other settings; remove it and score again."
            )
        total += Fingerprint(meta["fingerprint"])
    if str(total) != data["fingerprint"]:
        raise InputError(
            f"the shards in {paths[0].parent} do not add up to the data set that was read; remove them "
            "and score again."
        )


def _merge_metas(
    metas: Sequence[Mapping[str, Any]], data: Mapping[str, Any], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    skipped = [{"conversation": name, "reason": reason} for meta in metas for name, reason in meta["skipped"]]
    if len(skipped) == data["conversations"]:
        reason, count = Counter(entry["reason"] for entry in skipped).most_common(1)[0]
        raise InputError(
            f"none of {data['conversations']} conversations can be scored; the most frequent reason, "
            f"{count} times: {reason}"
        )
    versions: dict[str, set[str]] = {}
    left_out: Counter[str] = Counter()
    for meta in metas:
        left_out.update(meta.get("left_out", {}))
        for name, version in meta["versions"].items():
            versions.setdefault(name, set()).add(version)
    return {
        **metas[0]["head"],
        "conversations": data["conversations"],
        "fingerprint": data["fingerprint"],
        "data": data["reading"],
        "truncated": sum(meta["truncated"] for meta in metas),
        "left_out": dict(left_out.most_common()),
        "skipped": skipped,
        "versions": {name: ", ".join(sorted(found)) for name, found in versions.items()},
        **({} if config is None else {"config": config}),
    }


def _remove_leftovers(out: Run) -> None:
    """Remove temporary files of processes that were killed while they wrote the merged file."""
    for path in out.folder.glob(f".{RESULT}.*.tmp"):
        path.unlink(missing_ok=True)


def _open_shards(out: Run) -> Parts:
    return Parts.in_folder(out, _FOLDER, form=_SHARDS)


def _name(index: int) -> str:
    return f"{index:06d}"


__all__ = ["RESULT", "ShardStore", "finished_scores", "merge_in_memory", "merge_shards"]
