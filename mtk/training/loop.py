"""The training loop: steps, log lines, evaluations, checkpoints, clean stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.data.batch_schedule import BatchSchedule
from mtk.data.token_source import SampleDataset
from mtk.errors import DataError, GateError, Interrupted
from mtk.log import Progress, Reporter
from mtk.parallel.collectives import all_reduce
from mtk.training.batch import GlobalBatch
from mtk.training.evaluate import held_out_loss
from mtk.training.metrics import Log
from mtk.training.progress import RunProgress
from mtk.training.step import Stepper, StepResult
from mtk.training.stop import StopRequest

Batches = Callable[[], Iterator[GlobalBatch]]
# Figures of an evaluation after a number of steps, to be logged.
Judge = Callable[[Stepper, int], dict[str, Any]]

# Skipped steps at the least loss scale after which fp16 is given up: none of them trains.
STUCK_STEPS = 20


@dataclass(frozen=True)
class RunData:
    """Batches of a run. train: from a cursor (samples) on; valid, test: always the same.

    epoch: samples after which the run evaluates and saves, besides the intervals. judge: what
    an evaluation on ``valid`` does in place of the held-out loss, with ``valid`` or without;
    every rank calls it, and returns the same figures (for the log and the checkpoint).
    samples: what ``train`` reads, in the order of training; None where nothing is known of it.
    """

    train: Callable[[int], Iterator[GlobalBatch]]
    valid: Batches | None
    test: Batches | None
    train_samples: int
    token_bytes_V: Tensor | None
    epoch: int | None = None
    judge: Judge | None = None
    samples: SampleDataset | None = None


class Loop:
    """Runs a :class:`Stepper` over :class:`RunData` until all samples are consumed.

    save(metrics) writes a checkpoint of the current state. evaluated_step: when the metrics of
    "eval" were taken.
    """

    def __init__(
        self,
        config: PretrainConfig,
        stepper: Stepper,
        data: RunData,
        progress: RunProgress,
        log: Log,
        reporter: Reporter,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.stepper, self.data = config, stepper, data
        self.progress, self.log, self.reporter, self.save = progress, log, reporter, save
        self.metrics: dict[str, Any] = {}
        self.evaluated_step: int | None = None
        self._saved_step = progress.step
        self._stuck_steps = 0
        self._interval_start = time.perf_counter()
        self._interval_tokens = 0
        # A number until the interval's first step, then fp64 on the device.
        self._interval_loss: float | Tensor = progress.interval_loss

    def run(self, stop: StopRequest) -> dict[str, Any]:
        """Train to the end; returns the last metrics.

        Raises Interrupted after saving when ``stop`` is set, GateError when the loss is no
        longer finite or copies on different ranks differ (the last good checkpoint stays),
        DataError when the batches end too early.
        """
        progress, target = self.progress, self.data.train_samples
        done = progress.consumed_samples
        with self.reporter.progress("training", target, "samples", done) as bar:
            trace = self.stepper.ranks.trace
            trace.phase("data")
            for batch in self.data.train(done):
                self._one_step(batch, bar)
                trace.phase("data")
                if self._stops(stop) and progress.consumed_samples < target:
                    self._save()
                    cause = stop.signal.name if stop.signal else "a signal on another rank was"
                    raise Interrupted(
                        f"{cause} received: saved step {progress.step}. "
                        f"The same command continues from there."
                    )
        self._check_end()
        self._finish()
        return self.metrics

    def _check_end(self) -> None:
        """Raises DataError, with the state saved, if the batches ended before the run does."""
        done, target = self.progress.consumed_samples, self.data.train_samples
        if done >= target:
            return
        batch = self.config.batch
        step = BatchSchedule(batch.full, batch.rampup_batch_size).at(done)
        if target - done < step:  # the batch was changed on the way
            self.reporter.warn(f"{target - done} samples are left out: a step takes {step}")
            return
        self._save()
        raise DataError(
            f"the training batches ended after {done} of {target} samples (state saved). Give a "
            f"length that they suffice for."
        )

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop: all of them must save the same step."""
        world = self.stepper.ranks.world
        if world.size == 1:
            return bool(stop)
        asked = torch.tensor(1 if stop else 0)
        return all_reduce(asked, world, "loop.stop", "max").item() > 0

    def _one_step(self, batch: GlobalBatch, bar: Progress) -> None:
        progress, logging = self.progress, self.config.logging
        lr = self.stepper.schedule.lr(progress.scheduled_samples)
        result = self.stepper.step(batch, progress.scheduled_samples)
        self._count(batch, result)
        self._check_copies()
        last = progress.consumed_samples >= self.data.train_samples
        if progress.step % logging.log_interval == 0 or last:
            self._log(lr, result)
            bar.advance(0, loss=f"{self.metrics['train_loss']:.3f}", lr=f"{lr:.2e}")
        bar.advance(batch.samples)
        if last:
            return
        ended = self._epoch_ended(batch)
        # Before saving, so that a checkpoint's figures are its own.
        interval = logging.eval_interval
        if ended or (interval and progress.step % interval == 0):
            self._evaluate("eval", self.data.valid)
        if ended or progress.step % self.config.checkpoint.save_interval == 0:
            self._save()

    def _epoch_ended(self, batch: GlobalBatch) -> bool:
        epoch, consumed = self.data.epoch, self.progress.consumed_samples
        return epoch is not None and consumed // epoch > (consumed - batch.samples) // epoch

    def _count(self, batch: GlobalBatch, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        progress.consumed_samples += batch.samples
        progress.consumed_tokens += batch.tokens
        progress.interval_steps += 1
        self._interval_tokens += batch.tokens
        self._interval_loss = result.loss.double() + self._interval_loss
        if result.applied:
            progress.scheduled_samples += batch.samples
            self._stuck_steps = 0
        else:
            progress.skipped_steps += 1
            self._check_stuck()

    def _check_stuck(self) -> None:
        scale = self.stepper.loss_scale
        self._stuck_steps = self._stuck_steps + 1 if scale.scale <= scale.minimum else 0
        if self._stuck_steps >= STUCK_STEPS:
            raise GateError(
                f"{STUCK_STEPS} steps in a row overflowed at the least loss scale, "
                f"{scale.minimum:g}, up to step {self.progress.step}. The newest checkpoint is "
                f"step {self._saved_step}; lower --lr or --min-loss-scale, or train in bf16."
            )

    def _log(self, lr: float, result: StepResult) -> None:
        progress = self.progress
        loss = float(self._interval_loss) / progress.interval_steps
        self._check_finite(loss)
        now = time.perf_counter()
        self.metrics["train_loss"] = loss
        self.log.write(
            "train",
            progress.step,
            {
                "loss": loss,
                "lr": lr,
                "grad_norm": result.norm.item(),
                **{name: value.item() for name, value in result.terms.items()},
                **{name: value.item() for name, value in result.balance.items()},
                "loss_scale": self.stepper.loss_scale.scale,
                "skipped_steps": progress.skipped_steps,
                "samples": progress.consumed_samples,
                "tokens": progress.consumed_tokens,
                "tokens_per_second": self._interval_tokens / (now - self._interval_start),
            },
        )
        self.reporter.event("train", step=progress.step, loss=loss, lr=lr)
        progress.interval_steps = 0
        self._interval_loss = 0.0
        self._interval_start, self._interval_tokens = now, 0

    def _check_copies(self) -> None:
        interval, step = self.config.parallel.replica_check_interval, self.progress.step
        if not interval or step % interval:
            return
        try:
            self.stepper.check_copies()
        except GateError as error:
            raise GateError(
                f"step {step}: {error} The newest is step {self._saved_step}."
            ) from None

    def _check_finite(self, loss: float) -> None:
        # With a dynamic scale an overflow is skipped, so a bad loss may be passing.
        if not math.isfinite(loss) and not self.stepper.loss_scale.dynamic:
            raise GateError(
                f"the training loss is {loss} at step {self.progress.step}. The newest "
                f"checkpoint is step {self._saved_step}; lower --lr or check the data."
            )

    def _evaluate(self, name: str, batches: Batches | None) -> None:
        judge = self.data.judge if name == "eval" else None
        if batches is None and judge is None:
            return
        started = time.perf_counter()
        self.stepper.ranks.trace.phase(f"{name} evaluation")
        if judge is not None:
            result = judge(self.stepper, self.progress.step)
        else:
            assert batches is not None
            result = held_out_loss(
                self.stepper.passes, batches(), self.stepper.ranks, self.data.token_bytes_V
            )
        self.metrics[name] = result
        if name == "eval":
            self.evaluated_step = self.progress.step
        self.log.write(name, self.progress.step, result)
        self.reporter.event(name, step=self.progress.step, **result)
        forms = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.4%}"}
        forms["bits_per_byte"] = "{:.3f} bits per byte"
        told = [form.format(result[key]) for key, form in forms.items() if key in result]
        self.reporter.info(f"step {self.progress.step}: {name} {', '.join(told) or 'done'}")
        # Evaluation is not part of the training's throughput.
        self._interval_start += time.perf_counter() - started

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        started = time.perf_counter()
        self.stepper.ranks.trace.phase("saving")
        self.progress.interval_loss = float(self._interval_loss)
        if self.progress.interval_steps:
            self._check_finite(self.progress.interval_loss)
        # A loss is taken before its step's update and cannot vouch for the weights.
        if not self.stepper.finite():
            raise GateError(
                f"the weights are no longer finite after step {self.progress.step}. The newest "
                f"checkpoint is step {self._saved_step}; lower --lr or check the data."
            )
        self.save(dict(self.metrics))
        self._saved_step = self.progress.step
        self._interval_start += time.perf_counter() - started

    def _finish(self) -> None:
        self._evaluate("eval", self.data.valid)
        self._evaluate("test", self.data.test)
        self._save()
