"""Text to token ids: Megatron's tokenizer types, their folders and fingerprints."""

from mtk.tokenizers.base import Tokenizer
from mtk.tokenizers.build import build_tokenizer, load_tokenizer, tokenizer_inputs

__all__ = ["Tokenizer", "build_tokenizer", "load_tokenizer", "tokenizer_inputs"]
