"""Make a tokenizer from options, or from a folder that a tokenizer was saved in.

The libraries behind the tokenizers are imported only when one of theirs is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtk.artifacts import InputRecord, input_file, open_artifact, verify
from mtk.artifacts.manifest import MARKER
from mtk.config.tokenizer import TokenizerConfig
from mtk.errors import ConfigError, DataError, Problem
from mtk.tokenizers.base import CARRIED, DESCRIPTION, Tokenizer, read_description, read_file

_FILES = ("vocab_file", "merge_file", "tokenizer_model")
_VOCABULARIES = (DESCRIPTION, "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in ``folder``; also a plain Hugging Face folder.

    Every file is checked against what was saved. Raises DataError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder with a tokenizer.")
    if not (folder / DESCRIPTION).is_file():
        from mtk.tokenizers.huggingface import from_folder

        return from_folder(folder)
    description, contents = read_description(folder)
    files = {name: contents[name] for name in description["files"]}
    extra = {name: contents[name] for name in description["extra"]}
    tokenizer = _restore(description["kind"], description["options"], files, extra, folder)
    tokenizer.extra = dict(extra)
    if tokenizer.fingerprint != description["fingerprint"]:
        raise DataError(
            f"{folder}: the tokenizer has the fingerprint {tokenizer.fingerprint[:16]}..., "
            f"{DESCRIPTION} records {str(description['fingerprint'])[:16]}.... Its options were "
            f"edited; restore the folder."
        )
    return tokenizer


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the options describe. Raises DataError or ConfigError."""
    kind, model = config.tokenizer_type, config.tokenizer_model
    if model is not None and (Path(model) / DESCRIPTION).is_file():
        tokenizer = load_tokenizer(model)
        if kind not in (None, tokenizer.kind):
            raise DataError(
                f"{model} holds a {tokenizer.kind}, not a {kind}. Leave --tokenizer-type out, or "
                f"correct --tokenizer-model."
            )
        _refuse_shaping(config)
        return tokenizer
    if kind is None and model is not None and not Path(model).is_dir():
        rule = "must be given with a --tokenizer-model that is not a folder"
        raise ConfigError([Problem("tokenizer.tokenizer_type", None, rule)])
    return _BUILDERS[kind or "HuggingFaceTokenizer"](config)


def tokenizer_inputs(config: TokenizerConfig) -> list[InputRecord]:
    """The files or the artifact that a tokenizer is built from, by digest."""
    records = []
    for name in _FILES:
        value = getattr(config, name)
        if value is None:
            continue
        path = Path(value)
        if path.is_dir() and (path / MARKER).is_file():
            # Of whatever kind: a converted model brings its tokenizer along.
            artifact = open_artifact(path)
            if artifact.kind == "tokenizer":
                verify(artifact)
            records.append(artifact.as_input("tokenizer"))
        elif path.is_dir():
            records += _folder_inputs(path)
        else:
            records.append(input_file(path, name))
            if name == "tokenizer_model" and path.name == "tokenizer.json":
                records += [_member(path.with_name(file)) for file in _there(path.parent, CARRIED)]
    return records


def _folder_inputs(folder: Path) -> list[InputRecord]:
    if not _there(folder, _VOCABULARIES):
        raise DataError(f"{folder} holds no tokenizer: none of {', '.join(_VOCABULARIES)}.")
    files = _there(folder, (*_VOCABULARIES, "merges.txt", *CARRIED))
    return [_member(folder / file) for file in files]


def _member(path: Path) -> InputRecord:
    return input_file(path, f"tokenizer {path.name}")


def _there(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _refuse_shaping(config: TokenizerConfig) -> None:
    """A saved tokenizer is finished; options that would shape it must not be ignored."""
    default = TokenizerConfig()
    problems = [
        Problem(f"tokenizer.{name}", value, "does not change a saved tokenizer", "Leave it out.")
        for name, value in vars(config).items()
        if name not in ("tokenizer_type", "tokenizer_model") and value != getattr(default, name)
    ]
    if problems:
        raise ConfigError(problems)


def _restore(
    kind: str,
    options: Mapping[str, Any],
    files: Mapping[str, bytes],
    extra: Mapping[str, bytes],
    folder: Path,
) -> Tokenizer:
    if kind == "HuggingFaceTokenizer":
        from mtk.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(options, files, extra)
    if kind == "GPT2BPETokenizer":
        from mtk.tokenizers.library import GPT2BPETokenizer

        return GPT2BPETokenizer(files)
    if kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        return _bert(kind, options, files)
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        return _sentencepiece(kind, options, files)
    if kind == "TikTokenizer":
        from mtk.tokenizers.tiktoken_ranks import TikTokenizer

        return TikTokenizer(options, files)
    if kind == "NullTokenizer":
        from mtk.tokenizers.null import NullTokenizer

        return NullTokenizer(dict(options))
    raise DataError(f"{folder / DESCRIPTION} names the unknown kind {kind!r}.")


def _bert(kind: str, options: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    from mtk.tokenizers import library

    cased = kind == "BertWordPieceCase"
    chosen = library.BertWordPieceCase if cased else library.BertWordPieceLowerCase
    return chosen(options, files)


def _sentencepiece(kind: str, options: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    from mtk.tokenizers import sentencepiece_model as module

    if kind == "SentencePieceTokenizer":
        return module.SentencePieceTokenizer(options, files)
    if kind == "Llama2Tokenizer":
        return module.Llama2Tokenizer(options, files)
    return module.GPTSentencePieceTokenizer(options, files)


def _part(config: TokenizerConfig, option: str, file: str) -> bytes:
    """A file given by its own option, or found under its usual name in --tokenizer-model."""
    given = getattr(config, option)
    path = Path(given) if given is not None else Path(config.tokenizer_model or ".") / file
    return read_file(path, option)


def _build_gpt2(config: TokenizerConfig) -> Tokenizer:
    from mtk.tokenizers.library import GPT2BPETokenizer

    vocabulary = _part(config, "vocab_file", "vocab.json")
    return GPT2BPETokenizer(
        {"vocab.json": vocabulary, "merges.txt": _part(config, "merge_file", "merges.txt")}
    )


def _build_bert(config: TokenizerConfig) -> Tokenizer:
    options = {"bert_eod": config.bert_eod, "extra_ids": config.vocab_extra_ids}
    files = {"vocab.txt": _part(config, "vocab_file", "vocab.txt")}
    return _bert(str(config.tokenizer_type), options, files)


def _build_sentencepiece(config: TokenizerConfig) -> Tokenizer:
    options: dict[str, Any] = {"add_bos": config.tokenizer_add_bos}
    if config.tokenizer_type == "SentencePieceTokenizer":
        options |= {
            "legacy": config.tokenizer_sentencepiece_legacy,
            "extra_ids": config.vocab_extra_ids,
            "special_tokens": list(config.tokenizer_special_tokens),
        }
    path = Path(config.tokenizer_model or ".")
    path = path / "tokenizer.model" if path.is_dir() else path
    files = {"tokenizer.model": read_file(path, "tokenizer_model")}
    return _sentencepiece(str(config.tokenizer_type), options, files)


def _build_huggingface(config: TokenizerConfig) -> Tokenizer:
    from mtk.tokenizers.huggingface import from_folder

    path = Path(config.tokenizer_model or ".")
    if path.is_file() and path.name == "tokenizer.json":
        path = path.parent
    if not path.is_dir():
        raise DataError(f"{path} is not a folder with tokenizer.json (names are not looked up).")
    return from_folder(
        path,
        eod_token=config.eod_token,
        include_special_tokens=config.tokenizer_hf_include_special_tokens,
    )


def _build_tiktoken(config: TokenizerConfig) -> Tokenizer:
    from mtk.tokenizers.tiktoken_ranks import MODEL, TikTokenizer, resolve_options

    data = read_file(config.tokenizer_model or ".", "tokenizer_model")
    options = resolve_options(
        data,
        pattern=config.tiktoken_pattern,
        vocab_size=config.vocab_size,
        num_special=config.tiktoken_num_special_tokens,
        special_tokens=config.tokenizer_special_tokens,
        eod=config.eod_token,
    )
    return TikTokenizer(options, {MODEL: data})


def _build_null(config: TokenizerConfig) -> Tokenizer:
    from mtk.tokenizers.null import NullTokenizer

    return NullTokenizer({"vocab_size": config.vocab_size, "eod": config.null_tokenizer_eod_id})


_BUILDERS = {
    "GPT2BPETokenizer": _build_gpt2,
    "BertWordPieceLowerCase": _build_bert,
    "BertWordPieceCase": _build_bert,
    "SentencePieceTokenizer": _build_sentencepiece,
    "GPTSentencePieceTokenizer": _build_sentencepiece,
    "Llama2Tokenizer": _build_sentencepiece,
    "HuggingFaceTokenizer": _build_huggingface,
    "TikTokenizer": _build_tiktoken,
    "NullTokenizer": _build_null,
}
