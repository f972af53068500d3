"""Any transformers decoder, read and steered through `AttentionInterface` in one fused attention call."""

from ctxlens.models.backends.native.attention import NAME, Attending, Path, attend
from ctxlens.models.backends.native.backend import NativeBackend, shape_of

__all__ = ["NAME", "Attending", "NativeBackend", "Path", "attend", "shape_of"]
