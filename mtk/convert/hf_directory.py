"""Hugging Face model directories: strict, path-safe reading and streaming writing.

Only safetensors and JSON are read; nothing in a directory is ever executed. Written
directories load with ``AutoModelForCausalLM``, ``AutoTokenizer`` and ``pipeline``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.families import family_of
from mtk.convert.family import Family, ForeignConfig, own_keys
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.errors import ConversionError
from mtk.models.build import build_on_meta

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
START = "decoder_start_token_id"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class HfModel:
    """A directory understood: its family, both configurations (the foreign one under the
    family's own keys), and its tensors (lazy)."""

    folder: Path
    family: Family
    config: ModelConfig
    foreign_config: Mapping[str, Any]
    tensors: Tensors

    @property
    def native(self) -> Tensors:
        """The weights under native names. Raises ConversionError if they do not fit."""
        table = self.family.weights(self.config)
        made = table.as_native(self.tensors, f"files in {self.folder}")
        sources = {name: rule.foreigns for rule in table.rules for name in rule.natives}
        module = build_on_meta(self.config)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}

        def read(name: str) -> Tensor:
            try:
                tensor = made[name]
            except (ConversionError, RuntimeError) as error:
                files = ", ".join(sources[name])
                raise ConversionError(f"{self.folder}: {files} cannot be read: {error}") from error
            if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
                raise ConversionError(
                    f"{self.folder}: {', '.join(sources[name])} makes {name} of shape "
                    f"{list(tensor.shape)}, config.json asks for {list(shapes[name])}."
                )
            return tensor

        return LazyTensors(made, read)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it is. Raises ConversionError if unreadable or asking for code."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise ConversionError(f"{path} is not a JSON object.")
    if "auto_map" in data:
        raise ConversionError(
            f"{path} has an auto_map: this model needs code of its own, which mtk never runs."
        )
    return data


def read_hf_model(folder: Path, tensors: Tensors | None = None) -> HfModel:
    """Open a directory; ``tensors`` replaces its files (dequantised weights).

    Raises ConversionError for a family or settings mtk has no model for.
    """
    foreign = read_hf_config(folder)
    where = str(folder / CONFIG)
    family = family_of(foreign.get("model_type"), where)
    stored = _with_prefix(read_weights(folder) if tensors is None else tensors, family)
    foreign = family.amended(own_keys(foreign, family.aliases, where), stored)
    config = family.from_config(ForeignConfig(foreign, where))
    named = family.spelling(stored, config)
    return HfModel(folder, family, config, foreign, named)


def _with_prefix(tensors: Tensors, family: Family) -> Tensors:
    """Names as ``ForCausalLM`` classes save them; base classes leave out the prefix."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    full = {
        name if name.startswith(family.outside) else family.prefix + name: name for name in tensors
    }
    return LazyTensors(full, lambda name: tensors[full[name]])


def read_weights(folder: Path) -> Tensors:
    """All tensors of ``model.safetensors`` or of the shards its index names.

    Raises ConversionError for missing or damaged files, names that point outside the
    folder, an index that disagrees with the files, and one beside a whole file.
    """
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise ConversionError(
            f"{folder} holds both {WEIGHTS} and {INDEX}: two sets of weights, of which readers "
            f"take the first or the second. Move the one that is not meant away."
        )
    if (folder / INDEX).is_file():
        files = _read_index(folder)
    elif (folder / WEIGHTS).is_file():
        files = dict.fromkeys(_keys(folder / WEIGHTS), WEIGHTS)
    else:
        raise ConversionError(_no_weights(folder))
    return LazyTensors(files, lambda name: _read_tensor(folder / files[name], name))


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds weights only as pickles ({', '.join(pickles[:3])}), which can run "
            f"code when loaded, so mtk does not read them. Save the model again with "
            f"save_pretrained(..., safe_serialization=True)."
        )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}."


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is not a readable index: {error!r}.") from error
    for name, file in entries.items():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise ConversionError(f"{path}: {name} points outside the folder ({file!r}).")
        if not file.endswith(".safetensors"):
            raise ConversionError(f"{path}: {name} lies in {file}, which is not safetensors.")
    for file in sorted(set(entries.values())):
        listed = {name for name, place in entries.items() if place == file}
        stored = set(_keys(folder / file))
        if listed != stored:
            odd = sorted(listed ^ stored)[:5]
            raise ConversionError(f"{path} and {file} disagree about {odd} (first five).")
    return entries


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            return list(stream.keys())
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read: {error}.") from error


def _read_tensor(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            return stream.get_tensor(name)  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: {name} cannot be read: {error}.") from error


def write_hf_directory(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    tokens: Mapping[str, int | None],
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write configuration and weights; at most one shard is in memory.

    config: the model's part of ``config.json``. tokens: ``bos_token_id`` etc., also
    ``decoder_start_token_id`` for models whose ``config`` has that key without a value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, tokens = _with_start(config, tokens)
    dtype = write_weights(folder, tensors, max_shard_size)
    known = {key: value for key, value in tokens.items() if value is not None}
    special = {f"{name}_token_id": known.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_json(folder / CONFIG, {**config, **special, "dtype": dtype})
    write_json(folder / "generation_config.json", known)


def _with_start(
    config: Mapping[str, Any], tokens: Mapping[str, int | None]
) -> tuple[Mapping[str, Any], dict[str, int | None]]:
    """Both with what a decoder begins with, if the model has such a thing: its own, else the
    tokenizer's, else 0 as in the published ones."""
    others = {key: value for key, value in tokens.items() if key != START}
    if START not in config:
        return config, others
    stated = [start for start in (config[START], tokens.get(START), 0) if start is not None]
    return {**config, START: stated[0]}, {**others, START: stated[0]}


def write_weights(folder: Path, tensors: Tensors, max_shard_size: int) -> str:
    """One file, or numbered shards with an index. Returns the name of the largest part's
    floating-point dtype, as ``config.json`` states it."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total, parameters = 0, 0
    dtypes: dict[str, int] = {}

    def flush() -> None:
        file = folder / f"part-{len(shards):05}.safetensors"
        save_file(pending, file, metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name in tensors:
        tensor = tensors[name].contiguous()
        size = tensor.numel() * tensor.element_size()
        held = sum(part.numel() * part.element_size() for part in pending.values())
        if pending and held + size > max_shard_size:
            flush()
        pending[name] = tensor
        total, parameters = total + size, parameters + tensor.numel()
        # Weights in FP8 are quantised; the type is that of all else.
        wide = tensor.is_floating_point() and tensor.element_size() > 1
        if wide and not name.endswith("_scale"):
            key = str(tensor.dtype).removeprefix("torch.")
            dtypes[key] = dtypes.get(key, 0) + tensor.numel()
    flush()
    _name_shards(folder, shards, {"total_size": total, "total_parameters": parameters})
    return max(dtypes, key=lambda key: dtypes[key], default="float32")


def _name_shards(folder: Path, shards: list[list[str]], metadata: Mapping[str, int]) -> None:
    """Give shards their final names, which contain how many there are."""
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        file = WEIGHTS if len(shards) == 1 else file
        (folder / f"part-{number:05}.safetensors").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
