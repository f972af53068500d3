"""Any transformers decoder, read and steered through `AttentionInterface` in one fused attention call."""

from ctxlens.native.attention import NAME, Attending, attend
from ctxlens.native.backend import NativeBackend, shape_of

__all__ = ["NAME", "Attending", "NativeBackend", "attend", "shape_of"]
