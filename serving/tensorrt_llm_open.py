"""From a Hugging Face or ModelOpt directory to an engine of TensorRT-LLM.

Version 1.x loads such directories itself, on PyTorch; nothing is built beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mtk.artifacts import Artifact
from mtk.config.serve import ServeConfig
from mtk.config.serve_engines import DTYPES
from mtk.convert.hf_directory import read_hf_config
from mtk.convert.open_model import has_tokenizer
from mtk.convert.source import Source, find_source
from mtk.errors import ArtifactError, ConfigError, Problem
from mtk.tokenizers import Tokenizer, load_tokenizer
from serving.tensorrt_llm_engine import TensorRTEngine

PACKAGE = "tensorrt_llm"
INSTALL = (
    "pip install tensorrt-llm (it needs Linux, an NVIDIA GPU and NVIDIA's own index; its "
    "installation page says which), or --engine torch"
)
# Formats of compressed-tensors that it reads; of modelopt it reads what its own quantizer writes.
COMPRESSED = ("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class OpenedEngine:
    engine: TensorRTEngine
    artifact: Artifact | None


def require_package() -> ModuleType:
    """Raises ConfigError with the line that installs it."""
    if importlib.util.find_spec(PACKAGE) is None:
        rule = "the package tensorrt_llm is not installed"
        raise ConfigError([Problem("engine", "tensorrt-llm", rule, f"Do {INSTALL}.")])
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:  # a library of CUDA or MPI that it loads itself
        rule = f"tensorrt_llm is installed and cannot be imported ({error})"
        raise ConfigError([Problem("engine", "tensorrt-llm", rule, f"Do {INSTALL}.")]) from error


def open_tensorrt(config: ServeConfig, report: Callable[[str], None]) -> OpenedEngine:
    """The model behind its engine.

    Raises ConfigError (package, lengths), ArtifactError (a directory that the package cannot
    load, or that has no tokenizer).
    """
    package = require_package()
    source = find_source(config.load)
    check_source(source)
    found = read_hf_config(source.folder)
    text: Mapping[str, Any] = found.get("text_config") or found
    context = context_of(config.limits.max_seq_length, text)
    llm = _load(package, source.folder, config, context)
    engine = TensorRTEngine(
        llm,
        package.SamplingParams,
        _tokenizer(source.folder),
        vocab_size=int(text["vocab_size"]),
        context=context,
        max_batch_size=config.limits.max_batch_size,
        max_queue=config.limits.max_queue,
        report=report,
    )
    return OpenedEngine(engine, source.artifact)


def check_source(source: Source) -> None:
    """Raises ArtifactError for directories that TensorRT-LLM does not load, saying how to get
    one that it does."""
    if source.kind in ("native", "megatron"):
        raise ArtifactError(
            f"{source.folder} is a checkpoint ({source.kind}), and TensorRT-LLM loads Hugging Face "
            f"directories: mtk convert --load {source.folder} --to hf --save DIR."
        )
    if not has_tokenizer(source.folder):
        raise ArtifactError(f"{source.folder} has no tokenizer.json; text cannot be used with it.")
    if read_hf_config(source.folder).get("is_encoder_decoder"):
        raise ArtifactError(
            f"{source.folder} has an encoder, and this engine continues prompts: --engine torch."
        )
    if source.kind == "quantized" and not (source.folder / "hf_quant_config.json").is_file():
        inline = read_hf_config(source.folder).get("quantization_config") or {}
        method, kind = inline.get("quant_method"), inline.get("format")
        if method == "compressed-tensors" and kind not in COMPRESSED:
            raise ArtifactError(
                f"{source.folder} is quantized as compressed-tensors {kind}, of which TensorRT-LLM "
                f"loads {', '.join(COMPRESSED)} only: mtk quantize --dialect modelopt."
            )


def context_of(asked: int | None, config: Mapping[str, Any]) -> int:
    """Most tokens of a sequence: what was asked for within what ``config.json`` has positions
    for. Raises ConfigError."""
    stated = next((int(config[name]) for name in POSITIONS if config.get(name)), None)
    if stated is None and asked is None:
        rule = "config.json says nothing of positions"
        raise ConfigError([Problem("limits.max_seq_length", None, rule, "Give --max-seq-length.")])
    if stated is not None and asked is not None and asked > stated:
        rule, fix = f"the model has {stated} positions", f"Nearest: {stated}."
        raise ConfigError([Problem("limits.max_seq_length", asked, rule, fix)])
    return asked or stated or 0


def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _load(package: ModuleType, folder: Path, config: ServeConfig, context: int) -> Any:
    options = config.tensorrt
    llmapi = importlib.import_module(f"{PACKAGE}.llmapi")
    cache: dict[str, Any] = {"free_gpu_memory_fraction": options.kv_cache_fraction}
    if options.kv_cache_dtype != "auto":
        cache["dtype"] = options.kv_cache_dtype
    try:
        return package.LLM(
            model=str(folder),
            # Ids go in and out: text is the server's own.
            skip_tokenizer_init=True,
            trust_remote_code=False,
            tensor_parallel_size=options.tensor_parallel_size,
            dtype=DTYPES[config.dtype],
            max_batch_size=config.limits.max_batch_size,
            max_seq_len=context,
            kv_cache_config=llmapi.KvCacheConfig(**cache),
        )
    except Exception as error:  # of whatever kind its loading raises
        raise ArtifactError(
            f"TensorRT-LLM did not load {folder}: {type(error).__name__}: {error}"
        ) from error
