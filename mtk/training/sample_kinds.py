"""From the configuration of a run to how its samples are made."""

from __future__ import annotations

from mtk.config.pretrain import PretrainConfig
from mtk.data.gpt_samples import GPTSamples
from mtk.data.mock_sentences import mock_vocabulary
from mtk.data.sample_kind import SampleKind
from mtk.data.sentence_dataset import SentenceRules
from mtk.data.sentence_samples import SentenceSamples
from mtk.data.token_source import Notify, ignore
from mtk.data.word_vocabulary import WordVocabulary, word_vocabulary
from mtk.errors import ConfigError, Problem
from mtk.tokenizers import load_tokenizer
from mtk.training.opened_data import OpenedData


def sample_kind(config: PretrainConfig, data: OpenedData, notify: Notify = ignore) -> SampleKind:
    """How samples of the model's family are made. Raises ConfigError where the data's tokenizer
    lacks what they need."""
    model, seed = config.model, config.runtime.seed
    if model.family == "gpt":
        return GPTSamples(config.data, model.seq_length, seed, model.vocab_size, data.eod)
    vocabulary, tokenizer = _vocabulary(config, data)
    rules = SentenceRules(
        model.seq_length,
        model.decoder_seq_length,
        config.data.mask_prob,
        config.data.short_seq_prob,
        pairs=model.bert_binary_head,
    )
    return SentenceSamples(config.data, model.family, rules, seed, vocabulary, tokenizer, notify)


def _vocabulary(config: PretrainConfig, data: OpenedData) -> tuple[WordVocabulary, str]:
    """Special ids and pieces, and what to call their tokenizer."""
    if config.data.mock_data:
        if config.model.vocab_size is None:
            rule = "must be given with --mock-data"
            raise ConfigError([Problem("model.vocab_size", None, rule)])
        return mock_vocabulary(config.model.vocab_size), "mock data"
    if data.tokenizer_folder is None:
        names = ", ".join(str(dataset.prefix) for dataset in data.datasets)
        rule = (
            f"masks words, for which the tokenizer of {names} must be known: no manifest names it"
        )
        fix = "Preprocess the corpus with mtk preprocess --split-sentences."
        raise ConfigError([Problem("model.family", config.model.family, rule, fix)])
    tokenizer = load_tokenizer(data.tokenizer_folder)
    return word_vocabulary(tokenizer), f"the data's {tokenizer.kind}"
