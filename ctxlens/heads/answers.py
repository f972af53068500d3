"""The needle in the model's mouth: where it stands in the context and in the answer."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from ctxlens.cells import Cell
from ctxlens.roles import RenderedChat, Role


def needle_tokens(chat: RenderedChat, cell: Cell) -> Bool[np.ndarray, " pos"]:
    """The tokens of the needle where it stands in the context."""
    start, end = (chat.text.index(cell.context.text) + at for at in cell.context.needle_span)
    inside = (chat.spans[:, 0] < end) & (chat.spans[:, 1] > start)
    return inside & np.isin(chat.role, (Role.USER, Role.ASSISTANT))


__all__ = ["needle_tokens"]
