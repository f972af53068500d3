"""Shards of scores in a run folder: written whole or not at all, checked before they are used, merged."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.chat.data import Fingerprint
from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic
from ctxlens.results.scores import read_head, read_turns, write_turns
from ctxlens.runs import Run, package_versions
from ctxlens.scoring.shard import Shard

if TYPE_CHECKING:
    import pyarrow as pa

RESULT = "scores.parquet"
"""The name of the merged scores in a run folder."""

_FOLDER = "score-shards"
_DATA = f"{_FOLDER}/data.json"
_VERSIONS = ("ctxlens", "torch", "transformers", "transformer-lens")


class ShardStore:
    """The shards of one run."""

    def __init__(self, out: Run, head: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        """Take a run folder.

        Args:
            out: the run.
            head: what all shards have in common: `plan`, a digest of everything but the conversations that
                the scores depend on, `layers`, and what else the merged file shall say.
            notice: told which shard is damaged.
        """
        self.out, self.head, self.notice = out, dict(head), notice

    def has(self, index: int, fingerprint: str) -> bool:
        """Whether a shard of these conversations is finished and sound.

        Raises:
            RunExistsError: it holds scores of other conversations, another model or other settings.
        """
        path = _shard_path(self.out, index)
        if not path.is_file():
            return False
        try:
            meta, _ = read_head(path)
            for _ in read_turns(path):
                pass
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
        """Write a shard."""
        known = package_versions()
        versions = {name: known[name] for name in _VERSIONS if name in known}
        meta = {"head": self.head, **shard.meta, "versions": versions}
        _write(_shard_path(self.out, index), [shard.turns], meta, self.head["layers"])

    def close(self, shards: int, data: Mapping[str, Any]) -> None:
        """Note, once all conversations have been seen, how many shards they make and what is known of them.

        Raises:
            RunExistsError: another process has seen other conversations.
        """
        seen = {"plan": self.head["plan"], "shards": shards, **data}
        if self.out.has(_DATA) and self.out.read_json(_DATA) != seen:
            raise RunExistsError(
                f"{self.out.folder} holds shards of other conversations, another model or other settings; "
                "every part must be given the same data set and options."
            )
        self.out.write_json(_DATA, seen)


def finished_scores(out: Run, plan: str, fingerprint: Callable[[], str]) -> Mapping[str, Any] | None:
    """The `meta` of the finished scores of a run, if there are any.

    Raises:
        RunExistsError: they are of other conversations, another model or other settings.
    """
    if not out.has(RESULT):
        return None
    meta, _ = read_head(out.path(RESULT))
    if (meta.get("plan"), meta.get("fingerprint")) != (plan, fingerprint()):
        raise RunExistsError(
            f"{out.folder} already holds scores of other conversations, another model or other settings; "
            "choose another folder."
        )
    shutil.rmtree(out.path(_FOLDER), ignore_errors=True)
    return meta


def merge_shards(out: Run) -> Mapping[str, Any]:
    """Put the shards of a run together into `scores.parquet`, and list what was left out in `skipped.json`.

    The shards are removed once the file is written. A run that is merged already stays as it is.

    Returns:
        The `meta` of the scores.

    Raises:
        InputError: no finished part, missing or damaged shards, or nothing that could be scored.
    """
    if out.has(RESULT):
        return read_head(out.path(RESULT))[0]
    if not out.has(_DATA):
        raise InputError(
            f"no part of the scoring in {out.folder} is finished; run ctxlens score with it as --out."
        )
    data = out.read_json(_DATA)
    paths = [_shard_path(out, index) for index in range(data["shards"])]
    missing = [str(index) for index, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} shards are missing in {out.folder} ({', '.join(missing[:8])}"
            f"{', …' if len(missing) > 8 else ''}); run the parts that have not finished, then merge again."
        )
    metas = [read_head(path)[0] for path in paths]
    _check_shards(paths, metas, data)
    meta = _merge_metas(metas, data, out.manifest.get("config"))
    out.write_json("skipped.json", [*data["unread"], *meta["skipped"]])
    _remove_leftovers(out)
    _write(out.path(RESULT), (turns for path in paths for turns in read_turns(path)), meta, meta["layers"])
    shutil.rmtree(out.path(_FOLDER), ignore_errors=True)
    return meta


def merge_in_memory(
    shards: Sequence[Shard], head: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[pa.Table, Mapping[str, Any]]:
    """The turns of shards that are not on disk, and the `meta` of their scores."""
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
    for meta in metas:
        for name, version in meta["versions"].items():
            versions.setdefault(name, set()).add(version)
    return {
        **metas[0]["head"],
        "conversations": data["conversations"],
        "fingerprint": data["fingerprint"],
        "data": data["reading"],
        "truncated": sum(meta["truncated"] for meta in metas),
        "skipped": skipped,
        "versions": {name: ", ".join(sorted(found)) for name, found in versions.items()},
        **({} if config is None else {"config": config}),
    }


def _write(path: Path, tables: Sequence[pa.Table] | Iterator[pa.Table], meta: Any, layers: Any) -> None:
    write_atomic(path, lambda place: write_turns(place, tables, meta, layers))


def _remove_leftovers(out: Run) -> None:
    """What a kill in the midst of writing the merged file has left."""
    for path in out.folder.glob(f".{RESULT}.*.tmp"):
        path.unlink(missing_ok=True)


def _shard_path(out: Run, index: int) -> Path:
    return out.path(f"{_FOLDER}/{index:06d}.parquet")


__all__ = ["RESULT", "ShardStore", "finished_scores", "merge_in_memory", "merge_shards"]
