"""Any transformers decoder, read and steered in place through `AttentionInterface` and one fused call."""

from ctxlens.models.backends.native.attending import Attending
from ctxlens.models.backends.native.attention import NAME, attend
from ctxlens.models.backends.native.backend import NativeBackend, shape_of

__all__ = ["NAME", "Attending", "NativeBackend", "attend", "shape_of"]
