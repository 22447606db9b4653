"""The ranks of a checkpoint: which file is which, what each holds, and that they agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.convert.megatron.arguments import COMPARED
from mtk.convert.megatron.directory import RankFile, rank_files
from mtk.convert.megatron.pickles import Arguments, StoredTensor
from mtk.convert.megatron.spellings import flatten, refuse_other_models
from mtk.convert.megatron.torch_file import TorchFile, open_torch_file
from mtk.errors import ConversionError

VERSIONS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Sizes:
    """Degrees of the layout that wrote a checkpoint. virtual: model chunks of a stage."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual: int = 1

    @property
    def chunks(self) -> Iterator[tuple[int, int]]:
        """(virtual stage, stage) in the order of the layers."""
        return itertools.product(range(self.virtual), range(self.pipeline))


@dataclass(frozen=True)
class Rank:
    """One file. chunks: raw names to tensors not read yet, for each virtual stage."""

    file: TorchFile
    chunks: Sequence[Mapping[str, StoredTensor]]

    @property
    def path(self) -> Path:
        return self.file.path


@dataclass(frozen=True)
class Ranks:
    """All ranks by (tensor, pipeline, expert) rank.

    args: of the first rank, as its file states them. version: of the order of QKV.
    """

    folder: Path
    args: Mapping[str, Any]
    version: int
    sizes: Sizes
    by_number: Mapping[tuple[int, int, int], Rank]


def open_ranks(folder: Path, given: Mapping[str, Any]) -> Ranks:
    """Read the pickles of every rank. given: arguments that files may lack.

    Raises ConversionError for missing or surplus ranks, and ranks that disagree.
    """
    files = rank_files(folder)
    opened = [(file, open_torch_file(file.path)) for file in files]
    for _, content in opened:
        if not isinstance(content.content, dict):
            raise ConversionError(f"{content.path} holds no dict.")
    args = _agreed_arguments([content for _, content in opened])
    version = _agreed_version([content for _, content in opened])
    sizes = _sizes({**args, **given}, files, opened[0][1].content, version)
    by_number = {
        _number(file, sizes): Rank(content, _chunks(content, sizes.virtual))
        for file, content in opened
    }
    wanted = set(itertools.product(range(sizes.tensor), range(sizes.pipeline), range(sizes.expert)))
    missing, extra = sorted(wanted - set(by_number)), sorted(set(by_number) - wanted)
    if missing or extra:
        parts = [f"missing: {', '.join(_folder_name(n, sizes) for n in missing[:5])}"] * bool(
            missing
        )
        parts += [f"too many: {by_number[n].path.parent.name}" for n in extra[:5]]
        raise ConversionError(
            f"{folder} was written by {sizes.tensor} tensor x {sizes.pipeline} pipeline x "
            f"{sizes.expert} expert ranks; {'; '.join(parts)}."
        )
    return Ranks(folder, args, version, sizes, by_number)


def _agreed_arguments(files: Sequence[TorchFile]) -> dict[str, Any]:
    found = [_arguments(file) for file in files]
    for file, args in zip(files, found, strict=True):
        for name in sorted(COMPARED):
            # By their text: inert objects of two files are never the same.
            if repr(args.get(name)) != repr(found[0].get(name)):
                raise ConversionError(
                    f"{file.path} says {name} = {args.get(name)!r:.60}, but {files[0].path} says "
                    f"{found[0].get(name)!r:.60}: these are not ranks of one checkpoint."
                )
    return found[0]


def _arguments(file: TorchFile) -> dict[str, Any]:
    args = file.content.get("args")
    if args is None:
        return {}
    if not isinstance(args, Arguments):
        raise ConversionError(f"{file.path}: args is no namespace but {args!r:.60}.")
    return args.values


def _agreed_version(files: Sequence[TorchFile]) -> int:
    first = files[0].content.get("checkpoint_version", 0)
    for file in files:
        version = file.content.get("checkpoint_version", 0)
        if isinstance(version, bool) or version not in VERSIONS or version != first:
            raise ConversionError(
                f"{file.path}: checkpoint_version is {version!r:.40}; mtk knows 0, 1.0, 2.0 and "
                f"3.0, the same in all files."
            )
    return int(first)


def _sizes(
    args: Mapping[str, Any], files: Sequence[RankFile], content: Mapping[str, Any], version: int
) -> Sizes:
    where = files[0].path
    if not args:
        # Before arguments were kept there were tensor ranks only.
        return Sizes(tensor=len(files))
    tensor = args.get("tensor_model_parallel_size", args.get("model_parallel_size"))
    if tensor is None and (version < 2 or all(len(file.numbers) == 1 for file in files)):
        tensor = len(files)
    pipeline = args.get("pipeline_model_parallel_size", 1)
    expert = args.get("expert_model_parallel_size") or 1
    virtual = 1 if "model" in content else sum(f"model{i}" in content for i in range(1000))
    stated = args.get("virtual_pipeline_model_parallel_size")
    if stated not in (None, max(virtual, 1)):
        raise ConversionError(
            f"{where} has {virtual} chunks of the model, but virtual_pipeline_model_parallel_size "
            f"is {stated!r:.40}: the order of its layers is not known."
        )
    numbers = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
    for name, value in numbers.items():
        if type(value) is not int or not 1 <= value <= 100_000:
            raise ConversionError(f"{where}: {name}_model_parallel_size is {value!r:.40}.")
    own = args.get("expert_tensor_parallel_size")
    if args.get("num_experts") and own not in (None, tensor):
        raise ConversionError(
            f"{where}: expert_tensor_parallel_size = {own} with tensor_model_parallel_size = "
            f"{tensor}: mtk reads experts cut like the rest of the model."
        )
    return Sizes(int(tensor), pipeline, expert, max(virtual, 1))


def _number(file: RankFile, sizes: Sizes) -> tuple[int, int, int]:
    """(tensor, pipeline, expert) of a folder; the last two are left out where they are 1."""
    tensor, *others = file.numbers
    present = [size > 1 for size in (sizes.pipeline, sizes.expert)]
    if len(others) != sum(present) and not (len(others) == 1 and not any(present)):
        raise ConversionError(
            f"{file.path.parent} has {len(others) + 1} numbers in its name, which does not fit "
            f"{sizes.pipeline} pipeline and {sizes.expert} expert ranks."
        )
    if len(others) == 2:
        return tensor, others[0], others[1]
    only = others[0] if others else 0
    return (tensor, 0, only) if present[1] else (tensor, only, 0)


def _folder_name(number: tuple[int, int, int], sizes: Sizes) -> str:
    tensor, pipeline, expert = number
    name = f"mp_rank_{tensor:02d}"
    name += f"_{pipeline:03d}" if sizes.pipeline > 1 else ""
    return name + (f"_{expert:03d}" if sizes.expert > 1 else "")


def _chunks(file: TorchFile, virtual: int) -> list[dict[str, StoredTensor]]:
    names = ["model"] if "model" in file.content else [f"model{i}" for i in range(virtual)]
    found = []
    for name in names:
        if name not in file.content:
            raise ConversionError(f"{file.path} has no {name}.")
        chunk = flatten(file.content[name], f"{file.path}: {name}")
        refuse_other_models(chunk, str(file.path))
        found.append(chunk)
    if len(found) != virtual:
        raise ConversionError(f"{file.path} has {len(found)} model chunks, others {virtual}.")
    return found
