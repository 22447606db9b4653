"""Supervised finetuning on conversations: loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtk.artifacts.hashing import sha256_json
from mtk.config.finetune import FinetuneConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.chat_corpus import ChatCorpus, ChatReader
from mtk.data.chat_dataset import ChatDataset
from mtk.data.chat_template import choose_template
from mtk.data.epochs import ShuffledEpochs
from mtk.errors import DataError
from mtk.log import Reporter
from mtk.tokenizers import Tokenizer
from mtk.training.data import Share, batch_schedule, held_out, target_samples, training_batches
from mtk.training.data import token_bytes as bytes_of_tokens
from mtk.training.job import Job, with_samples
from mtk.training.loop import RunData
from mtk.training.pretrained import Pretrained
from mtk.training.task_data import TaskFiles, named_files

LOOKED_AT = 100  # conversations, for how answers end


def sft_job(
    stage: str, config: FinetuneConfig, core: PretrainConfig, base: Pretrained, reporter: Reporter
) -> Job:
    """Raises ConfigError (template), DataError, and CheckpointError without a tokenizer."""
    tokenizer = base.tokenizer()
    template = choose_template(config.chat.chat_template, tokenizer, base.path)
    if config.chat.chat_template is not None:
        # Whoever asks the finetuned model finds how it was asked in training.
        tokenizer.extra["chat_template.jinja"] = template.source.encode()
    files = TaskFiles.open(
        named_files(config.train_data, "--train-data"),
        named_files(config.valid_data, "--valid-data"),
        tokenizer,
    )
    length, skip = core.model.seq_length, config.chat.on_bad_line == "skip"
    vocab = core.model.vocab_size or tokenizer.vocab_size
    reader = ChatReader(template, tokenizer, length, skip)
    cache = Path(core.data.data_cache_path) if core.data.data_cache_path else None

    def dataset(what: str, paths: Sequence[Path], digests: Sequence[str]) -> ChatDataset:
        corpus = reader.corpus(paths, digests, cache, reporter.info)
        _check_ids(corpus, tokenizer, vocab, base)
        if what == "training":
            _tell_end(corpus, tokenizer, reporter)
        # Tokenizers often have a padding id that was never given a row in the model.
        pad = next(i for i in (tokenizer.pad, tokenizer.eod, 0) if i is not None and i < vocab)
        made = ChatDataset(corpus, length, pad, packing=config.chat.packing)
        reporter.info(
            f"{what}: {corpus.summary}; {len(made)} samples, {made.filled:.0%} of them filled"
        )
        return made

    train = dataset("training", files.train, files.train_digests)
    valid = dataset("held out", files.valid, files.valid_digests) if files.valid else None
    epoch, epochs = len(train), config.length.epochs
    if epochs is not None:
        core = with_samples(core, epochs * epoch)
    samples = target_samples(core)
    ordered = ShuffledEpochs(train, epochs * epoch if epochs else samples, core.runtime.seed)

    def batches(reporter: Reporter, rank: int, size: int) -> RunData:
        del reporter
        share = Share(core.batch.micro_batch_size, rank, size)
        schedule, asked = batch_schedule(core), core.logging.eval_iters
        counted = 0 if valid is None else len(valid)
        shown = min(counted, asked * schedule.full) if asked else counted
        return RunData(
            train=lambda consumed: training_batches(ordered, consumed, samples, schedule.at, share),
            valid=held_out(valid, shown, share) if shown else None,
            test=None,
            train_samples=samples,
            token_bytes_V=bytes_of_tokens(tokenizer, core.model.vocab_size),
            epoch=epoch if epochs else None,
            samples=ordered,
        )

    identity = sha256_json([files.train_digests, reader.identity, config.chat.packing])
    return Job(stage, config, core, samples, files, identity, batches, base, "-loss")


def _tell_end(corpus: ChatCorpus, tokenizer: Tokenizer, reporter: Reporter) -> None:
    """Warn where answers end with no token that generation stops at."""
    last = corpus.ends(LOOKED_AT)
    if not last & {tokenizer.eod, tokenizer.eos}:
        ends = ", ".join(repr(tokenizer.piece(token)) for token in sorted(last)[:3])
        reporter.warn(
            f"answers end with {ends}, not with the tokenizer's end of text "
            f"{tokenizer.piece(tokenizer.eod)!r}: whoever generates must be told to stop "
            f"there. --chat-template plain ends answers with the end of text"
        )


def _check_ids(corpus: ChatCorpus, tokenizer: Tokenizer, vocab_size: int, base: Pretrained) -> None:
    """Raises DataError for ids that the model has no row for."""
    highest = int(corpus.ids_T.max())
    if highest >= vocab_size:
        raise DataError(
            f"the conversations hold id {highest} ({tokenizer.piece(highest)!r}), but the model in "
            f"{base.path} has {vocab_size} ids: its tokenizer was given tokens that the model was "
            f"not. Use a --chat-template that does without them, or enlarge the model's embedding."
        )
