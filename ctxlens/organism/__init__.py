"""The embedded default: a small language model's assets and the world it was trained in.

``BASE`` and ``CHAT`` are folders that ``transformers`` can load. This package holds data and plain Python
only; loading a model is ``ctxlens.models.load_model``'s job.
"""

from __future__ import annotations

from pathlib import Path

from ctxlens.organism.world import Fact, World, WorldConversation, load_world

__all__ = ["BASE", "CHAT", "Fact", "World", "WorldConversation", "load_world"]

BASE = Path(__file__).parent / "base"
CHAT = Path(__file__).parent / "chat"
