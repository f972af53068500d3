"""Language models that ctxlens can look into: `load_model` and the `Model` it gives."""

from ctxlens.models.loading import PACKAGED, read_chat_template
from ctxlens.models.model import Model, load_model

__all__ = ["PACKAGED", "Model", "load_model", "read_chat_template"]
