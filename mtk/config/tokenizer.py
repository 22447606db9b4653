"""Options that choose a tokenizer, and those of ``mtk tokenizer train``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "NullTokenizer",
]

# Which options a type needs, and which it may have besides.
NEEDS: dict[str, tuple[str, ...]] = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}
TAKES: dict[str, tuple[str, ...]] = {
    "GPT2BPETokenizer": (),
    "BertWordPieceLowerCase": ("vocab_extra_ids", "bert_eod"),
    "BertWordPieceCase": ("vocab_extra_ids", "bert_eod"),
    "SentencePieceTokenizer": (
        "vocab_extra_ids",
        "tokenizer_add_bos",
        "tokenizer_sentencepiece_legacy",
        "tokenizer_special_tokens",
    ),
    "GPTSentencePieceTokenizer": ("tokenizer_add_bos",),
    "Llama2Tokenizer": ("tokenizer_add_bos",),
    "HuggingFaceTokenizer": ("eod_token", "tokenizer_hf_include_special_tokens"),
    "TikTokenizer": (
        "vocab_size",
        "eod_token",
        "tiktoken_pattern",
        "tiktoken_num_special_tokens",
        "tokenizer_special_tokens",
    ),
    "NullTokenizer": ("null_tokenizer_eod_id",),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; names as in Megatron-LM where it has one."""

    tokenizer_type: TokenizerType | None = option(
        None, help="Kind of tokenizer (default: what the --tokenizer-model folder says)."
    )
    tokenizer_model: str | None = option(
        None,
        help="A folder (saved or trained by mtk, or with tokenizer.json), or the file of a "
        "SentencePiece or tiktoken model.",
    )
    vocab_file: str | None = option(None, help="GPT-2's vocab.json or BERT's vocab.txt.")
    merge_file: str | None = option(None, help="GPT-2's merges.txt.")
    vocab_size: int | None = option(
        None, help="Highest integer of NullTokenizer, or where TikTokenizer cuts its ranks."
    )
    vocab_extra_ids: int = option(0, help="Sentinels <extra_id_0>... appended (T5).")
    eod_token: str | None = option(
        None, help="The token that ends documents, where the folder does not say."
    )
    bert_eod: Literal["eos", "sep"] = option(
        "eos",
        help="End of document of BERT vocabularies: [EOS], appended if absent as up to "
        "Megatron-core 0.14, or [SEP] as later.",
    )
    tokenizer_special_tokens: tuple[str, ...] = option(
        (), help="Further (SentencePiece) or all (tiktoken) special tokens."
    )
    tokenizer_sentencepiece_legacy: bool = option(
        False, help="Append <CLS> <SEP> <EOD> <MASK> ... and find them in text (SentencePiece)."
    )
    tokenizer_add_bos: bool = option(
        False, help="Begin every text with BOS (what Llama2Tokenizer did up to 0.14)."
    )
    tokenizer_hf_include_special_tokens: bool = option(
        False, help="Add what the folder's template adds, e.g. BOS (HuggingFaceTokenizer)."
    )
    tiktoken_pattern: Literal["auto", "v1", "v2", "gpt2", "cl100k", "o200k", "llama3"] = option(
        "auto", help="Splitting rule: v2 for JSON vocabularies; by size for .tiktoken files."
    )
    tiktoken_num_special_tokens: int | None = option(
        None, help="Ids kept for specials in front of the ranks (JSON vocabularies; 1000)."
    )
    null_tokenizer_eod_id: int | None = option(
        None, help="EOD of NullTokenizer, vocabulary then V (default: EOD V, vocabulary V + 1)."
    )

    def problems(self) -> Iterator[Problem]:
        if self.tokenizer_type is None:
            if self.tokenizer_model is None:
                fix = "Give --tokenizer-type, or --tokenizer-model FOLDER."
                yield Problem("tokenizer_type", None, "no tokenizer chosen", fix)
            return
        if not self.reads_folder:
            for name in NEEDS[self.tokenizer_type]:
                if getattr(self, name) is None:
                    fix = f"Give --{name.replace('_', '-')}."
                    yield Problem(name, None, f"is needed by {self.tokenizer_type}", fix)
        used = {"tokenizer_type", "tokenizer_model"}
        used |= {*NEEDS[self.tokenizer_type], *TAKES[self.tokenizer_type]}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in used and value != field.default:
                rule = f"has no meaning for {self.tokenizer_type}"
                yield Problem(field.name, value, rule, "Leave it out.")
        yield from self._ranges()

    @property
    def reads_folder(self) -> bool:
        """A folder that already says everything stands in for separate files."""
        return self.tokenizer_model is not None and self.tokenizer_type != "NullTokenizer"

    def _ranges(self) -> Iterator[Problem]:
        for name, least in (
            ("vocab_size", 1),
            ("vocab_extra_ids", 0),
            ("tiktoken_num_special_tokens", 0),
            ("null_tokenizer_eod_id", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                yield Problem(name, value, f"must be at least {least}", f"Nearest: {least}.")
        eod, size = self.null_tokenizer_eod_id, self.vocab_size
        if eod is not None and size is not None and eod >= size >= 1:
            rule = f"must lie below vocab_size = {size}"
            yield Problem("null_tokenizer_eod_id", eod, rule, f"Nearest: {size - 1}.")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Everything ``mtk tokenizer train`` needs."""

    input: tuple[str, ...] = option(help="Corpus files or globs, as for mtk preprocess.")
    output: str = option(help="Folder to write.")
    type: Literal["bpe", "wordpiece", "unigram"] = option(
        "bpe", help="Byte-level BPE (GPT-2), WordPiece (BERT) or byte-level unigram (T5)."
    )
    vocab_size: int = option(32_000, help="Number of tokens, specials included.")
    json_keys: tuple[str, ...] = option(("text",), help="Fields of a record to train on.")
    min_frequency: int = option(2, help="Pairs seen less often are not merged (bpe, wordpiece).")
    lowercase: bool = option(True, help="Fold case and accents (wordpiece).")
    eod_token: str = option("<|endoftext|>", help="The token that ends documents (bpe, unigram).")
    text_documents: Literal["file", "blank-line", "line"] = option(
        "file", help="What is one document in a .txt file."
    )
    on_bad_line: Literal["fail", "skip"] = option(
        "fail", help="Stop at a record that cannot be used, or leave it out and count it."
    )

    def problems(self) -> Iterator[Problem]:
        least = {"bpe": 257, "wordpiece": 100, "unigram": 258}[self.type]
        if self.vocab_size < least:
            reason = {
                "bpe": "256 bytes and the end-of-document token",
                "unigram": "256 bytes, the unknown and the end-of-document token",
                "wordpiece": "the specials and an alphabet",
            }[self.type]
            rule = f"must be at least {least}: {reason}"
            yield Problem("vocab_size", self.vocab_size, rule, f"Nearest: {least}.")
        if self.min_frequency < 1:
            yield Problem("min_frequency", self.min_frequency, "must be at least 1")
        if not self.input:
            yield Problem("input", self.input, "names no file")
        if self.output.rstrip("/").rpartition("/")[2] in ("", ".", ".."):
            yield Problem("output", self.output, "must end in the name of a folder")
        if not self.json_keys:
            yield Problem("json_keys", self.json_keys, "names no field")
        if not self.eod_token:
            yield Problem("eod_token", self.eod_token, "must not be empty")
