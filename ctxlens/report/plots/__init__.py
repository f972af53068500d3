"""Draw saved results: as plotly figures, and as HTML where the result is text.

Nothing here loads a model. Figures have transparent backgrounds, and their colours can be told apart by
colour-blind readers and in greyscale.
"""

from ctxlens.report.plots.allocation import role_by_layer, role_heatmap
from ctxlens.report.plots.compare import Comparison, before_after_table, compare_models
from ctxlens.report.plots.context import context_curves
from ctxlens.report.plots.drift import drift_by_layer, drift_map, drift_slider
from ctxlens.report.plots.evaluation import evaluation_means
from ctxlens.report.plots.heads import gradient_scatter, head_curves, head_map
from ctxlens.report.plots.html import HtmlView
from ctxlens.report.plots.needle import NeedlePanel, needle_heatmap, needle_panels
from ctxlens.report.plots.ratings import rating_means
from ctxlens.report.plots.roles import roles_view
from ctxlens.report.plots.score_layers import (
    disagreement,
    layer_disagreement,
    score_density,
    threshold_shares,
)
from ctxlens.report.plots.scores import (
    SelectionQuality,
    length_histogram,
    score_histogram,
    selection_histogram,
    selection_quality,
)
from ctxlens.report.plots.steering import SteeringPoint, steering_curves, steering_points
from ctxlens.report.plots.tokens import token_view
from ctxlens.report.plots.tradeoff import TradeOffPoint, trade_off, trade_off_points
from ctxlens.report.plots.training import loss_curve

__all__ = [
    "Comparison", "HtmlView", "NeedlePanel", "SelectionQuality", "SteeringPoint", "TradeOffPoint",
    "before_after_table", "compare_models", "context_curves", "disagreement", "drift_by_layer", "drift_map",
    "drift_slider", "evaluation_means", "gradient_scatter", "head_curves", "head_map", "layer_disagreement",
    "length_histogram", "loss_curve", "needle_heatmap", "needle_panels", "rating_means", "role_by_layer",
    "role_heatmap", "roles_view", "score_density", "score_histogram", "selection_histogram",
    "selection_quality", "steering_curves", "steering_points", "threshold_shares", "token_view", "trade_off",
    "trade_off_points",
]  # fmt: skip
