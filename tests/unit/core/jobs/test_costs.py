"""What jobs cost, and what they may."""

import time

import pytest

from toile.core.catalog.engine import Catalog
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.jobs import JobKind, JobState, JobStore
from toile.core.jobs.convert import job_message
from toile.core.jobs.costs import Meter, Usage, check_budget
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import Prices, Settings

PRICES = Prices(cpu_hour=0.04, gpu_hour=3.0, currency="EUR")


@pytest.fixture
def limited(catalog: Catalog, jobs: JobStore) -> str:
    """Name of a job that has started and may cost one euro."""
    with catalog.transaction() as session:
        name = jobs.create(
            session, project="p", kind=JobKind.TRAINING, target="t", spec={}, budget=1.0
        ).name
    jobs.next_attempt(name, after=0)
    jobs.start(name, 1)
    return name


def test_an_hour_costs_what_an_hour_costs() -> None:
    assert Usage(cpu_seconds=7200, gpu_seconds=1800).amount(PRICES) == pytest.approx(1.58)
    assert Usage(cpu_seconds=7200, gpu_seconds=1800).amount(Prices()) == 0


def test_a_processor_counts_while_it_works_and_a_gpu_while_it_is_held() -> None:
    meter = Meter(gpus=2)
    time.sleep(0.2)
    idle = meter.read()
    assert idle.cpu_seconds < 0.15
    assert idle.gpu_seconds >= 0.4
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    busy = meter.read()
    assert busy.cpu_seconds >= 0.1
    assert Meter().read().gpu_seconds == 0


def test_what_all_processes_took_adds_up(jobs: JobStore, limited: str) -> None:
    for usage in (Usage(10, 0), Usage(30, 600)):  # the job's own and a worker's
        assert not jobs.heartbeat(limited, 1, usage, PRICES).to_stop
    message = job_message(jobs.get(limited), prices=PRICES)
    assert (message.cost.cpu_seconds, message.cost.gpu_seconds) == (40, 600)
    assert message.cost.amount == pytest.approx(0.5, abs=0.001)
    assert (message.cost.currency, message.budget) == ("EUR", 1.0)
    assert not job_message(jobs.get(limited)).HasField("cost")


def test_a_job_that_has_spent_its_budget_is_paused(jobs: JobStore, limited: str) -> None:
    assert jobs.heartbeat(limited, 1, Usage(0, 1200), PRICES).to_stop
    assert jobs.stop(limited, attempt=1)
    assert jobs.get(limited).state == JobState.PAUSED
    for budget in (None, 0.5):
        with pytest.raises(FailedPreconditionError) as caught:
            jobs.resume(limited, budget=budget, prices=PRICES)
        assert caught.value.reason == "BUDGET_SPENT"
    assert jobs.get(limited).budget == 1.0, "what was refused changed nothing"
    row = jobs.resume(limited, budget=2.5, prices=PRICES)
    assert (row.state, row.budget) == (JobState.QUEUED, 2.5)
    jobs.start(limited, 2)
    assert not jobs.heartbeat(limited, 2, Usage(0, 60), PRICES).to_stop


def test_a_job_without_a_budget_may_cost_anything(jobs: JobStore, job: str) -> None:
    jobs.next_attempt(job, after=0)
    jobs.start(job, 1)
    assert not jobs.heartbeat(job, 1, Usage(1e9, 1e9), PRICES).to_stop


def test_a_process_tells_what_it_takes(
    settings: Settings, jobs: JobStore, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toile.core.jobs.runtime.HEARTBEAT_INTERVAL_SECONDS", 0.02)

    def work(context: JobContext) -> None:
        until = time.monotonic() + 20
        while not context.jobs.get(job).cpu_seconds:
            assert time.monotonic() < until
        with context.catalog.transaction() as session:
            context.succeed(session)

    jobs.next_attempt(job, after=0)
    assert execute(work, settings, job, 1) == 0
    assert jobs.get(job).state == JobState.SUCCEEDED


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_budget(budget: float) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_budget(budget, PRICES)
    assert caught.value.metadata["field"] == "budget"


def test_a_budget_needs_prices() -> None:
    check_budget(None, Prices())
    with pytest.raises(FailedPreconditionError) as caught:
        check_budget(5.0, Prices(currency="EUR"))
    assert caught.value.reason == "NO_PRICES"
