"""Saved results as figures: plotly figures, and HTML views where a figure would not do.

Nothing here loads a model. Figures have transparent backgrounds and colours that stay apart for
colour-blind readers and in greyscale.
"""

from ctxlens.plots.allocation import role_by_layer, role_heatmap
from ctxlens.plots.compare import Comparison, before_after_table, compare_models
from ctxlens.plots.drift import drift_by_layer, drift_map, drift_slider
from ctxlens.plots.evaluation import evaluation_means
from ctxlens.plots.heads import gradient_scatter, head_curves, head_map
from ctxlens.plots.html import HtmlView
from ctxlens.plots.needle import NeedlePanel, needle_heatmap, needle_panels
from ctxlens.plots.ratings import rating_means
from ctxlens.plots.roles import roles_view
from ctxlens.plots.score_layers import disagreement, layer_disagreement, score_density, threshold_shares
from ctxlens.plots.scores import (
    SelectionQuality,
    length_histogram,
    score_histogram,
    selection_histogram,
    selection_quality,
)
from ctxlens.plots.steering import SteeringPoint, steering_curves, steering_points
from ctxlens.plots.tokens import token_view
from ctxlens.plots.tradeoff import TradeOffPoint, trade_off, trade_off_points
from ctxlens.plots.training import loss_curve

__all__ = [
    "Comparison", "HtmlView", "NeedlePanel", "SelectionQuality", "SteeringPoint", "TradeOffPoint",
    "before_after_table", "compare_models", "disagreement", "drift_by_layer", "drift_map", "drift_slider",
    "evaluation_means", "gradient_scatter", "head_curves", "head_map", "layer_disagreement",
    "length_histogram", "loss_curve", "needle_heatmap", "needle_panels", "rating_means", "role_by_layer",
    "role_heatmap", "roles_view", "score_density", "score_histogram", "selection_histogram",
    "selection_quality", "steering_curves", "steering_points", "threshold_shares", "token_view", "trade_off",
    "trade_off_points",
]  # fmt: skip
