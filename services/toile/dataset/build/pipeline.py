"""The Ray Data pipeline of a build: crop and trace, then look with the base's models.

The models live in one actor. Ray Data fuses the steps before them into it, so that a build on a
small machine starts one worker and not three.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import cast

import ray
import ray.data

from toile.core.jobs.runtime import install_stop_handler
from toile.core.settings import Settings
from toile.dataset.build.steps import See, Seen, Source, prepare

_BATCH = 8


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Be a driver of the Ray cluster that this job was submitted to."""
    ray.init(address="auto", logging_level="warning", log_to_driver=False)
    install_stop_handler()
    try:
        yield
    finally:
        ray.shutdown()


def see_all(
    sources: Sequence[Source],
    settings: Settings,
    resolution: int,
    base_artifact: str,
    *,
    aspect: str,
) -> Iterator[Seen]:
    """Run photographs through the pipeline; rows come as they are done, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Wrapped as a `UserCodeException`, an error loses its type and reason between processes.
    context.raise_original_map_exception = True
    dataset = (
        ray.data.from_items(
            [dict(source) for source in sources],
            override_num_blocks=math.ceil(len(sources) / _BATCH),
        )
        .map(prepare, fn_kwargs={"settings": settings, "resolution": resolution, "aspect": aspect})
        .map_batches(
            See,
            fn_constructor_kwargs={"settings": settings, "base_artifact": base_artifact},
            batch_size=_BATCH,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
    )
    for row in dataset.iter_rows():
        yield cast("Seen", {**row, "index": int(row["index"])})
