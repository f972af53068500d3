"""Results that are arrays with labelled axes, each saved as a safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.errors import InputError
from ctxlens.results.files import META_KEY, check_record, make_record, read_safetensors_record
from ctxlens.results.shown import Shown, count

if TYPE_CHECKING:
    import pandas as pd

LEAST_SHARE = 0.01
"""Least attention outside of sinks that is renormalised. A head with more than 99 % of its attention on sinks
does nothing else there: what is left says nothing about roles, and renormalised it would count as much as the
attention of a head that reads."""

VIEWS: Mapping[str, tuple[Role, ...]] = {
    "raw": (),
    "renormalised": (Role.TEMPLATE, Role.INDICATOR, Role.PAD, Role.SINK),
    "without sinks": (Role.SINK, Role.PAD),
    "renormalised without sinks": (Role.TEMPLATE, Role.INDICATOR, Role.PAD, Role.SINK),
}
"""Ways to look at role shares, each with the roles that are left out before the rest is renormalised: all of
it; without the template's tokens, as in the paper (section 2.2); without attention sinks; without both. The
views without sinks also take out what rests on sinks of the other roles, such as BOS."""

SINKLESS = ("without sinks", "renormalised without sinks")
"""The views that exist only where sinks were measured."""

SINKS_NOT_MEASURED = (
    "the view without sinks is not available, because attention sinks were not measured (the file was "
    "written by an earlier version, or the model was read with sinks=False); read the model again"
)
"""Why a result has no view without sinks."""


@dataclass(frozen=True, repr=False)
class RoleAllocation(Shown):
    """How the attention of every layer and head is distributed over the roles of the attended tokens.

    Attributes:
        shares: attention mass by role, 0 to 1; the last axis sums to 1 (paper section 2.2, raw).
        key_counts: number of visible tokens of each role, by query.
        layers: the model's layer numbers along the first axis.
        query_labels: a name for each query (conversation and position).
        queries: what the queries are: `first_answer` (the position that produces the first answer
            token), `response_mean` (mean over the response's own positions) or `positions`.
        meta: model, condition (`template` or `plain`), steering, and further entries of the study.
        resting: the part of each share that falls on attention sinks of this role (see
            `ctxlens.models.attention.sinks`). None: sinks were not measured, as in files written by earlier
            versions.
    """

    NATIVE: ClassVar[str] = ".safetensors"
    shares: Float[np.ndarray, "layer head query role"]
    key_counts: Float[np.ndarray, "query role"]
    layers: tuple[int, ...]
    query_labels: tuple[str, ...]
    queries: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    resting: Float[np.ndarray, "layer head query role"] | None = None
    roles: ClassVar[tuple[str, ...]] = ROLE_LABELS

    def share(
        self, role: str | Role, *, renormalised: bool = False, view: str | None = None
    ) -> Float[np.ndarray, "layer head query"]:
        """The share of one role, 0 to 1.

        Args:
            role: the role.
            renormalised: look at the renormalised shares.
            view: or at any view of `in_view`.
        """
        source = self.in_view(view or ("renormalised" if renormalised else "raw"))
        return source.shares[..., Role.parse(role)]

    def in_view(self, view: str) -> RoleAllocation:
        """The same allocation in a view of `VIEWS`.

        Raises:
            InputError: an unknown view, or a view without sinks where sinks were not measured.
        """
        check_view(view, self.resting)
        seen = self.without_sinks() if view in SINKLESS else self
        return seen.renormalised() if view.startswith("renormalised") else seen

    def renormalised(
        self, dropped: Sequence[str | Role] = (Role.TEMPLATE, Role.INDICATOR, Role.PAD, Role.SINK)
    ) -> RoleAllocation:
        """Shares over the remaining roles once the dropped ones are removed (paper section 2.2).

        These shares make conditions with and without template comparable. A query whose whole mass lies on
        dropped roles has NaN.
        """
        keep = self._keep(dropped)
        kept = self.shares * keep
        total = kept.sum(-1, keepdims=True)
        resting = None if self.resting is None else _divide(self.resting * keep, total, total > 0)
        return replace(
            self,
            shares=_divide(kept, total, total > 0),
            key_counts=self.key_counts * keep,
            resting=resting,
        )

    def without_sinks(self) -> RoleAllocation:
        """Shares over the tokens that are no attention sinks, renormalised over the roles but pad and sink.

        Template tokens stay: take them out too with `allocation.without_sinks().renormalised()`. A query
        with more than 99 % of its mass on sinks has NaN. The token counts still include the sinks, which are
        few.

        Raises:
            InputError: sinks were not measured.
        """
        check_view("without sinks", self.resting)
        assert self.resting is not None
        keep = self._keep((Role.PAD, Role.SINK))
        kept = np.maximum(self.shares - self.resting, 0) * keep
        total = kept.sum(-1, keepdims=True)
        return replace(
            self,
            shares=_divide(kept, total, total > LEAST_SHARE),
            key_counts=self.key_counts * keep,
            resting=np.zeros_like(self.resting),
        )

    def with_sinks_apart(self) -> RoleAllocation:
        """Raw shares in which everything that rests on sinks, learned ones included, is the share of `sink`.

        The other roles have what is left. The last axis still sums to 1.

        Raises:
            InputError: sinks were not measured.
        """
        check_view("without sinks", self.resting)
        assert self.resting is not None
        shares = np.maximum(self.shares - self.resting, 0)
        shares[..., Role.SINK] += self.resting.sum(-1)
        return replace(self, shares=shares, resting=np.zeros_like(self.resting))

    def _keep(self, dropped: Sequence[str | Role]) -> Float[np.ndarray, " role"]:
        keep = np.ones(len(self.roles), dtype=np.float32)
        keep[[Role.parse(role) for role in dropped]] = 0
        return keep

    def uniform(self) -> Float[np.ndarray, "query role"]:
        """The shares if every visible token received the same attention: the baseline for raw shares."""
        return self.key_counts / np.maximum(self.key_counts.sum(-1, keepdims=True), 1)

    def retrieval_heads(self, role: str | Role = Role.USER) -> Int[np.ndarray, " layer"]:
        """The head of each layer with the most attention on a role, averaged over all queries (paper B.3).

        Attention that rests on sinks of the role does not count where sinks were measured: a head that only
        rests on the user's first token does not read what the user says.
        """
        source = self if self.resting is None else self.with_sinks_apart()
        return np.nanmean(source.share(role), axis=-1).argmax(axis=-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head, query and role.

        Columns: `layer`; `head`; `query` (its label); `role`; `share` (0 to 1, raw); and `resting` (the part
        of the share that rests on sinks), if sinks were measured.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.layers, range(self.shares.shape[1]), self.query_labels, self.roles],
            names=["layer", "head", "query", "role"],
        )
        columns = {"share": self.shares.reshape(-1)}
        if self.resting is not None:
            columns["resting"] = self.resting.reshape(-1)
        return pd.DataFrame(columns, index=index).reset_index()

    def overview(self) -> pd.DataFrame:
        """Mean share by layer, one column per role that has any attention."""
        import pandas as pd

        means = np.nanmean(self.shares.astype(float), axis=(1, 2))
        shown = np.flatnonzero(np.nan_to_num(means).any(axis=0))
        columns = {self.roles[i]: means[:, i].round(3) for i in shown}
        return pd.DataFrame({"layer": self.layers, **columns})

    def describe(self) -> str:
        """Its size, and how the model was asked."""
        layers, heads, queries, _ = self.shares.shape
        size = f"{count(layers, 'layer')} × {count(heads, 'head')}, {count(queries, 'query', 'queries')}"
        return size + (f", condition {self.meta['condition']}" if "condition" in self.meta else "")

    @classmethod
    def concat(cls, allocations: Sequence[RoleAllocation]) -> RoleAllocation:
        """Concatenate the allocations of several conversations along the query axis.

        Sinks count as measured if they were measured in all of them.

        Raises:
            InputError: they differ in layers, heads or kind of query.
        """
        first = allocations[0]
        for other in allocations:
            if (other.layers, other.shares.shape[1], other.queries) != (
                first.layers, first.shares.shape[1], first.queries,
            ):  # fmt: skip
                raise InputError(
                    "only allocations of the same layers, heads and kind of query can be concatenated."
                )
        return replace(
            first,
            shares=np.concatenate([a.shares for a in allocations], axis=2),
            key_counts=np.concatenate([a.key_counts for a in allocations]),
            query_labels=tuple(label for a in allocations for label in a.query_labels),
            resting=join_resting(allocations, lambda parts: np.concatenate(parts, axis=2)),
        )

    def write(self, path: str | Path) -> None:
        """Write as safetensors."""
        labels = {"layers": self.layers, "query_labels": self.query_labels, "queries": self.queries}
        arrays = {"shares": self.shares, "key_counts": self.key_counts}
        if self.resting is not None:
            arrays["resting"] = self.resting
        _save_arrays(path, self, arrays, labels)

    @classmethod
    def load(cls, path: str | Path) -> RoleAllocation:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls.__name__)
        return cls(
            arrays["shares"],
            arrays["key_counts"],
            tuple(labels["layers"]),
            tuple(labels["query_labels"]),
            labels["queries"],
            meta,
            arrays.get("resting"),
        )


def check_view(view: str, resting: np.ndarray | None) -> None:
    """Raise `InputError` for an unknown view, or one without sinks where they were not measured."""
    if view not in VIEWS:
        raise InputError(f"unknown view {view!r}; choose from {', '.join(VIEWS)}.")
    if resting is None and view in SINKLESS:
        raise InputError(f"{SINKS_NOT_MEASURED}.")


def join_resting(
    allocations: Sequence[RoleAllocation], join: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray | None:
    """The parts of several allocations that rest on sinks, joined; None if one was read without sinks."""
    parts = [allocation.resting for allocation in allocations if allocation.resting is not None]
    return join(parts) if len(parts) == len(allocations) else None


def _divide(kept: np.ndarray, total: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The quotient, NaN where there is nothing to divide by."""
    return np.divide(kept, total, out=np.full_like(kept, np.nan), where=where)


@dataclass(frozen=True, repr=False)
class TokenView(Shown):
    """One conversation token by token, with the attention pattern of chosen query positions.

    Attributes:
        pattern: attention from each shown query to every token, 0 to 1.
        tokens: the text of every token (unescaped).
        token_roles: role value of every token.
        layers: the model's layer numbers along the first axis.
        query_positions: the shown queries.
        meta: model, condition and further entries of the study.
    """

    NATIVE: ClassVar[str] = ".safetensors"
    pattern: Float[np.ndarray, "layer head query key"]
    tokens: tuple[str, ...]
    token_roles: Int[np.ndarray, " key"]
    layers: tuple[int, ...]
    query_positions: tuple[int, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head, query and token.

        Columns: `layer`; `head`; `query` (its position); `token` (position of the token that is attended to);
        `text` (of that token); `role`; `attention` (0 to 1).
        """
        import pandas as pd

        layers, heads, queries, tokens = self.pattern.shape
        index = pd.MultiIndex.from_product(
            [self.layers, range(heads), self.query_positions, range(tokens)],
            names=["layer", "head", "query", "token"],
        )
        repeated = layers * heads * queries
        roles = [ROLE_LABELS[role] for role in self.token_roles]
        columns = {
            "text": list(self.tokens) * repeated,
            "role": roles * repeated,
            "attention": self.pattern.reshape(-1),
        }
        return pd.DataFrame(columns, index=index).reset_index()

    def describe(self) -> str:
        """Its size, and how the model was asked."""
        layers, heads, queries, tokens = self.pattern.shape
        size = f"{count(layers, 'layer')} × {count(heads, 'head')}, {count(queries, 'query', 'queries')}"
        asked = f", condition {self.meta['condition']}" if "condition" in self.meta else ""
        return f"{size}, {count(tokens, 'token')}{asked}"

    def write(self, path: str | Path) -> None:
        """Write as safetensors."""
        labels = {"tokens": self.tokens, "layers": self.layers, "query_positions": self.query_positions}
        arrays = {"pattern": self.pattern, "token_roles": self.token_roles}
        _save_arrays(path, self, arrays, labels)

    @classmethod
    def load(cls, path: str | Path) -> TokenView:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls.__name__)
        return cls(
            arrays["pattern"],
            tuple(labels["tokens"]),
            arrays["token_roles"],
            tuple(labels["layers"]),
            tuple(labels["query_positions"]),
            meta,
        )


def _save_arrays(
    path: str | Path, result: Any, arrays: dict[str, np.ndarray], labels: dict[str, Any]
) -> None:
    from safetensors.numpy import save_file

    metadata = {META_KEY: make_record(result, labels=labels)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata=metadata)


def _load_arrays(
    path: str | Path, name: str
) -> tuple[dict[str, np.ndarray], Mapping[str, Any], Mapping[str, Any]]:
    from safetensors.numpy import load_file

    record = check_record(path, read_safetensors_record(path), name)
    return load_file(path), record["labels"], record["meta"]
