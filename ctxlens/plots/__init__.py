"""Saved results as figures: plotly figures, and HTML views where a figure would not do.

Nothing here loads a model. Figures have transparent backgrounds and colours that stay apart for
colour-blind readers and in greyscale.
"""

from ctxlens.plots.allocation import role_by_layer, role_heatmap
from ctxlens.plots.compare import Comparison, before_after_table, compare_models
from ctxlens.plots.html import HtmlView
from ctxlens.plots.needle import NeedlePanel, needle_heatmap, needle_panels
from ctxlens.plots.roles import roles_view
from ctxlens.plots.scores import SelectionQuality, score_histogram, selection_histogram, selection_quality
from ctxlens.plots.steering import SteeringPoint, steering_curves, steering_points
from ctxlens.plots.tokens import token_view
from ctxlens.plots.training import loss_curve

__all__ = [
    "Comparison", "HtmlView", "NeedlePanel", "SelectionQuality", "SteeringPoint", "before_after_table",
    "compare_models", "loss_curve", "needle_heatmap", "needle_panels", "role_by_layer", "role_heatmap",
    "roles_view", "score_histogram", "selection_histogram", "selection_quality", "steering_curves",
    "steering_points", "token_view",
]  # fmt: skip
