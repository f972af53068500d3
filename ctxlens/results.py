"""What the studies return: frozen results with labelled axes, to and from one file each.

Tables (`NeedleGrid`, `Ability`, `Scores`, `Selection`) are Parquet files, arrays (`RoleAllocation`,
`TokenView`) are safetensors files, claims (`Verdicts`) are JSON; every file carries its `meta`
(model, condition, seed, settings) inside. Figures and reports are drawn from these files alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Float, Int

from ctxlens.errors import InputError
from ctxlens.roles import ROLE_LABELS, Role
from ctxlens.stats import Interval

if TYPE_CHECKING:
    import pandas as pd

_META_KEY = b"ctxlens"
_T = TypeVar("_T", bound="_Table")


@dataclass(frozen=True)
class _Table:
    """A result that is a table: one row a unit, named columns, and `meta`."""

    frame: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """The columns that must be there; a table may hold more."""

    def __post_init__(self) -> None:
        missing = [name for name in self.COLUMNS if name not in self.frame.columns]
        if missing:
            raise InputError(
                f"{type(self).__name__} needs the columns {', '.join(self.COLUMNS)}; "
                f"{', '.join(missing)} missing among {', '.join(map(str, self.frame.columns)) or 'none'}."
            )

    @classmethod
    def from_rows(
        cls: type[_T], rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] | None = None
    ) -> _T:
        """Build the table from one mapping a row."""
        import pandas as pd

        frame = pd.DataFrame(list(rows)) if rows else pd.DataFrame(columns=list(cls.COLUMNS))
        return cls(frame, dict(meta or {}))

    @classmethod
    def concat(cls: type[_T], tables: Sequence[_T]) -> _T:
        """Put tables under one another; `meta` is the first one's."""
        import pandas as pd

        return cls(pd.concat([table.frame for table in tables], ignore_index=True), tables[0].meta)

    def where(self: _T, **values: Any) -> _T:
        """The rows whose columns hold these values."""
        keep = np.ones(len(self.frame), dtype=bool)
        for name, value in values.items():
            keep &= (self.frame[name] == value).to_numpy()
        return replace(self, frame=self.frame[keep].reset_index(drop=True))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def __len__(self) -> int:
        return len(self.frame)

    def save(self, path: str | Path) -> None:
        """Write the table as Parquet, `meta` in the file's schema metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        record = {"type": type(self).__name__, "meta": dict(self.meta)}
        metadata = {**(table.schema.metadata or {}), _META_KEY: json.dumps(record, default=str).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)

    @classmethod
    def load(cls: type[_T], path: str | Path) -> _T:
        """Read a table that `save` has written.

        Raises:
            InputError: there is no such file, or it is not a result of this type.
        """
        import pyarrow.parquet as pq

        table = _read(path, pq.read_table)
        record = _checked(path, cls, (table.schema.metadata or {}).get(_META_KEY))
        return cls(table.to_pandas(), record["meta"])


@dataclass(frozen=True)
class NeedleGrid(_Table):
    """Needle-in-a-haystack cells, one row a cell and condition.

    Columns: `model`; `condition` (`plain+prefix`, `template+prefix`, `template`, `assistant+prefix`);
    `indicator` (whether the indicator was given); `alpha` (1.0: not steered), `heads` (label of the
    steered heads, `none`, `all`, `retrieval`, `random`), `draw` (number of the random draw, else 0);
    `cell` (the same text of another condition has the same number: pairs are made over it);
    `needle`; `context_tokens` (as asked), `prompt_tokens` (as built), `depth_percent`; `response`;
    `recall` (0 to 1); `memory_recall` (0 to 1, the keywords of what the model memorised; NaN where
    there is no such thing).
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "condition", "indicator", "alpha", "heads", "draw", "cell", "needle",
        "context_tokens", "prompt_tokens", "depth_percent", "response", "recall", "memory_recall",
    )  # fmt: skip

    def recall(self, column: str = "recall", **values: Any) -> pd.Series:
        """Mean recall by cell among the rows that hold these values, so that conditions can be paired."""
        return self.where(**values).frame.groupby("cell")[column].mean()


@dataclass(frozen=True)
class Ability(_Table):
    """Questions that need no context, one row a question: `recall` (0 to 1) of the answer's keywords."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("model", "indicator", "question", "response", "recall")


@dataclass(frozen=True)
class Scores(_Table):
    """Context-dependency scores, one row an assistant turn and layer.

    Columns: `conversation` (id), `turn` (index of the assistant message), `layer`; `best_of_mean`
    (user share of the head that has most on average over the response), `mean_of_best` (the largest
    user share over heads, token by token, then the mean), `mean_heads`, all 0 to 1; `uniform` (the
    user share if attention were uniform); `response_tokens`, `context_tokens` (user tokens that the
    turn can see); `truncated`. Labelled data have `kind` beside them.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "conversation", "turn", "layer", "best_of_mean", "mean_of_best", "mean_heads", "uniform",
        "response_tokens", "context_tokens", "truncated",
    )  # fmt: skip
    REDUCTIONS: ClassVar[tuple[str, ...]] = ("best_of_mean", "mean_of_best", "mean_heads")

    def layer(self, layer: int, reduction: str = "mean_of_best") -> pd.Series:
        """The scores of one layer, indexed by conversation and turn.

        Raises:
            InputError: no such layer or reduction in the table.
        """
        if reduction not in self.REDUCTIONS:
            raise InputError(f"unknown reduction {reduction!r}; choose one of {', '.join(self.REDUCTIONS)}.")
        rows = self.frame[self.frame["layer"] == layer]
        if rows.empty:
            layers = ", ".join(map(str, sorted(self.frame["layer"].unique())))
            raise InputError(f"layer {layer} is not among the scored layers ({layers or 'none'}).")
        return rows.set_index(["conversation", "turn"])[reduction]


@dataclass(frozen=True)
class Selection(_Table):
    """Which turns were chosen as context-dependent: `conversation`, `turn`, `score`, `selected`.

    `meta` holds `threshold`, `rule` (how the threshold was found), `layer` and `reduction`.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("conversation", "turn", "score", "selected")

    @property
    def turns(self) -> frozenset[tuple[str, int]]:
        """The chosen turns as pairs of conversation id and message index."""
        rows = self.frame[self.frame["selected"].astype(bool)]
        return frozenset(zip(rows["conversation"].astype(str), rows["turn"].astype(int), strict=True))


@dataclass(frozen=True)
class RoleAllocation:
    """How the attention of every layer and head spreads over the roles of the tokens attended to.

    Attributes:
        shares: attention mass by role, 0 to 1; the last axis sums to 1 (paper section 2.2, raw).
        key_counts: number of visible tokens of each role, by query.
        layers: the model's layer numbers along the first axis.
        query_labels: a name for each query (conversation and position).
        queries: what the queries are: `first_answer` (the position that produces the first answer
            token), `response_mean` (mean over the response's own positions) or `positions`.
        meta: model, condition (`template` or `plain`), steering and whatever the study adds.
    """

    shares: Float[np.ndarray, "layer head query role"]
    key_counts: Float[np.ndarray, "query role"]
    layers: tuple[int, ...]
    query_labels: tuple[str, ...]
    queries: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    roles: ClassVar[tuple[str, ...]] = ROLE_LABELS

    def share(self, role: str | Role, *, renormalised: bool = False) -> Float[np.ndarray, "layer head query"]:
        """The share of one role, 0 to 1."""
        source = self.renormalised() if renormalised else self
        return source.shares[..., Role.parse(role)]

    def renormalised(
        self, dropped: Sequence[str | Role] = (Role.TEMPLATE, Role.INDICATOR, Role.PAD, Role.SINK)
    ) -> RoleAllocation:
        """Shares over the roles that are left when the dropped ones are taken out (paper section 2.2).

        With and without template compare in these. A query whose mass lies wholly on dropped roles
        has NaN.
        """
        keep = np.ones(len(self.roles), dtype=np.float32)
        keep[[Role.parse(role) for role in dropped]] = 0
        kept = self.shares * keep
        total = kept.sum(-1, keepdims=True)
        shares = np.divide(kept, total, out=np.full_like(kept, np.nan), where=total > 0)
        return replace(self, shares=shares, key_counts=self.key_counts * keep)

    def uniform(self) -> Float[np.ndarray, "query role"]:
        """The shares if every visible token got the same attention: the baseline for raw shares."""
        return self.key_counts / np.maximum(self.key_counts.sum(-1, keepdims=True), 1)

    def retrieval_heads(self, role: str | Role = Role.USER) -> Int[np.ndarray, " layer"]:
        """The head of each layer with most attention on a role, over all queries (paper B.3)."""
        return np.nanmean(self.share(role), axis=-1).argmax(axis=-1)

    def to_frame(self) -> pd.DataFrame:
        """One row a layer, head, query and role."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.layers, range(self.shares.shape[1]), self.query_labels, self.roles],
            names=["layer", "head", "query", "role"],
        )
        return pd.DataFrame({"share": self.shares.reshape(-1)}, index=index).reset_index()

    @classmethod
    def concat(cls, allocations: Sequence[RoleAllocation]) -> RoleAllocation:
        """Allocations of several conversations, put together along the query axis.

        Raises:
            InputError: they are of other layers, heads or query kinds.
        """
        first = allocations[0]
        for other in allocations:
            if (other.layers, other.shares.shape[1], other.queries) != (
                first.layers, first.shares.shape[1], first.queries,
            ):  # fmt: skip
                raise InputError(
                    "only allocations of the same layers, heads and kind of query can be put together."
                )
        return replace(
            first,
            shares=np.concatenate([a.shares for a in allocations], axis=2),
            key_counts=np.concatenate([a.key_counts for a in allocations]),
            query_labels=tuple(label for a in allocations for label in a.query_labels),
        )

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        labels = {"layers": self.layers, "query_labels": self.query_labels, "queries": self.queries}
        _save_arrays(path, self, {"shares": self.shares, "key_counts": self.key_counts}, labels)

    @classmethod
    def load(cls, path: str | Path) -> RoleAllocation:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls)
        return cls(
            arrays["shares"],
            arrays["key_counts"],
            tuple(labels["layers"]),
            tuple(labels["query_labels"]),
            labels["queries"],
            meta,
        )


@dataclass(frozen=True)
class TokenView:
    """One conversation token by token, with the attention pattern of chosen query positions.

    Attributes:
        pattern: attention from each shown query to every token, 0 to 1.
        tokens: the text of every token (unescaped).
        token_roles: role value of every token.
        layers: the model's layer numbers along the first axis.
        query_positions: the shown queries.
        meta: model, condition and so on.
    """

    pattern: Float[np.ndarray, "layer head query key"]
    tokens: tuple[str, ...]
    token_roles: Int[np.ndarray, " key"]
    layers: tuple[int, ...]
    query_positions: tuple[int, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        labels = {"tokens": self.tokens, "layers": self.layers, "query_positions": self.query_positions}
        arrays = {"pattern": self.pattern, "token_roles": self.token_roles}
        _save_arrays(path, self, arrays, labels)

    @classmethod
    def load(cls, path: str | Path) -> TokenView:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls)
        return cls(
            arrays["pattern"],
            tuple(labels["tokens"]),
            arrays["token_roles"],
            tuple(labels["layers"]),
            tuple(labels["query_positions"]),
            meta,
        )


@dataclass(frozen=True)
class Verdict:
    """One claim, held against its measurement by a rule that was written down before.

    Attributes:
        claim: short name (`loss`, `role bias`, `cause`, `source`, `cure`).
        sentence: the claim with its figure, as one sentence for the reader.
        figure: the measured quantity with its interval.
        quantity: what the figure is, with unit.
        rule: the rule that decides.
        verdict: `supported`, `not supported` or `inconclusive`.
        notes: further figures as (what, interval) pairs.
    """

    claim: str
    sentence: str
    figure: Interval
    quantity: str
    rule: str
    verdict: str
    notes: tuple[tuple[str, Interval], ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one run."""

    verdicts: tuple[Verdict, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        from dataclasses import asdict

        record = {"type": "Verdicts", "meta": dict(self.meta), "verdicts": [asdict(v) for v in self.verdicts]}
        Path(path).write_text(json.dumps(record, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Verdicts:
        """Read what `save` has written; raises `InputError` on anything else."""
        content = _read(path, lambda p: Path(p).read_bytes())
        record = _checked(path, cls, content)
        verdicts = tuple(
            Verdict(
                **{
                    **row,
                    "figure": Interval(**row["figure"]),
                    "notes": tuple((what, Interval(**interval)) for what, interval in row["notes"]),
                }
            )
            for row in record["verdicts"]
        )
        return cls(verdicts, record["meta"])


Result = NeedleGrid | Ability | Scores | Selection | RoleAllocation | TokenView | Verdicts
_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (NeedleGrid, Ability, Scores, Selection, RoleAllocation, TokenView, Verdicts)
}


def load_result(path: str | Path) -> Result:
    """Read any result file; its type is told by the file itself.

    Raises:
        InputError: there is no such file, or it is no ctxlens result.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        raw = (_read(path, pq.read_schema).metadata or {}).get(_META_KEY)
    elif suffix == ".safetensors":
        raw = _safetensors_record(path)
    else:
        raw = _read(path, lambda p: Path(p).read_bytes())
    return _TYPES[_checked(path, None, raw)["type"]].load(path)


def _read(path: str | Path, reader: Any) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; give the path of a ctxlens result.")
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a ctxlens result ({error}).") from error


def _checked(path: str | Path, cls: type | None, raw: bytes | str | None) -> dict[str, Any]:
    try:
        record = json.loads(raw) if raw else {}
    except ValueError:
        record = {}
    name = record.get("type") if isinstance(record, dict) else None
    if name not in _TYPES or (cls is not None and name != cls.__name__):
        wanted = cls.__name__ if cls else "ctxlens"
        raise InputError(f"{path} is no {wanted} result" + (f" but a {name}." if name in _TYPES else "."))
    return record


def _save_arrays(
    path: str | Path, result: Any, arrays: dict[str, np.ndarray], labels: dict[str, Any]
) -> None:
    from safetensors.numpy import save_file

    record = {"type": type(result).__name__, "meta": dict(result.meta), "labels": labels}
    metadata = {_META_KEY.decode(): json.dumps(record, default=str)}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, metadata=metadata)


def _safetensors_record(path: str | Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    def read(p: str | Path) -> str | None:
        try:
            with safe_open(p, framework="numpy") as file:
                return (file.metadata() or {}).get(_META_KEY.decode())
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    return _read(path, read)


def _load_arrays(path: str | Path, cls: type) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    from safetensors.numpy import load_file

    record = _checked(path, cls, _safetensors_record(path))
    return load_file(path), record["labels"], record["meta"]


__all__ = [
    "Ability", "NeedleGrid", "Result", "RoleAllocation", "Scores", "Selection", "TokenView",
    "Verdict", "Verdicts", "load_result",
]  # fmt: skip
