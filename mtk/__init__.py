"""mtk: from raw text to a served language model, with proof at every step."""

__version__ = "0.1.0"
