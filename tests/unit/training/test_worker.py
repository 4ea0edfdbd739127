"""What a training's workers are given."""

import pytest

from toile.core.jobs.rayjob import GRACE_SECONDS, STOP_SECONDS
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
