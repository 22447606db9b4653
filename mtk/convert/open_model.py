"""One way to open any model on disk, for every stage that runs one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mtk.artifacts import Artifact
from mtk.checkpoint import read_model_config
from mtk.checkpoint.load import copy_into, empty_model
from mtk.config.model import ModelConfig
from mtk.convert.adapters import has_adapters, merge
from mtk.convert.hf_directory import read_hf_model
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import check_complete
from mtk.convert.source import Source, SourceKind, find_source
from mtk.errors import ArtifactError, ConfigError, ConversionError, Problem
from mtk.models.buffers import kept_tensors
from mtk.models.gpt import GPT
from mtk.quantization.directory import dequantized
from mtk.quantization.loading import load_quantized
from mtk.tokenizers import Tokenizer, load_tokenizer

# What libraries without ``tokenizer.json`` leave beside weights.
SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode with what belongs to it.

    artifact: None for a directory that mtk did not write.
    """

    model: GPT
    config: ModelConfig
    kind: SourceKind
    folder: Path
    artifact: Artifact | None

    @property
    def tokenizer_folder(self) -> Path:
        """A native checkpoint keeps its tokenizer in a folder, the others beside the weights."""
        return tokenizer_folder(self.kind, self.folder)

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self.tokenizer_folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use. Raises ArtifactError if the model has none."""
        return _read_tokenizer(self.kind, self.folder)

    def require_generator(self, option: str, found: object) -> None:
        """Raises ConfigError, of ``option`` = ``found``, for a BERT: it writes no text."""
        if self.config.family == "bert":
            self.require_decoder(option, found)

    def require_decoder(self, option: str, found: object) -> None:
        """Raises ConfigError, of ``option`` = ``found``, for a BERT or a T5."""
        if self.config.family != "gpt":
            kind = self.config.family.upper()
            rule = f"needs a model that predicts the next token; {self.folder} is a {kind}"
            raise ConfigError([Problem(option, found, rule)])


def open_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> OpenedModel:
    """A native checkpoint, a Hugging Face directory of a known family or a quantised one.

    Quantised weights are expanded to ``dtype``, or with ``packed`` stay in their own bits
    (:class:`mtk.quantization.linear.QuantizedLinear`). Raises ArtifactError, CheckpointError or
    ConversionError, saying what the directory holds instead.
    """
    return open_source(find_source(path), dtype=dtype, device=device, packed=packed)


def open_source(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> OpenedModel:
    """As :func:`open_model`, for a path already looked into."""
    if packed and source.kind == "quantized":
        model, config = load_quantized(source.folder, dtype=dtype, device=device)
        return OpenedModel(model, config, source.kind, source.folder, source.artifact)
    config, tensors = read_native(source)
    model = assemble(config, tensors, source.folder, dtype=dtype, device=device)
    return OpenedModel(model, config, source.kind, source.folder, source.artifact)


def read_native(source: Source) -> tuple[ModelConfig, Tensors]:
    """Configuration and weights (lazy) in native form, wherever they come from; adapters are
    merged into the model they stand beside."""
    if source.kind == "native" and has_adapters(source.folder):
        return merge(source, read_native)
    if source.kind == "native":
        return read_model_config(source.folder), source.native_tensors()
    if source.kind == "megatron":
        raise ConversionError(
            f"{source.folder} is a checkpoint of Megatron; make it one of mtk first: mtk convert "
            f"--load {source.folder} --to native --save DIR."
        )
    stored = dequantized(source.folder) if source.kind == "quantized" else None
    found = read_hf_model(source.folder, stored)
    return found.config, found.native


def assemble(
    config: ModelConfig,
    tensors: Tensors,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GPT:
    """The module in eval mode, filled strictly from ``tensors``. Raises ConversionError."""
    model = empty_model(config, dtype=dtype, device=device)
    parameters = kept_tensors(model)
    check_complete(tensors, parameters, f"model in {folder}")
    for name, parameter in parameters.items():
        copy_into(parameter, tensors[name], name, folder)
    return model.eval()


def open_tokenizer(source: Source) -> Tokenizer:
    """A model's tokenizer without the model. Raises ArtifactError if it has none."""
    return _read_tokenizer(source.kind, source.folder)


def _read_tokenizer(kind: SourceKind, folder: Path) -> Tokenizer:
    found = tokenizer_folder(kind, folder)
    if not has_tokenizer(found):
        raise ArtifactError(
            f"{folder} has no tokenizer: it was trained on ids alone, or its tokenizer "
            f"files were left out. Text cannot be used with it."
        )
    return load_tokenizer(found)


def tokenizer_folder(kind: SourceKind, folder: Path) -> Path:
    return folder / "tokenizer" if kind == "native" else folder


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("mtk_tokenizer.json", "tokenizer.json"))


def unread_tokenizer(folder: Path) -> list[str]:
    """Files of a tokenizer that has no ``tokenizer.json``: nothing here reads them."""
    if has_tokenizer(folder):
        return []
    return [name for name in SLOW_TOKENIZERS if (folder / name).is_file()]
