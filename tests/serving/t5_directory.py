"""A Hugging Face directory of a random T5 with a tokenizer as T5 has it: unigram pieces, EOS put
behind a text by its template, a padding id, sentinels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PAD, EOS, UNKNOWN = 0, 1, 2
TEXT = "the quick brown fox jumps over lazy dog translate English to German A B C yes no"
WORDS = TEXT.split()
V10: dict[str, Any] = {"feed_forward_proj": "relu"}
V11: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def t5_tokenizer(folder: Path) -> int:
    """Writes the files; the number of ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in WORDS), *letters]
    scores = [0.0, 0.0, 0.0, -4.0, *(-2.0 for _ in WORDS), *(-5.0 for _ in letters)]
    library = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{index}>" for index in range(4)]
    named = ["<pad>", "</s>", "<unk>", *sentinels]
    library.add_special_tokens([AddedToken(name, special=True) for name in named])
    library.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_special_tokens": sentinels,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(library.get_vocab_size())


def t5_directory(folder: Path, changes: dict[str, Any], seed: int = 3) -> Path:
    """Weights, configuration and tokenizer; norms and tables matter, and logits spread."""
    import transformers

    vocab = t5_tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=vocab, d_model=48, d_kv=10, d_ff=72, num_layers=2, num_heads=6,
        relative_attention_num_buckets=12, relative_attention_max_distance=40,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS, initializer_factor=1.0,
        **changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif "lm_head" in name or "shared" in name:
                parameter.mul_(0.5)
            elif name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(4.0)  # else the last token decides the next
    model.eval().save_pretrained(folder)
    return folder
