"""Results that are arrays with labelled axes, each saved as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.errors import InputError
from ctxlens.results.files import META_KEY, check_record, make_record, read_safetensors_record

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RoleAllocation:
    """How the attention of every layer and head is distributed over the roles of the attended tokens.

    Attributes:
        shares: attention mass by role, 0 to 1; the last axis sums to 1 (paper section 2.2, raw).
        key_counts: number of visible tokens of each role, by query.
        layers: the model's layer numbers along the first axis.
        query_labels: a name for each query (conversation and position).
        queries: what the queries are: `first_answer` (the position that produces the first answer
            token), `response_mean` (mean over the response's own positions) or `positions`.
        meta: model, condition (`template` or `plain`), steering, and further entries of the study.
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
        """Shares over the remaining roles once the dropped ones are removed (paper section 2.2).

        These shares make conditions with and without template comparable. A query whose whole mass lies on
        dropped roles has NaN.
        """
        keep = np.ones(len(self.roles), dtype=np.float32)
        keep[[Role.parse(role) for role in dropped]] = 0
        kept = self.shares * keep
        total = kept.sum(-1, keepdims=True)
        shares = np.divide(kept, total, out=np.full_like(kept, np.nan), where=total > 0)
        return replace(self, shares=shares, key_counts=self.key_counts * keep)

    def uniform(self) -> Float[np.ndarray, "query role"]:
        """The shares if every visible token received the same attention: the baseline for raw shares."""
        return self.key_counts / np.maximum(self.key_counts.sum(-1, keepdims=True), 1)

    def retrieval_heads(self, role: str | Role = Role.USER) -> Int[np.ndarray, " layer"]:
        """The head of each layer with the most attention on a role, averaged over all queries (paper B.3)."""
        return np.nanmean(self.share(role), axis=-1).argmax(axis=-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head, query and role."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.layers, range(self.shares.shape[1]), self.query_labels, self.roles],
            names=["layer", "head", "query", "role"],
        )
        return pd.DataFrame({"share": self.shares.reshape(-1)}, index=index).reset_index()

    @classmethod
    def concat(cls, allocations: Sequence[RoleAllocation]) -> RoleAllocation:
        """Concatenate the allocations of several conversations along the query axis.

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
        )

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        labels = {"layers": self.layers, "query_labels": self.query_labels, "queries": self.queries}
        _save_arrays(path, self, {"shares": self.shares, "key_counts": self.key_counts}, labels)

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
        meta: model, condition and further entries of the study.
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
