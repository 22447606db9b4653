"""The models a parity check compares, behind one small interface.

Shape suffixes: B batch, S sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtk.convert.family import first_architecture
from mtk.convert.hf_directory import HfModel, read_hf_model
from mtk.convert.lazy import EXACT, Tensors
from mtk.convert.probe import CAUSAL, Probe
from mtk.convert.reference_forward import reference_forward
from mtk.errors import ConversionError
from mtk.models.gpt import GPT


class Comparable(Protocol):
    """One side of a comparison; computes in fp32 on the CPU.

    name: what the certificate calls it. forward: logits [B, S, V], and the residual
    stream [B, S, E] after the embedding and after each layer.
    """

    name: str

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]: ...


class NativeModel:
    """mtk's own module."""

    def __init__(self, model: GPT, probe: Probe = CAUSAL, name: str = "mtk") -> None:
        self.name = name
        self._model, self._probe = model.float().eval(), probe

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        blocks = list(self._model.layers.values())
        return _traced(blocks, lambda: self._probe.native(self._model, tokens_BS), self._probe)


class PlainModel:
    """The reference forward over the files' own tensors."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype | None = None
    ) -> None:
        self.name = "mtk reference forward"
        self._config = config
        self._weights = {name: rounded(name, tensors[name], dtype) for name in tensors}

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        return reference_forward(self._config, self._weights, tokens_BS)


class TransformersModel:
    """The class that ``config.json`` names, or ``AutoModelForCausalLM``, on the directory,
    offline.

    Raises ConversionError when transformers reports any weight that is missing, left
    over (unless it is one without information) or of another shape.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        import transformers

        found = read_hf_model(folder)
        family = found.family
        name = "AutoModelForCausalLM"
        if family.probe != CAUSAL:
            stated = first_architecture(found.foreign_config)
            name = stated if stated in family.classes else family.architecture
        self.name = f"transformers {metadata.version('transformers')}"
        with _silent_transformers():
            try:
                model, report = getattr(transformers, name).from_pretrained(
                    folder,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    attn_implementation="eager",
                    output_loading_info=True,
                )
            except Exception as error:  # what it finds wrong with a file has no common class
                found_wrong = " ".join(f"{type(error).__name__}: {error}".split())
                raise ConversionError(
                    f"transformers does not take {folder} as it is: {found_wrong}. --reference "
                    f"plain asks mtk's own forward instead."
                ) from error
        complaints = _complaints(report, found)
        if complaints:
            raise ConversionError(f"transformers does not take {folder} as it is: {complaints}.")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(rounded(name, parameter, dtype))
        self._model, self._probe = model.eval(), family.probe
        self._blocks: Sequence[nn.Module] = [
            block for name in family.blocks.split() for block in model.get_submodule(name)
        ]

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _traced(
            self._blocks, lambda: self._probe.foreign(self._model, tokens_BS), self._probe
        )


def _complaints(report: Mapping[str, Any], found: HfModel) -> dict[str, list[str]]:
    """What transformers reports, but for what the table says is to be passed over: masks and
    heads in published files, of which transformers knows only some."""
    ignored = found.family.weights(found.config).ignored
    known = {"unexpected_keys": ignored | {n.removeprefix(found.family.prefix) for n in ignored}}
    listed = {
        key: sorted({str(name) for name in names} - known.get(key, frozenset()))
        for key, names in report.items()
    }
    return {key: names for key, names in listed.items() if names}


def transformers_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """fp32 values of what ``dtype`` keeps of a weight (None: all of it)."""
    if not tensor.is_floating_point():
        return tensor
    if name.endswith(EXACT):
        return tensor.detach().float()
    return tensor.detach().to(dtype or tensor.dtype).float()


def _traced(
    blocks: Sequence[nn.Module], run: Callable[[], Tensor], probe: Probe
) -> tuple[Tensor, list[Tensor]]:
    """Run with hooks on the blocks: the first one's input and each one's output."""
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        states.append(probe.states(args[0].detach()))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        found = output[0] if isinstance(output, tuple) else output
        states.append(probe.states(found.detach()))

    handles = [blocks[0].register_forward_pre_hook(before)] if blocks else []
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.inference_mode():
            return run().float(), states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bar and no log lines of transformers; its report is read instead."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
