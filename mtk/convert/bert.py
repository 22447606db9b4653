"""BERT in the layouts of transformers: ``bert`` (norms last, Devlin et al. 2019) and
``megatron-bert`` (norms first, Shoeybi et al. 2019), with the heads of pretraining or of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtk.config.heads import TASKS
from mtk.config.model import ModelConfig
from mtk.convert.family import (
    Family,
    ForeignConfig,
    first_architecture,
    linear,
    training_length,
)
from mtk.convert.gpt2 import ACTIVATIONS, SPELLINGS
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.mapping import CutRows, Rename, Rule, TiedCopy, WeightTable, for_layers
from mtk.convert.probe import SEGMENTS

PREFIX = {"post": "Bert", "pre": "MegatronBert"}
TYPES = {"post": "bert", "pre": "megatron-bert"}
CLASSES = ("ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice")
PRETRAINING, MASKED, LABELLING, CHOOSING = CLASSES
OF_NORMS = {"gamma": "weight", "beta": "bias"}


def reasons(placement: str) -> Callable[[ModelConfig], list[str]]:
    def found(config: ModelConfig) -> list[str]:
        name = TYPES[placement]
        if config.family != "bert":
            return [f"family = {config.family}: {name} is an encoder"]
        listed = []
        if config.norm_placement != placement:
            listed.append(f"norm_placement = {config.norm_placement}: {name} has {placement}")
        if config.activation not in ACTIVATIONS:
            listed.append(f"activation = {config.activation}: {name}'s MLP has no gate")
        if config.task_head is None and config.head_activation != config.activation:
            listed.append(
                f"bert_head_activation = {config.head_activation} with activation = "
                f"{config.activation}: {name} has one for both. Of Megatron's BERT, transformers "
                f"computes exact gelu in the MLPs too: to have that, convert Megatron's files with "
                f"bias_gelu_fusion: false in --megatron-args"
            )
        if config.query_groups != config.num_attention_heads:
            groups = config.query_groups
            listed.append(f"num_query_groups = {groups}: {name} has as many as query heads")
        if config.head_size * config.num_attention_heads != config.hidden_size:
            listed.append(f"kv_channels = {config.head_size}: {name}'s heads fill the hidden size")
        return listed

    return found


def class_of(config: ModelConfig) -> str:
    """What the class in transformers is called after its prefix."""
    if config.task_head is None:
        return PRETRAINING if config.bert_binary_head else MASKED
    return CHOOSING if TASKS[config.task_head].choices > 1 else LABELLING


def _labels(config: ModelConfig) -> dict[str, Any]:
    labels = () if config.task_head is None else TASKS[config.task_head].labels
    if not labels:
        return {}
    numbered = list(enumerate(labels))
    return {
        "id2label": {str(number): label for number, label in numbered},
        "label2id": {label: number for number, label in numbered},
    }


def _task(found: ForeignConfig, kind: str) -> str | None:
    """The task whose head a class ``kind`` has: told by its labels, in their order."""
    if kind == CHOOSING:
        return "RACE"
    if kind != LABELLING:
        return None
    given = found.data.get("id2label")
    given = given if isinstance(given, dict) else {"0": "LABEL_0", "1": "LABEL_1"}
    for task in TASKS.values():
        if task.labels and given == {str(k): label for k, label in enumerate(task.labels)}:
            return task.name
    known = "; ".join(f"{t.name}: {', '.join(t.labels)}" for t in TASKS.values() if t.labels)
    found.complaints.append(f"id2label = {given}: labels of no task that mtk has ({known})")
    return None


def to_config(placement: str) -> Callable[[ModelConfig], dict[str, Any]]:
    def written(config: ModelConfig) -> dict[str, Any]:
        return {
            "model_type": TYPES[placement],
            "architectures": [PREFIX[placement] + class_of(config)],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_size,
            "hidden_act": ACTIVATIONS[config.activation],
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "max_position_embeddings": config.positions,
            "type_vocab_size": config.num_tokentypes,
            "initializer_range": config.init_method_std,
            "layer_norm_eps": config.norm_epsilon,
            "tie_word_embeddings": True,
            **_labels(config),
            **training_length(config),
        }

    return written


def from_config(placement: str) -> Callable[[ForeignConfig], ModelConfig]:
    def read(found: ForeignConfig) -> ModelConfig:
        found.require("position_embedding_type", ("absolute", None), "only absolute is supported")
        found.require("tie_word_embeddings", (True, None), "an output matrix of its own")
        for key in ("is_decoder", "add_cross_attention"):
            found.require(key, (False, None), "is not supported")
        names = {foreign: native for native, foreign in ACTIVATIONS.items()} | SPELLINGS
        found.require("hidden_act", tuple(names), f"supported are {', '.join(names)}")
        classes = {PREFIX[placement] + kind: kind for kind in CLASSES}
        architecture = first_architecture(found.data)
        if architecture not in classes:
            found.complaints.append(f"architecture {architecture}: supported are {list(classes)}")
        kind = classes.get(architecture or "", PRETRAINING)
        positions = found.get("max_position_embeddings", int, 512)
        return found.model(
            family="bert",
            norm_placement=placement,
            bert_binary_head=kind == PRETRAINING,
            task_head=_task(found, kind),
            num_layers=found.get("num_hidden_layers", int),
            hidden_size=found.get("hidden_size", int),
            num_attention_heads=found.get("num_attention_heads", int),
            ffn_hidden_size=found.get("intermediate_size", int),
            seq_length=found.training_length(positions),
            max_position_embeddings=positions,
            num_tokentypes=found.get("type_vocab_size", int, 2),
            norm_epsilon=found.get("layer_norm_eps", float, 1e-12),
            activation=names.get(found.get("hidden_act", str, "gelu"), "gelu"),
            hidden_dropout=found.get("hidden_dropout_prob", float, 0.1),
            attention_dropout=found.get("attention_probs_dropout_prob", float, 0.1),
            init_method_std=found.get("initializer_range", float, 0.02),
            vocab_size=found.get("vocab_size", int),
        )

    return read


def weights(placement: str) -> Callable[[ModelConfig], WeightTable]:
    """One line a weight; the placements differ in names and in which norms there are."""

    def table(config: ModelConfig) -> WeightTable:
        vocab, padded = config.vocab_size or 0, config.padded_vocab_size
        n, h = "layers.{i}", "bert.encoder.layer.{i}"
        post = placement == "post"
        attention_norm = f"{h}.attention.output.LayerNorm" if post else f"{h}.attention.ln"
        mlp_norm = f"{h}.output.LayerNorm" if post else f"{h}.ln"
        e, p = "bert.embeddings", "cls.predictions"
        rules: list[Rule] = [
            CutRows("embedding.tokens.weight", f"{e}.word_embeddings.weight", vocab, padded),
            Rename("embedding.positions.weight", f"{e}.position_embeddings.weight"),
            Rename("embedding.types.weight", f"{e}.token_type_embeddings.weight"),
            *for_layers(
                config.num_layers,
                [
                    *linear(f"{n}.attention_norm", attention_norm, bias=True),
                    *linear(f"{n}.attention.query", f"{h}.attention.self.query", bias=True),
                    *linear(f"{n}.attention.key", f"{h}.attention.self.key", bias=True),
                    *linear(f"{n}.attention.value", f"{h}.attention.self.value", bias=True),
                    *linear(f"{n}.attention.output", f"{h}.attention.output.dense", bias=True),
                    *linear(f"{n}.mlp_norm", mlp_norm, bias=True),
                    *linear(f"{n}.mlp.up", f"{h}.intermediate.dense", bias=True),
                    *linear(f"{n}.mlp.down", f"{h}.output.dense", bias=True),
                ],
            ),
        ]
        copies: tuple[TiedCopy, ...] = ()
        if post:
            rules += linear("embedding.norm", f"{e}.LayerNorm", bias=True)
        else:
            rules += linear("final_norm", "bert.encoder.ln", bias=True)
        if config.bert_binary_head or config.task_head is not None:
            rules += linear("pooler.dense", "bert.pooler.dense", bias=True)
        if config.bert_binary_head:
            rules += linear("order", "cls.seq_relationship", bias=True)
        if config.task_head is not None:
            rules += linear("classifier.dense", "classifier", bias=True)
        else:
            rules += linear("transform.dense", f"{p}.transform.dense", bias=True)
            rules += linear("transform.norm", f"{p}.transform.LayerNorm", bias=True)
            rules.append(CutRows("output_bias", f"{p}.bias", vocab, padded))
            copies = (
                TiedCopy(f"{p}.decoder.weight", f"{e}.word_embeddings.weight"),
                TiedCopy(f"{p}.decoder.bias", f"{p}.bias"),
            )
        return WeightTable(tuple(rules), copies, frozenset(_ignored(config)))

    return table


def spelling(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Weights and biases of norms, also for the published files that call them gamma and beta,
    as TensorFlow does."""
    del config
    places = {}
    for name in tensors:
        stem, _, kind = name.rpartition("LayerNorm.")
        new = f"{stem}LayerNorm.{OF_NORMS[kind]}" if kind in OF_NORMS else name
        # Where both are there, the old name is left over.
        places[name if new in tensors else new] = name
    return LazyTensors(places, lambda name: tensors[places[name]])


def amended(placement: str) -> Callable[[dict[str, Any], Tensors], dict[str, Any]]:
    """Published files for ``ForMaskedLM`` hold the whole model of pretraining: finetuning wants
    its pooler."""
    heads = ("bert.pooler.dense.weight", "cls.seq_relationship.weight")

    def seen(foreign: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
        masked = first_architecture(foreign) == PREFIX[placement] + MASKED
        if not masked or any(name not in tensors for name in heads):
            return foreign
        return foreign | {"architectures": [PREFIX[placement] + PRETRAINING]}

    return seen


def _ignored(config: ModelConfig) -> set[str]:
    """A table of positions that old files have; one of two heads, which ``ForMaskedLM`` does not
    load."""
    names = {"bert.embeddings.position_ids"}
    if class_of(config) == MASKED:
        for module in ("bert.pooler.dense", "cls.seq_relationship"):
            names |= {f"{module}.weight", f"{module}.bias"}
    return names


def _family(placement: str) -> Family:
    return Family(
        model_type=TYPES[placement],
        architecture=PREFIX[placement] + "ForPreTraining",
        blocks="bert.encoder.layer",
        prefix="bert.",
        reasons=reasons(placement),
        to_config=to_config(placement),
        from_config=from_config(placement),
        weights=weights(placement),
        probe=SEGMENTS,
        spelling=spelling,
        amended=amended(placement),
        classes=tuple(PREFIX[placement] + kind for kind in CLASSES[1:]),
    )


BERT, MEGATRON_BERT = _family("post"), _family("pre")
