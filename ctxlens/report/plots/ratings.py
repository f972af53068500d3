"""A judge's mean ratings with their intervals, by turn or by category."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go

from ctxlens.report.plots.intervals import interval_rows
from ctxlens.results import Ratings

_SCALE = (1, 10)


def rating_means(ratings: Ratings, by: Literal["turn", "category"]) -> go.Figure:
    """Draw mean ratings with 95 % intervals over questions, one symbol per model.

    Args:
        ratings: the ratings of one judge.
        by: `turn` for one line per turn and one for all turns; `category` for one line per category.
    """
    values = list(dict.fromkeys(ratings.frame[by]))
    if by == "turn":
        chosen = {f"turn {turn}": {"turn": turn} for turn in sorted(values)}
        chosen |= {"all turns": {}} if len(chosen) > 1 else {}
    else:
        chosen = {str(value): {"category": value} for value in values}
    means = {
        model: [ratings.mean(model=model, **where) for where in chosen.values()] for model in ratings.models
    }
    figure = interval_rows(list(chosen), means)
    low, high = _SCALE
    figure.update_xaxes(title_text="mean rating", range=[low - 0.3, high + 0.3], dtick=1)
    return figure


__all__ = ["rating_means"]
