"""A Megatron checkpoint as a native model: its configuration, and its weights one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from mtk.config.model import ModelConfig
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.megatron.argument_tables import HARMLESS
from mtk.convert.megatron.arguments import COMPARED, READ, model_config
from mtk.convert.megatron.directory import iteration_folder
from mtk.convert.megatron.pieces import Pieces, collect
from mtk.convert.megatron.published import published_arguments
from mtk.convert.megatron.ranks import Ranks, Sizes, open_ranks
from mtk.convert.megatron.rules import megatron_table
from mtk.convert.megatron.spellings import Found, spelled
from mtk.errors import ConfigError, ConversionError, Problem

WORDS = "embedding.word_embeddings.weight"
SEGMENTS = "embedding.tokentype_embeddings.weight"
BERT_HEADS = ("lm_head.", "binary_head.")


@dataclass(frozen=True)
class Given:
    """What a user says about a checkpoint that its files do not.

    args: Megatron's arguments; None takes one back that mtk does not know.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    true_vocab_size: int | None = None

    def added_to(self, stated: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Both together. Raises ConversionError where they contradict each other."""
        merged = dict(stated)
        for name, value in self.args.items():
            if value is None:
                merged.pop(name, None)
                continue
            if stated.get(name) not in (None, value):
                raise ConversionError(
                    f"{where} says {name} = {stated[name]!r:.60}, --megatron-args says "
                    f"{value!r:.60}."
                )
            merged[name] = value
        if self.true_vocab_size is not None:
            merged["true_vocab_size"] = self.true_vocab_size
        return merged


def read_given(args_file: str | None, true_vocab_size: int | None) -> Given:
    """From the options of ``mtk convert``. Raises ConfigError for a file that is no mapping, and
    for names in it that mean nothing."""
    if args_file is None:
        return Given(true_vocab_size=true_vocab_size)
    try:
        args = yaml.safe_load(Path(args_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = Problem("megatron_args", args_file, f"cannot be read: {error}")
        raise ConfigError([problem]) from error
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise ConfigError([Problem("megatron_args", args_file, "must be names and values in YAML")])
    args = {name.replace("-", "_"): value for name, value in args.items()}
    problems = list(_misplaced(args))
    if problems:
        raise ConfigError(problems)
    return Given(args, true_vocab_size)


def _misplaced(args: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that nobody would read, and values of a model that may not be left open."""
    known = COMPARED | HARMLESS
    for name, value in args.items():
        if value is None and name in READ:
            rule = f"{name} is a part of the model and cannot be taken back"
            yield Problem("megatron_args", name, rule, "Give its value, or leave it out.")
        elif value is not None and name not in known:
            close = get_close_matches(name, known, 1)
            fix = f"Nearest: {close[0]}." if close else "Leave it out."
            yield Problem("megatron_args", name, "is no argument that mtk reads", fix)


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint understood. args: what its files state and what was given beside them.

    rows: of the embedding, all ranks together. known: those of the args that neither say, but
    only what is published about the model.
    """

    ranks: Ranks
    args: Mapping[str, Any]
    config: ModelConfig
    rows: int
    pieces: Pieces
    known: Mapping[str, object]

    @property
    def tensors(self) -> Tensors:
        """Whole tensors by Megatron's names, with global numbers of layers."""
        return LazyTensors(self.pieces.held, self.pieces.whole)

    @property
    def native(self) -> Tensors:
        """The weights under native names. Raises ConversionError if they do not fit."""
        copy = self.pieces.output_copy
        return megatron_table(self.config, self.rows, output_copy=copy).as_native(self.tensors)


def open_megatron(path: Path, given: Given | None = None) -> MegatronModel:
    """Open a checkpoint's folder or one iteration's. Reads pickles, not yet tensors.

    Raises ConversionError naming the file and the tensor or argument that does not fit.
    """
    given = given or Given()
    ranks = open_ranks(iteration_folder(path), given.args)
    first = ranks.by_number[0, 0, 0]
    found = [spelled(name, tensor) for name, tensor in first.chunks[0].items()]
    words = [item.tensor.shape for item in found if item.name == WORDS]
    if not words or len(words[0]) != 2:
        raise ConversionError(f"{first.path} has no matrix of word embeddings.")
    rows = words[0][0] * ranks.sizes.tensor
    # Some files hold arguments, but none of the model.
    described = "num_layers" in ranks.args
    shown = {} if described else _shown(found, rows, words[0][1], ranks.sizes)
    where = f"{first.path} (args)"
    # What is published about a model is not in its files: a user may know better.
    known = {n: v for n, v in published_arguments(shown).items() if n not in given.args}
    if given.true_vocab_size is not None:
        known.pop("true_vocab_size", None)
    args = {**known, **given.added_to({**shown, **ranks.args}, where)}
    config = model_config(args, where, rows=rows, segments=_segments(ranks))
    return MegatronModel(ranks, args, config, rows, collect(ranks, config, rows), known)


def _segments(ranks: Ranks) -> int | None:
    """Kinds of segments that the BERT in the files tells apart; None if it is no BERT."""
    first, last = ranks.by_number[0, 0, 0], ranks.by_number[0, ranks.sizes.pipeline - 1, 0]
    chunks = {**first.chunks[0], **last.chunks[-1]}
    shapes = {item.name: item.tensor.shape for item in map(spelled, chunks, chunks.values())}
    if SEGMENTS in shapes:
        return shapes[SEGMENTS][0] if shapes[SEGMENTS] else 0
    return 0 if any(name.startswith(BERT_HEADS) for name in shapes) else None


def _shown(found: list[Found], rows: int, width: int, ranks: Sizes) -> dict[str, int]:
    """The arguments that follow from the weights of a file without any."""
    shapes = {(item.layer, item.name): item.tensor.shape for item in found}
    layers = [item.layer for item in found if item.layer is not None]
    sizes = {"padded_vocab_size": rows, "hidden_size": width}
    if ranks.pipeline == ranks.virtual == 1:
        sizes["num_layers"] = len(set(layers))
    positions = shapes.get((None, "embedding.position_embeddings.weight"))
    inner = shapes.get((0, "mlp.linear_fc1.weight"))
    if positions:
        sizes["max_position_embeddings"] = positions[0]
    if inner:
        sizes["ffn_hidden_size"] = inner[0] * ranks.tensor
    return sizes
