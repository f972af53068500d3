"""Scoring inside Ray, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.chat.data import Conversation, conversation_from_row
from ctxlens.errors import InputError
from ctxlens.results.scores import Precision
from ctxlens.scoring.shard import Scorer, Settings, score_shard

if TYPE_CHECKING:
    import pyarrow as pa


class ScoreBatch:
    """A callable for `ray.data.Dataset.map_batches` that turns conversations into scored turns.

    Every actor loads the model once::

        scores = ray.data.read_parquet("corpus/").map_batches(
            ScoreBatch,
            fn_constructor_kwargs={"model": "path/or/hub-id", "layout": "messages"},
            batch_format="pyarrow",
            batch_size=512,
            concurrency=7,  # with 8 CPUs: one stays free to read the data
            num_gpus=1,
        )
        scores.write_parquet("scores/")

    Every actor takes a CPU. If the actors take every CPU of the cluster, none is left to read the data, and
    Ray waits without a word.

    A row of the result is an assistant turn, with the columns of a file of scores and `layers`, the layers
    that the elements of its lists belong to. A conversation that cannot be scored is one row with `turn` -1
    and the reason in `skipped`.
    """

    def __init__(
        self,
        model: str | Path | Scorer,
        *,
        layout: str,
        id_column: str = "id",
        layers: Sequence[int] | str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        precision: Precision | str = "float32",
        drop_refusals: bool = False,
        **load_options: Any,
    ) -> None:
        """Load the model.

        Args:
            model: an argument for `ctxlens.load_model` (by default with the backend `native`), or a loaded
                model.
            layout: the layout of the rows, one of `ctxlens.chat.data.LAYOUTS`.
            id_column: the column with the conversations' ids.
            layers: the layers to score, as in `score_conversations`.
            max_tokens: truncate to fewer tokens than the model's window.
            batch_tokens: padded tokens per forward pass.
            precision: the number format of the scores.
            drop_refusals: see `open_conversations`.
            load_options: further options of `load_model`.
        """
        if isinstance(model, str | Path):
            from ctxlens.models import load_model

            model = load_model(model, **{"backend": "native", **load_options})
        self.model: Scorer = model
        self.layout, self.id_column, self.drop_refusals = layout, id_column, drop_refusals
        self.settings = Settings.of(
            self.model, layers=layers, max_tokens=max_tokens, batch_tokens=batch_tokens, precision=precision
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a batch of rows.

        Raises:
            InputError: the rows have no ids, or an attention value is not a number.
        """
        import pyarrow as pa

        if self.id_column not in batch.column_names:
            raise InputError(
                f"the rows have no column {self.id_column!r} that identifies conversations; "
                "name one with id_column."
            )
        conversations: list[Conversation] = []
        skipped: list[tuple[str, str]] = []
        for row in batch.to_pylist():
            if row[self.id_column] is None:
                skipped.append(("", f"the column {self.id_column!r} is null"))
                continue
            name = str(row[self.id_column])
            try:
                conversations.append(
                    conversation_from_row(
                        row, self.layout, identity=name, source="ray", drop_refusals=self.drop_refusals
                    )
                )
            except InputError as error:
                skipped.append((name, str(error)))
        shard = score_shard(self.model, conversations, self.settings)
        skipped += shard.meta["skipped"]
        layers = pa.array([list(self.settings.layers)] * len(shard.turns), pa.list_(pa.int32()))
        reasons = pa.nulls(len(shard.turns), pa.string())
        scored = shard.turns.append_column("layers", layers).append_column("skipped", reasons)
        left_out = {
            "conversation": pa.array([name for name, _ in skipped], pa.string()),
            "turn": pa.array([-1] * len(skipped), pa.int32()),
            "skipped": pa.array([reason for _, reason in skipped], pa.string()),
        }
        return pa.concat_tables([scored, pa.table(left_out)], promote_options="default")


__all__ = ["ScoreBatch"]
