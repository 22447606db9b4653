"""The flow in a real Prefect: its recorded states are the truth, in every case."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import plan_pipeline
from flows.settings import prefect_environment
from mtk.errors import DataError, Interrupted, WorkerError
from mtk.log import Reporter
from mtk.session import Session
from tests.flows.fake_stages import fake_stages

pytestmark = [
    pytest.mark.slow,
    # Prefect's own server client and loop leave some of these behind.
    pytest.mark.filterwarnings("default"),
]
STEPS = list(fake_stages())
FILE = "flow: {work: work, leave_out: [serve], retry_delay: 0, retries: 1}\n"


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One server for the module, in a home of its own."""
    environment = dict(os.environ)
    prefect_environment(os.environ, str(tmp_path_factory.mktemp("prefect")))
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.yaml").write_text(FILE)
    return tmp_path


def run_flow() -> Any:
    """The final state of a run of the real flow body over stages that can misbehave."""
    import prefect

    from flows.end_to_end import run_tasks

    @prefect.flow(name="end_to_end", validate_parameters=False)
    def body() -> Any:
        pipeline = plan_pipeline("flow.yaml", fake_stages())
        return run_tasks(pipeline, Session(Reporter(quiet=True)))

    return body(return_state=True)


def recorded(state: Any) -> tuple[str, dict[str, str]]:
    """State names of the flow run and of its task runs, as the server has them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        only = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        tasks = client.read_task_runs(flow_run_filter=only)
    assert run.state is not None
    return run.state.name, {task.name.rsplit("-", 1)[0]: task.state_name for task in tasks}


def fail(stage: str, how: str, times: int = 1) -> None:
    Path("fail.json").write_text(json.dumps({"stage": stage, "how": how, "times": times}))


@pytest.mark.parametrize("stage", ["corpus", "pretrain", "quantize"])
@pytest.mark.parametrize(
    ("how", "error", "name"),
    [
        ("data", DataError, "Failed"),
        ("bug", ZeroDivisionError, "Failed"),
        ("sigterm", Interrupted, "Cancelled"),
    ],
)
def test_state_is_the_truth(
    prefect: None, stage: str, how: str, error: type[Exception], name: str
) -> None:
    from flows.end_to_end import raise_for_state

    fail(stage, how)
    state = run_flow()
    with pytest.raises(error):
        raise_for_state(state)
    flow_state, tasks = recorded(state)
    assert flow_state == name
    assert tasks.pop(stage) == name
    assert set(tasks.values()) <= {"Completed"}
    assert len(tasks) == STEPS.index(stage)

    again = run_flow()
    flow_state, tasks = recorded(again)
    assert flow_state == "Completed"
    skipped = {step for step, state_name in tasks.items() if state_name == "Skipped"}
    assert skipped == set(STEPS[: STEPS.index(stage)])


def test_lost_worker_is_retried_and_then_given_up(prefect: None) -> None:
    from flows.end_to_end import raise_for_state

    fail("pretrain", "worker", times=1)
    assert recorded(run_flow())[0] == "Completed"
    Path("flow.yaml").write_text(FILE + "evaluate: {task: other, output: work/second}\n")
    fail("evaluate", "worker", times=2)
    state = run_flow()
    with pytest.raises(WorkerError, match="rank 1"):
        raise_for_state(state)
    assert recorded(state)[1]["evaluate"] == "Failed"


def test_every_step_and_the_run_have_a_markdown_artifact(prefect: None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    state = run_flow()
    only = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    )
    with get_client(sync_client=True) as client:
        found = {
            artifact.key: str(artifact.data)
            for artifact in client.read_artifacts(artifact_filter=only)
        }
    assert set(found) == {"report", *(f"step-{step}" for step in STEPS)}
    assert "- digest: `sha256:" in found["step-convert"]
    assert found["report"] == Path("work/report.md").read_text()


def test_killed_run_is_settled_by_the_next(prefect: None) -> None:
    import prefect as library
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.stale import process_tag, settle_killed_runs

    @library.flow(name="killed")
    def body() -> None: ...

    own = process_tag()
    reused = own.rsplit(":", 1)[0] + ":1"  # the same process id, started at another time
    elsewhere = own.replace("process:", "process:other-", 1)
    with get_client(sync_client=True) as client:
        runs = {
            tag: client.create_flow_run(body, state=Running(), tags=[tag]).id
            for tag in (own, reused, elsewhere, "process::::")
        }
        assert settle_killed_runs() == 1
        states = {tag: client.read_flow_run(run).state for tag, run in runs.items()}
    names = {tag: state.name for tag, state in states.items() if state is not None}
    assert names[reused] == "Crashed"
    assert {names[own], names[elsewhere]} == {"Running"}
