"""Ways into a model: TransformerLens hooks (`lens`) or transformers' own attention (`native`)."""
