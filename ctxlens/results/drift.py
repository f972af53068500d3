"""How attention by role differs between two models, or between two conditions of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.errors import InputError
from ctxlens.results.arrays import LEAST_SHARE, SINKLESS, VIEWS, _load_arrays, _save_arrays, check_view
from ctxlens.results.heads import HeadMap
from ctxlens.results.shown import Shown, count
from ctxlens.stats import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

_T_HEADS = ("mean", "retrieval")


@dataclass(frozen=True, repr=False)
class Drift(Shown):
    """Role shares of the same conversations on two sides, in pairs.

    Attributes:
        shares: attention mass by role, 0 to 1; the last axis sums to 1. Side 0 is the reference that side 1
            is compared with.
        key_counts: number of visible tokens of each role, by side and conversation.
        contexts: which text each conversation is made from; texts are the units of intervals.
        layers: the model's layer numbers.
        retrieval: the retrieval head of each layer (paper B.3), chosen on side 0's model without template.
        queries: the positions whose attention was read: `first_answer` or `response_mean`.
        meta: `sides` (two names, for instance `base, template`) and further entries of the study.
        resting: the part of each share that falls on attention sinks of this role; None: sinks were not
            measured, as in files written by earlier versions.
    """

    NATIVE: ClassVar[str] = ".safetensors"
    shares: Float[np.ndarray, "side layer head conversation role"]
    key_counts: Float[np.ndarray, "side conversation role"]
    contexts: Int[np.ndarray, " conversation"]
    layers: tuple[int, ...]
    retrieval: Int[np.ndarray, " layer"]
    queries: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    resting: Float[np.ndarray, "side layer head conversation role"] | None = None
    roles: ClassVar[tuple[str, ...]] = ROLE_LABELS

    @property
    def sides(self) -> tuple[str, str]:
        """The names of the two sides."""
        first, second = self.meta.get("sides", ("first", "second"))
        return str(first), str(second)

    def left_out(self, view: str) -> tuple[Role, ...]:
        """The roles that a view leaves out.

        Raises:
            InputError: an unknown view, or a view without sinks where sinks were not measured.
        """
        check_view(view, self.resting)
        return VIEWS[view]

    @property
    def views(self) -> tuple[str, ...]:
        """The views that this result has: those of `VIEWS`, without sinks only if these were measured."""
        return tuple(view for view in VIEWS if self.resting is not None or view not in SINKLESS)

    def _kept(self, view: str) -> Float[np.ndarray, " role"]:
        kept = np.ones(len(ROLE_LABELS), dtype=np.float32)
        kept[[int(role) for role in self.left_out(view)]] = 0
        return kept

    def share(self, role: str | Role, view: str = "raw") -> Float[np.ndarray, "side layer head conversation"]:
        """The share of one role in a view; NaN where no attention is left once roles are left out.

        Raises:
            InputError: an unknown view, a role that it leaves out, or a view without sinks where sinks were
                not measured.
        """
        kept = self._kept(view)
        index = Role.parse(role)
        if not kept[index]:
            raise InputError(f"the view {view!r} leaves out {index.label}; look at it in the raw view.")
        shares, least = self.shares, 1e-9
        if self.resting is not None and view in SINKLESS:
            shares, least = np.maximum(shares - self.resting, 0), LEAST_SHARE
        total = (shares * kept).sum(-1)
        return np.divide(shares[..., index], total, out=np.full_like(total, np.nan), where=total > least)

    def uniform(self, role: str | Role, view: str = "raw") -> Float[np.ndarray, "side conversation"]:
        """The share of one role if all visible tokens received the same attention, from token counts."""
        counts = self.key_counts * self._kept(view)
        return counts[..., Role.parse(role)] / np.maximum(counts.sum(-1), 1)

    def difference(self, role: str | Role, view: str = "raw") -> HeadMap:
        """Side 1 minus side 0, by conversation, layer and head."""
        share = self.share(role, view)
        return HeadMap(
            np.moveaxis(share[1] - share[0], -1, 0).astype(float),
            self.contexts,
            "drift",
            {"sides": self.sides, "role": Role.parse(role).label, "view": view, "quantity": "share"},
        )

    def excess(self, role: str | Role, view: str = "raw") -> HeadMap:
        """The difference minus that of the uniform baselines: drift that token counts do not explain."""
        plain = self.difference(role, view)
        uniform = self.uniform(role, view)
        counted = (uniform[1] - uniform[0])[:, None, None]
        return HeadMap(plain.effects - counted, self.contexts, "drift", {**plain.meta, "excess": True})

    def by_layer(
        self, role: str | Role, view: str = "raw", *, heads: str = "mean"
    ) -> list[tuple[Interval, Interval, Interval]]:
        """For each layer the share on side 0, on side 1, and their paired difference, with intervals.

        Args:
            role: the role.
            view: a name of `VIEWS`.
            heads: `mean` over heads, or the `retrieval` head, the same one on both sides.
        """
        if heads not in _T_HEADS:
            raise InputError(f"unknown heads {heads!r}; choose from {', '.join(_T_HEADS)}.")
        share = self.share(role, view).astype(float)
        if heads == "retrieval":
            at = share[:, np.arange(len(self.layers)), self.retrieval]
        else:
            known = ~np.isnan(share)
            count = known.sum(2)
            total = np.where(known, share, 0).sum(2)
            at = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return [
            (
                bootstrap_mean(at[0, layer], clusters=self.contexts),
                bootstrap_mean(at[1, layer], clusters=self.contexts),
                bootstrap_mean(at[1, layer] - at[0, layer], clusters=self.contexts),
            )
            for layer in range(len(self.layers))
        ]

    def shown_roles(self) -> list[str]:
        """The roles that have any tokens or receive any attention."""
        here = (self.key_counts > 0).any((0, 1)) | (np.nan_to_num(self.shares) > 1e-6).any((0, 1, 2, 3))
        return [self.roles[i] for i in np.flatnonzero(here)]

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head, conversation, role and side.

        Columns: `layer`; `head`; `conversation` (from 0); `context` (the number of its text); `role`; `side`
        (its name); `share` (0 to 1, raw); `retrieval` (whether the head is its layer's retrieval head); and
        `resting` (the part of the share that rests on sinks), if sinks were measured.
        """
        import pandas as pd

        heads, conversations = self.shares.shape[2:4]
        index = pd.MultiIndex.from_product(
            [self.layers, range(heads), range(conversations), self.roles, self.sides],
            names=["layer", "head", "conversation", "role", "side"],
        )
        frame = pd.DataFrame({"share": np.moveaxis(self.shares, 0, -1).reshape(-1)}, index=index)
        frame = frame.reset_index()
        frame.insert(3, "context", self.contexts[frame["conversation"]])
        chosen = dict(zip(self.layers, self.retrieval.tolist(), strict=True))
        frame["retrieval"] = frame["layer"].map(chosen) == frame["head"]
        if self.resting is not None:
            frame["resting"] = np.moveaxis(self.resting, 0, -1).reshape(-1)
        return frame

    def overview(self) -> pd.DataFrame:
        """Mean raw share by role on both sides, and the difference."""
        import pandas as pd

        first, second = np.nanmean(self.shares.astype(float), axis=(1, 2, 3)).round(3)
        shown = [self.roles.index(role) for role in self.shown_roles()]
        columns = {"role": self.shown_roles()}
        columns |= dict(zip(self._short_sides(), (first[shown], second[shown]), strict=True))
        return pd.DataFrame({**columns, "difference": (second - first)[shown].round(3)})

    def describe(self) -> str:
        """Its size and the two sides."""
        layers, heads, conversations = self.shares.shape[1:4]
        first, second = self._short_sides()
        asked = f"{count(conversations, 'conversation')}, {second} against {first}"
        return f"{count(layers, 'layer')} × {count(heads, 'head')}, {asked}"

    def _short_sides(self) -> tuple[str, str]:
        """The sides without the folders of their models, unless they would then be alike."""
        first, second = (side.rsplit("/", 1)[-1] for side in self.sides)
        return (first, second) if first != second else ("first: " + first, "second: " + second)

    def write(self, path: str | Path) -> None:
        """Write as safetensors."""
        names = ("shares", "key_counts", "contexts", "retrieval")
        arrays = {name: getattr(self, name) for name in names}
        if self.resting is not None:
            arrays["resting"] = self.resting
        _save_arrays(path, self, arrays, {"layers": self.layers, "queries": self.queries})

    @classmethod
    def load(cls, path: str | Path) -> Drift:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls.__name__)
        return cls(
            arrays["shares"],
            arrays["key_counts"],
            arrays["contexts"],
            tuple(labels["layers"]),
            arrays["retrieval"],
            labels["queries"],
            meta,
            arrays.get("resting"),
        )


__all__ = ["VIEWS", "Drift"]
