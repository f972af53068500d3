"""What the page's script asks for by itself, without Dash: how far computations are, and rows of attention.

A click on a token must show what it looks at within a moment, and a page looks for results several times a
second. Each is one request here, where Dash would update its whole tree of components. The checks of
`server.guard` hold for these requests, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
import numpy as np
from dash import Dash

from ctxlens.errors import CtxlensError
from ctxlens.explore import parts
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import ChatPart, Part, WherePart, read_part
from ctxlens.explore.where import MASS, check_head, row_payload
from ctxlens.models.rows import tokens_of_mass

PROGRESS, ROW = "/explore/progress", "/explore/row"
_MOST_LISTED = 60


class Wanted(Part):
    """A result that a page waits for."""

    which: str
    key: str


class _Progress(Part):
    wanted: tuple[Wanted, ...] = ()


class _Row(Part):
    conversation: ChatPart
    look: WherePart
    page: str | None = None


def find_progress(lab: Lab, given: Any) -> dict[str, Any]:
    """How far results are: one entry for each one, with its state, its error and what there is of it.

    Raises:
        InputError: the question is not one of the page's.
    """
    found, words, share = [], "", None
    for want in read_part(_Progress, given).wanted:
        status = lab.look(want.which, want.key)
        is_over = status.state in ("done", "failed", "unknown")
        found.append(
            {"over": is_over, "state": status.state, "error": status.error, "partial": status.partial or ""}
        )
        if not is_over and (not words or status.state == "running"):
            words = "waiting for other computations" if status.ahead else "reading and answering"
            share = status.done / status.total if status.total else None
    return {"found": found, "words": words, "share": share}


def find_row(lab: Lab, given: Any) -> dict[str, Any]:
    """One head's attention from one token as `row`, with the tokens that hold most of it as `mass`.

    Where the row takes a forward pass, the answer is what to wait for, as `wanted`.

    Raises:
        InputError: the question is not one of the page's, or there is no such head.
    """
    asked = read_part(_Row, given)
    check_head(lab, asked.look)
    query = lab.query(lab.render(asked.conversation), asked.look.query)
    rows = lab.rows(asked.conversation, query=query)
    if rows is None:
        task = lab.reading(asked.conversation, query=query)
        return {"wanted": parts.want(lab, task, page=asked.page, name="row")}
    row = row_payload(rows, asked.look, query)
    mass = tokens_of_mass(np.asarray(row["weights"], dtype=float), MASS)
    listed = [[position, weight] for position, weight in mass[:_MOST_LISTED]]
    return {"row": row, "mass": listed, "most": len(mass)}


def register(app: Dash, lab: Lab) -> None:
    """Answer these requests."""

    def answer(path: str, find: Callable[[Lab, Any], dict[str, Any]]) -> None:
        def view() -> dict[str, Any]:
            try:
                return find(lab, flask.request.get_json(silent=True))
            except CtxlensError as error:
                return {"error": str(error)}

        app.server.add_url_rule(path, path, view, methods=["POST"])

    answer(PROGRESS, find_progress)
    answer(ROW, find_row)


__all__ = ["PROGRESS", "ROW", "find_progress", "find_row", "register"]
