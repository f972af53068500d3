"""Experiments on heads: which carry the needle, and what happens when they are steered or switched off."""

from ctxlens.heads.choose import Head, HeadModel, draw_random_heads, find_retrieval_heads
from ctxlens.heads.probe import NeedleLayers, needle_layer
from ctxlens.heads.sweep import HEAD_SETS, steering_sweep

__all__ = [
    "HEAD_SETS", "Head", "HeadModel", "NeedleLayers", "draw_random_heads", "find_retrieval_heads",
    "needle_layer", "steering_sweep",
]  # fmt: skip
