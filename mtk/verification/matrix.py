"""``mtk verify layout --matrix``: every legal layout of tiny models beside one process.

Several layouts run in one job of the rank pool, which saves most of the time that starting
ranks and connecting groups costs. Whatever fails there runs again in a job of its own, so that
no layout can be blamed for another; one that fails among others only fails all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import groupby
from queue import SimpleQueue

from mtk.config.pretrain import PretrainConfig
from mtk.config.verify import MOST_RANKS, VerifyMatrixConfig
from mtk.errors import MtkError
from mtk.launch.pool import RankPool
from mtk.log import Progress, Reporter
from mtk.training.join import ranks_in_turn
from mtk.verification.compare import compare
from mtk.verification.layout import in_one_process
from mtk.verification.matrix_models import Case, cases
from mtk.verification.matrix_report import Outcome, Record, Report
from mtk.verification.observe import Observation, observe, random_sample

# Layouts of one job: enough that starting it hardly counts.
TOGETHER = 32
# Seconds that one layout may take on a busy machine.
LIMIT = 60.0
References = dict[tuple[str, int], Observation]


def run_matrix(config: VerifyMatrixConfig, reporter: Reporter, *, force: bool = False) -> Outcome:
    """Check what the options ask for; results go into --output as they come.

    force: do not continue an earlier --output. Raises ArtifactError for one that is of
    another matrix.
    """
    asked = cases(config)
    report = Report.open(config, force=force)
    todo = [case for case in asked if case.key not in report.equal]
    reporter.info(
        f"{len(asked)} layouts of {config.matrix.ranks} ranks"
        + (f", {len(asked) - len(todo)} of them in {report.path} already" if report.equal else "")
    )
    with report, reporter.progress("layouts", len(asked), "layouts", len(asked) - len(todo)) as bar:
        for record in _records(todo, config):
            report.add(record)
            _tell(record, reporter, bar)
    return report.outcome([case.key for case in asked])


def _tell(record: Record, reporter: Reporter, bar: Progress) -> None:
    bar.advance(1, ranks=record.ranks)
    if record.failures:
        reporter.warn(f"{record.key}: {'; '.join(record.failures)}")
        reporter.event("layout", **record.fields())


def _records(todo: Sequence[Case], config: VerifyMatrixConfig) -> Iterator[Record]:
    """Results as they come; --jobs of them at a time, each in a pool of its own."""
    jobs = config.matrix.jobs
    pools: SimpleQueue[RankPool] = SimpleQueue()
    made = [RankPool(MOST_RANKS, preload=[__name__], timeout=LIMIT) for _ in range(jobs)]
    for pool in made:
        pools.put(pool)
    executor = ThreadPoolExecutor(jobs)
    seed, references = config.runtime.seed, References()
    try:
        running: set[Future[list[Record]]] = set()
        for batch in _batches(todo):
            if len(running) >= jobs:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
            running.add(executor.submit(_check, batch, seed, pools, references))
        for future in running:
            yield from future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for pool in made:
            pool.close()


def _batches(todo: Sequence[Case]) -> Iterator[list[Case]]:
    for _, group in groupby(todo, key=lambda case: case.world):
        alike = list(group)
        yield from (alike[k : k + TOGETHER] for k in range(0, len(alike), TOGETHER))


def _check(
    batch: list[Case], seed: int, pools: SimpleQueue[RankPool], references: References
) -> list[Record]:
    pool = pools.get()
    try:
        for case in batch:
            key = (case.model, case.samples)
            if key not in references:
                single = [in_one_process(case.run(seed))]
                references[key] = pool.run(observe_in_turn, single, 1, world=1, limit=LIMIT)[0][0]
        try:
            records = _run(batch, seed, pool, references)
        except MtkError:
            # Which of them it was, a job for each will tell.
            return [_alone(case, seed, pool, references, "") for case in batch]
        among = "equal in a job of its own, but not after other layouts in the same processes"
        return [
            _alone(case, seed, pool, references, among) if record.failures else record
            for case, record in zip(batch, records, strict=True)
        ]
    finally:
        pools.put(pool)


def _alone(case: Case, seed: int, pool: RankPool, references: References, suspicion: str) -> Record:
    try:
        record = _run([case], seed, pool, references)[0]
    except MtkError as error:
        return Record.failed(case, str(error))
    return record if record.failures or not suspicion else record.with_failure(suspicion)


def _run(batch: list[Case], seed: int, pool: RankPool, references: References) -> list[Record]:
    started, world = time.perf_counter(), batch[0].world
    runs = [case.run(seed) for case in batch]
    ranks = pool.run(observe_in_turn, runs, world, world=world, limit=LIMIT * (1 + len(batch)))
    seconds = (time.perf_counter() - started) / len(batch)
    found = []
    for case, observations in zip(batch, zip(*ranks, strict=True), strict=True):
        try:
            difference = compare(references[case.model, case.samples], observations)
        except ValueError as error:
            found.append(Record.failed(case, str(error)))
        else:
            found.append(Record.of(case, difference, seconds))
    return found


def observe_in_turn(rank: int, runs: Sequence[PretrainConfig], world: int) -> list[Observation]:
    """A step of each run on the ranks of one job."""
    return [
        observe(run, random_sample(run, run.runtime.seed), ranks)
        for run, ranks in ranks_in_turn(rank, runs, world)
    ]
