"""Steps of decoding as CUDA graphs: one launch for all kernels of a step.

A graph has fixed shapes and addresses. Steps therefore come in few sizes, and what changes from
step to step is copied into tensors that the graph reads. All else, the weights, the cache and its
tables, stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtk.kernels.transfer import send

if TYPE_CHECKING:
    from serving.paged.runner import Launched

# Rows of a step.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Runs before a capture, so that libraries set themselves up and kernels are compiled.
WARM_UPS = 2


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs_3B: Tensor
    found: Launched


class Graphs:
    """Runs ``step`` as a graph for each shape of its inputs, captured at first use. On a device
    without graphs, and for steps that cannot be captured, runs it as it is."""

    def __init__(
        self,
        step: Callable[[Tensor, int, bool], Launched],
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self._step, self._report = step, report
        self._able, self._device = device.type == "cuda", device
        self._captured: dict[tuple[int, int, bool], _Captured] = {}
        self._pool: Any = None

    @property
    def count(self) -> int:
        return len(self._captured)

    def __call__(self, inputs_3B: Tensor, width: int, guessed: bool) -> Launched:
        """What the step finds; overwritten by the next one of the same size. ``inputs_3B`` is on
        the host."""
        if not self._able:
            return self._step(send(inputs_3B, self._device), width, guessed)
        shape = (inputs_3B.shape[1], width, guessed)
        if shape not in self._captured:
            try:
                self._captured[shape] = self._capture(inputs_3B, width, guessed)
            except RuntimeError as error:
                self._able = False
                self._report(f"steps are run without CUDA graphs: {error}")
                return self._step(send(inputs_3B, self._device), width, guessed)
        captured = self._captured[shape]
        captured.inputs_3B.copy_(inputs_3B.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.found

    def _capture(self, inputs_3B: Tensor, width: int, guessed: bool) -> _Captured:
        static_3B = send(inputs_3B, self._device)
        ahead = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(ahead):
            for _ in range(WARM_UPS):
                self._step(static_3B, width, guessed)
        torch.cuda.current_stream().wait_stream(ahead)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the server may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = self._step(static_3B, width, guessed)
        self._pool = graph.pool()
        return _Captured(graph, static_3B, found)
