"""What a training's workers are given."""

import functools
from collections.abc import Callable

import pytest
from sqlalchemy import select

from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.jobs.rayjob import GRACE_SECONDS, STOP_SECONDS
from toile.training import worker
from toile.training.worker import LEAVE_SECONDS, scaling


@pytest.mark.parametrize(
    ("wants", "gpus", "takes"),
    [
        (None, 0, False),
        (None, 1, False),
        (None, 2, True),
        (None, 8, True),
        (True, 0, True),
        (False, 8, False),
    ],
)
def test_workers_take_gpus_where_there_is_one_for_each(
    wants: bool | None, gpus: float, takes: bool
) -> None:
    config = scaling(2, wants, gpus)
    assert (config.num_workers, config.use_gpu) == (2, takes)


def test_a_checkpoint_can_be_kept_before_pods_are_killed() -> None:
    assert LEAVE_SECONDS < STOP_SECONDS < GRACE_SECONDS


@pytest.mark.parametrize(
    ("workers", "gpus", "message"),
    [(1, True, "waiting for 1 GPU of"), (2, False, "waiting for 2 processors of")],
)
def test_what_the_cluster_has_to_free_is_told_before_workers_start(
    train: Callable[..., JobRow],
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    gpus: bool,
    message: str,
) -> None:
    told: list[dict[str, object]] = []

    class Blocked:
        """Ray Train, where there is no room yet."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fit(self) -> None:
            with catalog.reading() as session:
                told.extend(job.progress for job in session.scalars(select(JobRow)))

    monkeypatch.setattr(worker, "TorchTrainer", Blocked)
    train(functools.partial(worker._fit, workers=scaling(workers, gpus, 0)))
    assert told[0]["phase"] == "wait"
    assert str(told[0]["message"]).startswith(message)
