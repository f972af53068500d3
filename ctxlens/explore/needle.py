"""Screen of needle."""

from __future__ import annotations

from dash import Dash, html

from ctxlens.explore import parts
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import State as Chosen


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    return parts.section("needle", "needle", "This screen is not there yet.")


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""


__all__ = ["layout", "register"]
