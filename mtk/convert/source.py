"""What a path to a model is: a native checkpoint, a directory of Hugging Face (maybe quantised)
or of Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtk.artifacts import Artifact, InputRecord, find_marker, input_file, open_artifact
from mtk.artifacts.hashing import sha256_json
from mtk.artifacts.manifest import MARKER
from mtk.checkpoint import checkpoint_folder, read_tensors
from mtk.checkpoint.tensors import read_index
from mtk.convert.hf_directory import CONFIG, INDEX, PICKLES, read_hf_config
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.megatron.directory import TRACKER, input_files, is_megatron
from mtk.errors import ArtifactError

SourceKind = Literal["native", "hf", "quantized", "megatron"]
# A quantize artifact in both dialects holds one directory for each; they are the same model.
DIALECT_FOLDERS = ("modelopt", "compressed-tensors")


@dataclass(frozen=True)
class Source:
    """A model on disk. folder: where its files lie. artifact: None for a foreign directory."""

    kind: SourceKind
    folder: Path
    artifact: Artifact | None

    def inputs(self, role: str = "model") -> list[InputRecord]:
        """For the manifest of what is made from it: the artifact, or every file."""
        if self.artifact is not None:
            return [self.artifact.as_input(role)]
        if self.kind == "megatron":
            return [input_file(path, role) for path in input_files(self.folder)]
        files = [self.folder / CONFIG, *sorted(self.folder.glob("*.safetensors"))]
        others = ("tokenizer*", "vocab.*", "merges.txt", INDEX, "hf_quant_config.json")
        for pattern in others:
            files += sorted(self.folder.glob(pattern))
        return [input_file(path, role) for path in files if path.is_file()]

    def native_tensors(self) -> Tensors:
        """The weights of a native checkpoint, each read when asked for."""
        if self.kind != "native":
            raise ValueError(f"{self.folder} is not a native checkpoint")
        names = read_index(self.folder, "model")
        return LazyTensors(names, lambda n: read_tensors(self.folder, "model", [n])[n])


def digest_of(records: Sequence[InputRecord]) -> str:
    """One digest for a model that is one artifact, or some files."""
    return records[0].digest if len(records) == 1 else sha256_json([r.digest for r in records])


def find_source(path: str | Path) -> Source:
    """Detect what ``path`` holds. Raises ArtifactError (or a kind of it) with what was found."""
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist. Check the path.")
    for name in DIALECT_FOLDERS:
        if (path / MARKER).is_file() and (path / name / CONFIG).is_file():
            artifact = open_artifact(path, "quantized_model")
            return Source("quantized", path / name, artifact)
    if (path / CONFIG).is_file():
        foreign = read_hf_config(path)
        quantized = "quantization_config" in foreign or (path / "hf_quant_config.json").is_file()
        return Source("quantized" if quantized else "hf", path, _artifact_of(path))
    if (path / "model.json").is_file() or any(path.glob("step_*")):
        folder = checkpoint_folder(path)
        return Source("native", folder, open_artifact(folder, "checkpoint"))
    if is_megatron(path):
        made = open_artifact(path, "megatron_model") if (path / MARKER).is_file() else None
        return Source("megatron", path, made)
    whole = next((above for above in path.parents[:2] if is_megatron(above)), None)
    if whole is not None:
        raise ArtifactError(f"{path} is a part of a Megatron checkpoint; take all of it: {whole}.")
    pickles = [p.name for pattern in PICKLES for p in sorted(path.glob(pattern))][:3]
    found = f"only pickles ({', '.join(pickles)}), which mtk never loads" if pickles else "none"
    raise ArtifactError(
        f"{path} is no model: neither a native checkpoint (model.json, step_*) nor a directory "
        f"of Hugging Face ({CONFIG}) or Megatron ({TRACKER}); weights found: {found}."
    )


def _artifact_of(folder: Path) -> Artifact | None:
    """The artifact a Hugging Face directory is, or is a dialect of; None for a foreign one."""
    if (folder / MARKER).is_file():
        return open_artifact(folder, "hf_model", "quantized_model")
    marker = find_marker(folder.parent) if folder.name in DIALECT_FOLDERS else None
    return open_artifact(folder.parent, "quantized_model") if marker else None
