"""Pipeline parallelism: run this rank's stages on the micro-batches of a step.

Torch's own schedules were read first and are not used: they allocate receive buffers for
all micro-batches of a step at once, refuse 1F1B with fewer micro-batches than stages and
interleaving with counts that are no multiple of the rounds, split backward with a graph
search per micro-batch that recomputes checkpointed layers once per group of weights (and on
torch 2.11 counts some gradients twice), drive FSDP through private methods without overlap,
and dead-lock in the V schedule on gloo with torch 2.11. What is left is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from mtk.parallel.compat import widen_gradients
from mtk.parallel.deferred import Deferred
from mtk.parallel.fsdp import hold_gradients, reduce_held
from mtk.parallel.groups import Group
from mtk.parallel.messages import Expected, Mailbox, Spec
from mtk.parallel.schedules import SPLIT_BACKWARD, Action, Message, Program, programs
from mtk.parallel.stages import SHARED

Tensors = tuple[Tensor, ...]
# (logits, index of the micro-batch) -> its share of the loss, a scalar.
Loss = Callable[[Any, int], Tensor]


class MicroBatch(Protocol):
    """What every stage needs to know; the whole micro-batch is on every pipeline rank.

    tokens_BS: int64. positions: int64 [S] or [B, S], None is 0..S-1. documents_BS: int64 or
    None.
    """

    @property
    def tokens_BS(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor | None: ...
    @property
    def documents_BS(self) -> Tensor | None: ...


# (module, tensors of the stage before, micro-batch) -> tensors for the next, or logits.
Call = Callable[[nn.Module, Tensors, Any], Any]
# (stage, micro-batch) -> the tensors that come into this stage; all stages must agree.
Boundary = Callable[[int, Any], tuple[Spec, ...]]


def call_gpt(module: nn.Module, received: Tensors, batch: MicroBatch) -> Any:
    """Run a stage of ``mtk.models.gpt.GPT``."""
    return _call_gpt(module, received, batch)


def call_gpt_losses(module: nn.Module, received: Tensors, batch: Any) -> Any:
    """As :func:`call_gpt`; in training the last stage returns losses in place of logits."""
    return _call_gpt(module, received, batch, batch.labels_BS if module.training else None)


def _call_gpt(
    module: nn.Module, received: Tensors, batch: MicroBatch, labels: Tensor | None = None
) -> Any:
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    inputs = received[0] if received else batch.tokens_BS
    more = {} if labels is None else {"labels": labels}
    return module(inputs, positions, documents=batch.documents_BS, **more)


def call_bert(module: nn.Module, received: Tensors, batch: Any) -> Any:
    """Run a stage of ``mtk.models.bert.Bert``."""
    inputs = received[0] if received else batch.tokens_BS
    types = batch.extra.get("types")
    return module(inputs, batch.positions, types=types, documents=batch.documents_BS)


def call_t5(module: nn.Module, received: Tensors, batch: Any) -> Any:
    """Run a stage of ``mtk.models.t5.T5``."""
    inputs = received or batch.tokens_BS
    return module(inputs, batch.extra["decoder_tokens"], documents=batch.documents_BS)


def states_boundary(
    hidden: int, dtype: torch.dtype, *, sequence_ranks: int = 1, stacks: int = 1
) -> Boundary:
    """States [B, S, E] between stages; over ``sequence_ranks`` (sequence parallelism) each
    has its rows [B x S / ranks, E]. Of two ``stacks`` the decoder's states come second."""

    def spec(tokens_BS: Tensor) -> Spec:
        samples, length = tokens_BS.shape
        if sequence_ranks > 1:
            return Spec((samples * length // sequence_ranks, hidden), dtype)
        return Spec((samples, length, hidden), dtype)

    def boundary(stage: int, batch: Any) -> tuple[Spec, ...]:
        del stage
        if stacks == 1:
            return (spec(batch.tokens_BS),)
        return spec(batch.tokens_BS), spec(batch.extra["decoder_tokens"])

    return boundary


class Pipeline:
    """The stages of one rank, and the way they work together with those of the others.

    modules: this rank's stages, in order (``stages.cut``), already wrapped in whatever else
    the layout has. placement: the rank of each stage (``Stages.ranks``). deferred: for
    zero-bubble schedules, what ``defer_weight_gradients`` returned for each module. reshard:
    FSDP frees gathered weights after each pass and not only after a step's last. overlap:
    FSDP reduces gradients while the last backward of a stage goes on, else at the step's end.
    tied: parameters that two stages may hold under one name.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        placement: Sequence[int],
        group: Group,
        schedule: str,
        boundary: Boundary,
        *,
        device: torch.device,
        deferred: Sequence[Deferred] = (),
        reshard: bool = False,
        overlap: bool = True,
        call: Call = call_gpt,
        tied: Sequence[str] = SHARED,
    ) -> None:
        own = [stage for stage, rank in enumerate(placement) if rank == group.rank]
        if len(own) != len(modules):
            raise ValueError(f"{len(modules)} modules for the stages {own}")
        split = schedule in SPLIT_BACKWARD
        if split and len(deferred) != len(modules):
            raise ValueError(f"{schedule} needs defer_weight_gradients on every stage")
        self.modules = dict(zip(own, modules, strict=True))
        self.placement, self.group, self.schedule = tuple(placement), group, schedule
        self.boundary, self.device, self.call = boundary, device, call
        self.reshard, self.overlap = reshard, overlap
        # With whole backward passes nothing is to be delayed, able to or not.
        self.deferred = dict(zip(own, deferred, strict=True)) if split else {}
        self._programs: dict[tuple[int, bool], Program] = {}
        self._mailbox = Mailbox(group, device, most_outstanding=2 * len(placement))
        self._copies = list(_local_copies(self.modules, tied))

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def has_loss(self) -> bool:
        """The last stage is here, and so is the loss."""
        return self.stages - 1 in self.modules

    def run(
        self,
        micro_batches: Sequence[Any],
        loss_function: Loss,
        collect: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Forward and backward of all micro-batches; gradients add up in ``.grad``, unless
        ``collect``, called whenever there are new ones, takes them from there.

        Returns the sum of the losses where ``has_loss``, a zero elsewhere (a detached
        scalar). The loss must carry its normalisation and any scale: nothing is divided.
        """

        def gathered() -> None:
            for leader, copy in self._copies:
                _move_gradient(copy, leader)
            collect()

        step = _Step(self, micro_batches, loss_function, gathered)
        loss = step.play(self._program(len(micro_batches), training=True))
        if not self.overlap:
            for module in self.modules.values():
                reduce_held(module)
            gathered()
        return loss

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], loss_function: Loss) -> Tensor:
        """Forward only; returns as :meth:`run` does."""
        step = _Step(self, micro_batches, loss_function)
        return step.play(self._program(len(micro_batches), training=False))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all stages here. Names are global; where two stages on this rank
        hold the same one (tied embeddings in the V), only the first is listed."""
        copies = {id(copy) for _, copy in self._copies}
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if id(parameter) not in copies:
                    yield name, parameter

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Set second copies on this rank equal to the listed ones: after weights are made or
        loaded, and after every optimizer step."""
        for leader, copy in self._copies:
            copy.copy_(leader)

    def _program(self, count: int, *, training: bool) -> Program:
        if count < 1:
            raise ValueError("a step needs at least one micro-batch")
        key = count, training
        if key not in self._programs:
            everyone = programs(self.schedule, self.placement, count, training=training)
            self._programs[key] = everyone[self.group.rank]
        return self._programs[key]


class _Step:
    """One run through a program: tensors under way, by (stage, micro-batch)."""

    def __init__(
        self,
        pipeline: Pipeline,
        batches: Sequence[Any],
        loss: Loss,
        gathered: Callable[[], None] = lambda: None,
    ) -> None:
        self.pipeline, self.batches, self.loss_function = pipeline, batches, loss
        self.gathered = gathered
        self.expected: dict[Action, Expected] = {}
        self.ready: dict[Action, Tensors] = {}
        self.outgoing: dict[Action, Tensors] = {}
        self.inputs: dict[tuple[int, int], Tensors] = {}
        self.roots: dict[tuple[int, int], list[Any]] = {}
        self.total = torch.zeros((), device=pipeline.device)

    def play(self, program: Program) -> Tensor:
        work = (step for step in program if isinstance(step, Action))
        last = {step.stage: step for step in work if step.kind == "backward"}
        for step in program:
            if isinstance(step, Message):
                self._message(step)
            elif step.kind == "forward":
                self._forward(step)
            elif step.kind == "backward":
                self._backward(step, last=step == last[step.stage])
                self.gathered()
            else:
                self._finish(step.stage, step.micro)
                self.gathered()
        self.pipeline._mailbox.flush()
        return self.total

    def _message(self, message: Message) -> None:
        action = Action(message.kind, message.stage, message.micro)
        site = f"pipeline.{message.kind} {message.micro} stage {message.stage}"
        mailbox = self.pipeline._mailbox
        if message.sent:
            mailbox.send(self.outgoing.pop(action), message.peer, site)
            return
        specs = self._specs(action)
        self.expected[action] = mailbox.receive(specs, message.peer, site)

    def _specs(self, action: Action) -> tuple[Spec, ...]:
        """Of the tensors that an action starts from."""
        if action.kind == "forward":
            return self.pipeline.boundary(action.stage, self.batches[action.micro])
        outputs = self.pipeline.boundary(action.stage + 1, self.batches[action.micro])
        return tuple(spec for spec in outputs if spec.dtype.is_floating_point)

    def _incoming(self, action: Action) -> Tensors:
        """What the neighbour stage made for this action, on another rank or on this one."""
        expected = self.expected.pop(action, None)
        return self.ready.pop(action) if expected is None else expected.wait()

    def _outgoing(self, action: Action, tensors: Tensors) -> None:
        """Keep what the next action of the neighbour stage needs."""
        neighbour = action.stage + (1 if action.kind == "forward" else -1)
        if neighbour in self.pipeline.modules:
            self.ready[action._replace(stage=neighbour)] = tensors
        else:
            self.outgoing[action] = tensors

    def _forward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        batch, grad = self.batches[micro], torch.is_grad_enabled()
        inputs: Tensors = self._incoming(action) if stage else ()
        inputs = tuple(x.requires_grad_(grad and x.is_floating_point()) for x in inputs)
        out = self.pipeline.call(self.pipeline.modules[stage], inputs, batch)
        if stage == self.pipeline.stages - 1:
            loss = self.loss_function(out, micro)
            self.total += loss.detach()
            outputs: Tensors = (loss,)
        else:
            outputs = out if isinstance(out, tuple) else (out,)
            self._check(outputs, action)
            self._outgoing(action, tuple(x.detach() for x in outputs))
        if grad:
            self.inputs[stage, micro] = inputs
            # The edge keeps the graph but not the output, which may go once it is sent.
            self.roots[stage, micro] = [
                get_gradient_edge(x) if x.requires_grad else None
                for x in outputs
                if x.is_floating_point()
            ]

    def _check(self, outputs: Tensors, action: Action) -> None:
        found = tuple(Spec(tuple(x.shape), x.dtype) for x in outputs)
        agreed = self.pipeline.boundary(action.stage + 1, self.batches[action.micro])
        if found != agreed:
            raise ValueError(f"stage {action.stage} returned {found}, the next takes {agreed}")

    def _backward(self, action: Action, *, last: bool) -> None:
        stage, micro = action.stage, action.micro
        pipeline = self.pipeline
        module, deferred = pipeline.modules[stage], pipeline.deferred.get(stage)
        roots = self.roots.pop((stage, micro))
        grads: Sequence[Tensor | None] = [None]
        if stage < pipeline.stages - 1:
            grads = self._incoming(action)
        sharded = isinstance(module, FSDPModule)
        if isinstance(module, FSDPModule):
            reduce = last and pipeline.overlap
            hold_gradients(module, reduce=reduce, reshard=reduce or pipeline.reshard)
        if deferred is not None and sharded and last:
            # FSDP reduces in this pass, so nothing may come after it.
            for waiting in deferred.waiting:
                self._finish(stage, waiting)
        elif deferred is not None:
            deferred.micro = micro
        pairs = [pair for pair in zip(roots, grads, strict=True) if pair[0] is not None]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
        if deferred is not None:
            deferred.micro = None
        inputs = [x for x in self.inputs.pop((stage, micro)) if x.is_floating_point()]
        if stage:
            found = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)
            self._outgoing(action, found)

    def _finish(self, stage: int, micro: int) -> None:
        """Delayed gradients of one micro-batch."""
        self.pipeline.deferred[stage].finish(micro)
        module = self.pipeline.modules[stage]
        if isinstance(module, FSDPModule):
            widen_gradients(module)  # several micro-batches would add up in bf16


def _local_copies(
    modules: dict[int, nn.Module], tied: Sequence[str]
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(first, other) where several stages of this rank hold a tied parameter."""
    for wanted in tied:
        found = [
            parameter
            for module in modules.values()
            for name, parameter in module.named_parameters()
            if name == wanted
        ]
        yield from ((found[0], copy) for copy in found[1:])


def _move_gradient(copy: nn.Parameter, leader: nn.Parameter) -> None:
    if copy.grad is None:
        return
    leader.grad = copy.grad if leader.grad is None else leader.grad + copy.grad
    copy.grad = None
