"""What a training computes once of its examples, and where that is kept. Free of torch.

A cache lies in the artifact store, in shards of a few examples each:

    projects/{project}/caches/{kind}-{digest of what it follows from}/00000.safetensors

A shard is put there as soon as it is computed, so that what is interrupted begins again with the
shards that there are. The manifest, written over all of them, makes them count.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toile.core.artifacts import ArtifactStore, delete_folder, publish_stored, read_manifest
from toile.core.catalog.models import BaseRow, DatasetVersionRow
from toile.core.errors import AlreadyExistsError, NotFoundError
from toile.core.jobs.runtime import JobContext
from toile.training.config import MAPS, RECIPES, RecipeConfig
from toile.training.patience import patiently

PHASE = "cache"
EXAMPLES, CLASS_IMAGES = "examples", "class-images"

_VERSION = "1"  # of what is cached; a change makes all caches be computed again
_MAPS_VERSION = "masks"  # the same of maps, which once were the segmenter's alone
_SHARD_EXAMPLES = 32
_SHARD_CLASS_IMAGES = 8  # they have to be drawn first


@dataclass(frozen=True)
class CachePlan:
    """A cache that a training needs.

    Attributes:
        kind: What of the examples: `EXAMPLES` is latents and text embeddings.
        subject: What the maps show, or the prompt of the class.
        prefix: Where it is kept in the artifact store.
        count: How many examples it is of.
        shard_size: How many of them are computed and kept together.
        as_tokens: Whether captions are kept as tokens, for text encoders that are trained.
    """

    kind: str
    subject: str
    prefix: str
    count: int
    shard_size: int
    as_tokens: bool = False

    @property
    def shards(self) -> Sequence[range]:
        """The places of each shard's examples."""
        return [
            range(first, min(first + self.shard_size, self.count))
            for first in range(0, self.count, self.shard_size)
        ]

    @property
    def names(self) -> Sequence[str]:
        """The shards' files, in the order of the examples."""
        return [f"{shard:05d}.safetensors" for shard in range(len(self.shards))]

    def is_published(self, job: JobContext) -> bool:
        """Say whether all of it is there to be fetched."""
        try:
            patiently(job, PHASE, lambda: read_manifest(job.store, self.prefix))
        except NotFoundError:
            return False
        return True

    def missing(self, job: JobContext) -> Sequence[int]:
        """Return the shards that are still to be computed."""
        kept = patiently(
            job, PHASE, lambda: {info.key for info in job.store.list(self.prefix + "/")}
        )
        return [
            shard for shard, name in enumerate(self.names) if f"{self.prefix}/{name}" not in kept
        ]

    def keep(self, job: JobContext, shard: int, data: bytes) -> None:
        """Store a shard, unless a training beside this one was faster."""

        def put() -> None:
            with contextlib.suppress(AlreadyExistsError):
                job.store.put(f"{self.prefix}/{self.names[shard]}", data, if_absent=True)

        patiently(job, PHASE, put)

    def publish(self, job: JobContext) -> None:
        """Make the shards count; all of them must be there."""
        patiently(job, PHASE, lambda: publish_stored(job.store, self.prefix, self.names))

    def forget(self, store: ArtifactStore) -> None:
        """Remove what is damaged, so that the next training computes it again."""
        delete_folder(store, self.prefix)


def inputs(job: JobContext) -> tuple[BaseRow, DatasetVersionRow]:
    """Return the base that a job trains for, and the dataset version that it trains on.

    Raises:
        NotFoundError: One of them is gone.
    """

    def read() -> tuple[BaseRow | None, DatasetVersionRow | None]:
        with job.catalog.reading() as session:
            return (
                session.get(BaseRow, job.spec["base"]),
                session.get(DatasetVersionRow, job.spec["dataset_version"]),
            )

    base, dataset = patiently(job, "prepare", read)
    if base is None or dataset is None:
        raise NotFoundError("the base or the dataset version is gone")
    return base, dataset


def plans_for(job: JobContext, base: BaseRow, dataset: DatasetVersionRow) -> Sequence[CachePlan]:
    """Return the caches that a job's training needs."""
    config = RECIPES[job.spec["recipe"]].checked(job.spec["config"])
    return list(_plans(job.project, config, base, dataset))


def _plans(
    project: str, config: RecipeConfig, base: BaseRow, dataset: DatasetVersionRow
) -> Iterator[CachePlan]:
    def plan(kind: str, subject: str, *facts: str, count: int, shard_size: int) -> CachePlan:
        as_tokens = config.reads_tokens and kind in (EXAMPLES, CLASS_IMAGES)
        facts = (_VERSION, base.digest, str(base.native_size), subject, *facts)
        facts += ("tokens",) if as_tokens else ()
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
        prefix = f"projects/{project}/caches/{kind}-{key}"
        return CachePlan(kind, subject, prefix, count, shard_size, as_tokens)

    for kind, subject in {EXAMPLES: "", **config.cached}.items():
        facts = [dataset.digest, *([_MAPS_VERSION] if kind == MAPS else [])]
        yield plan(kind, subject, *facts, count=dataset.image_count, shard_size=_SHARD_EXAMPLES)
    prompt, count = config.class_images
    if count:
        yield plan(CLASS_IMAGES, prompt, str(count), count=count, shard_size=_SHARD_CLASS_IMAGES)
