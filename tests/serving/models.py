"""Small random models and a tokenizer of bytes for the tests of serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.models.build import build_model
from mtk.models.gpt import GPT
from mtk.models.init import initialize
from mtk.tokenizers import Tokenizer

EOD = 256


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes, 256 is the end of a document."""

    kind = "Bytes"
    eod = EOD
    vocab_size = 257
    exact_bytes = True

    def __init__(self) -> None:
        super().__init__({}, {})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        out, run = [], bytearray()
        for token in ids:
            if token < 256:
                run.append(token)
            else:
                out += [run.decode("utf-8", errors="replace"), "<|endoftext|>"]
                run = bytearray()
        return "".join([*out, run.decode("utf-8", errors="replace")])

    def piece(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class PairTokenizer(ByteTokenizer):
    """Bytes with what T5 has besides: EOS behind a text for an encoder, a padding id that the
    decoder begins with, sentinels."""

    kind = "PairBytes"
    eos, pad = EOD, 257
    extra_ids = (258, 259)
    vocab_size = 260
    NAMES = ("</s>", "<pad>", "<extra_id_0>", "<extra_id_1>")

    def encode_framed(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        out, run = [], bytearray()
        for token in ids:
            if token < 256:
                run.append(token)
            else:
                out += [run.decode("utf-8", errors="replace"), self.NAMES[token - 256]]
                run = bytearray()
        return "".join([*out, run.decode("utf-8", errors="replace")])


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 96,
        "vocab_size": 257,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
    }
    return make(ModelConfig, **{**values, **changes})


def tiny_model(seed: int = 1, **changes: object) -> GPT:
    """A random GPT in fp32 whose logits are far from uniform."""
    config = tiny_config(**changes)
    model = build_model(config)
    initialize(model, config, seed)
    return model.eval()


LLAMA_LIKE = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}

# As published in 1.0 and 1.1, and as Megatron has it.
_T5 = {"family": "t5", "vocab_size": 260, "decoder_seq_length": 40, "decoder_start_token_id": 257}
_PUBLISHED = {
    **_T5,
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "softmax_scale": 1.0,
}
T5_10 = {**_PUBLISHED, "activation": "relu", "scale_tied_output": True}
T5_11 = {
    **_PUBLISHED,
    "activation": "geglu-tanh",
    "untie_embeddings_and_output_weights": True,
}
T5_MEGATRON = {**_T5, "num_query_groups": 2}

_MAMBA = {
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "mamba_head_dim": 8,
    "mamba_state_dim": 12,
    "mamba_num_groups": 2,
    "mamba_chunk_size": 8,
}
MAMBA = {**_MAMBA, "num_attention_heads": 1, "hybrid_layer_pattern": "MM"}
HYBRID = {**_MAMBA, "num_layers": 4, "num_query_groups": 2, "hybrid_layer_pattern": "M*-M"}


@torch.inference_mode()
def greedy_without_cache(model: GPT, prompt: Sequence[int], count: int) -> list[int]:
    """The simplest correct decoder: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def greedy_pair(model: GPT, prompt: Sequence[int], count: int, start: int = 257) -> list[int]:
    """As :func:`greedy_without_cache`, of a T5: encoder and decoder again for every token."""
    ids = [start]
    for _ in range(count):
        logits = model(torch.tensor([list(prompt)]), torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[1:]
