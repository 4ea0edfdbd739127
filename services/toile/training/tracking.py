"""A run's figures in Weights & Biases, where the settings name a project there.

W&B may be slow, away or broken, and the training must not notice: a thread of its own starts the
run and tells it what the training leaves in a queue. The first thing that goes wrong is logged and
ends the telling.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from toile import __version__
from toile.core.errors import CancelledError
from toile.core.jobs.runtime import JobContext
from toile.training.config import RecipeConfig
from toile.training.events import figures
from toile.training.loop import StepReport

CLOSE_SECONDS = 10.0
"""How long the end of a training waits for W&B to take what is left."""
_INIT_SECONDS = 30.0
_QUEUED_STEPS = 100_000
"""More are not kept for a W&B that takes none."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def tracking(job: JobContext, config: RecipeConfig) -> Iterator[Callable[[StepReport], None]]:
    """Tell W&B of each step while the block runs; of nothing where no project is set.

    The run has the id of the job, so that a later attempt goes on with it. Steps that are done
    again are told again: their figures are the same.
    """
    if not job.settings.wandb.project:
        yield _ignore
        return
    run = _Run(_arguments(job, config))
    failed = False
    try:
        yield lambda report: run.tell({"step": report.step, **figures(report)})
    except CancelledError:
        raise  # it may go on
    except BaseException:
        failed = True
        raise
    finally:
        run.close(failed=failed)


class _Run:
    """A run of W&B, at the other end of a queue."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._figures: queue.Queue[dict[str, float] | None] = queue.Queue(_QUEUED_STEPS)
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def tell(self, told: dict[str, float]) -> None:
        """Leave figures to be told; they are dropped where W&B is not there to take them."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._figures.put_nowait(told)

    def close(self, *, failed: bool) -> None:
        """Let W&B take what is left and end the run, for `CLOSE_SECONDS`."""
        self._exit_code = int(failed)
        with contextlib.suppress(queue.Full):
            self._figures.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("W&B has not taken all figures yet; the training does not wait for it")

    def _work(self) -> None:
        try:
            import wandb  # late: few have it

            options = wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                init_timeout=_INIT_SECONDS,
                silent=True,
            )
            run = wandb.init(**self._arguments, settings=options)
            # Its own count of steps only rises, and an attempt may do some again.
            run.define_metric("*", step_metric="step")
            while (told := self._figures.get()) is not None:
                run.log(told)
            run.finish(exit_code=self._exit_code)
        except ImportError:
            _log.warning("W&B is not told of the training: pip install 'toile[wandb]'")
        except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
            _log.warning("W&B is not told of the training: %s: %s", type(error).__name__, error)


def _arguments(job: JobContext, config: RecipeConfig) -> dict[str, Any]:
    """What the run is made with; in its configuration is what follows from the request."""
    settings = job.settings.wandb
    _, _, _, model, _, version = job.target.split("/")
    return {
        "project": settings.project,
        "entity": settings.entity or None,
        "mode": settings.mode,
        "id": job.name.rpartition("/")[2],
        "resume": "allow",
        "name": f"{model}/{version}",
        "dir": str(job.settings.home_path),  # in a folder `wandb` there
        "config": {
            **config.model_dump(mode="json"),
            "recipe": config.RECIPE,
            "base": job.spec["base"],
            "dataset_version": job.spec["dataset_version"],
            "model_version": job.target,
            "job": job.name,
            "code_version": __version__,
        },
    }


def _ignore(_report: StepReport) -> None:
    """What is done where nobody is told."""
