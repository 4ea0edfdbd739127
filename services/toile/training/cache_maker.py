"""Computes the caches of a training, or fetches what was computed before."""

import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from toile.core.artifacts import fetch, read_manifest
from toile.core.errors import DataLossError
from toile.core.jobs.runtime import JobContext
from toile.diffusion.bundle import Bundle
from toile.diffusion.vision import Vision
from toile.imaging.control_maps import ControlKind
from toile.training import class_images
from toile.training.cache_plans import CLASS_IMAGES, PHASE, CachePlan, inputs
from toile.training.caches import OnProgress, by_size, encode, joined_shards
from toile.training.class_images import Shelf
from toile.training.config import MAPS, MASKS
from toile.training.data import Example
from toile.training.maps import control_planes
from toile.training.masks import garment_shares
from toile.training.patience import patiently, report


class CacheMaker:
    """Has what caches are computed with: the base's networks and the examples."""

    def __init__(
        self,
        job: JobContext,
        bundle: Bundle,
        examples: Sequence[Example],
        *,
        tells: bool,
    ) -> None:
        """Make it; nothing is loaded yet.

        Args:
            job: On whose behalf; its end is looked for between two images.
            bundle: The base, its UNet as it came.
            examples: The dataset's.
            tells: Whether progress is to be reported.
        """
        self._job, self._bundle, self._examples, self._tells = job, bundle, examples, tells

    def obtain(self, plan: CachePlan) -> dict[str, Tensor]:
        """Fetch a cache; what is missing of it is computed first.

        Raises:
            CancelledError: The job should stop; shards that are done are kept.
            DataLossError: A shard is damaged; the next training computes the cache again.
        """
        if not plan.is_published(self._job):
            for shard in plan.missing(self._job):
                self.make(plan, shard)
            plan.publish(self._job)
        try:
            folder = self._fetched(plan)
            try:
                return _loaded(folder, plan)
            except (SafetensorError, OSError):  # damaged since it was fetched
                shutil.rmtree(folder, ignore_errors=True)
                return _loaded(self._fetched(plan), plan)
        except DataLossError:
            plan.forget(self._job.store)
            raise

    def make(self, plan: CachePlan, shard: int) -> None:
        """Compute a shard and keep it."""
        places = plan.shards[shard]
        tensors = self._computed(plan, places, self._teller(PHASE, plan, places))
        plan.keep(self._job, shard, save(tensors))

    def _fetched(self, plan: CachePlan) -> Path:
        job = self._job
        return patiently(job, PHASE, lambda: fetch(job.store, plan.prefix, job.cache_path))

    def _computed(
        self, plan: CachePlan, places: range, on_progress: OnProgress
    ) -> dict[str, Tensor]:
        examples = self._examples[places.start : places.stop]
        size = self._bundle.native_size
        if plan.kind == MASKS:
            groups = by_size(examples)
            return {f"shares{name}": garment_shares(group, size) for name, group in groups.items()}
        if plan.kind == MAPS:
            kind = ControlKind(plan.subject)
            planes = control_planes(
                self._vision, examples, kind, size, on_progress, mask_labels=self._mask_labels
            )
            return {"planes": planes}
        if plan.kind == CLASS_IMAGES:
            return self._of_class(plan, places, on_progress)
        return encode(self._bundle, self._examples, places, on_progress, as_tokens=plan.as_tokens)

    def _of_class(
        self, plan: CachePlan, places: range, on_progress: OnProgress
    ) -> dict[str, Tensor]:
        shelf = Shelf(self._job, self._bundle, plan.subject)
        shelf.fill(places, self._teller(class_images.PHASE, plan, places))

        def encoded() -> dict[str, Tensor]:
            with tempfile.TemporaryDirectory(prefix="class-", dir=self._job.scratch_path) as folder:
                drawn = shelf.examples(plan.count, places, Path(folder))
                return encode(self._bundle, drawn, places, on_progress, as_tokens=plan.as_tokens)

        return patiently(self._job, PHASE, encoded)  # there may be no room for the files

    def _teller(self, phase: str, plan: CachePlan, places: range) -> OnProgress:
        """Stops when the job should, and reports what is done of the whole plan."""

        def tell(done: int, _total: int) -> None:
            self._job.check()
            if self._tells:
                report(self._job, phase, places.start + done, plan.count)

        return tell

    @cached_property
    def _vision(self) -> Vision:
        return Vision(self._bundle.path)

    @cached_property
    def _mask_labels(self) -> list[str]:
        """What the values of the dataset version's masks mean; nothing where it has none."""
        job = self._job
        _, dataset = inputs(job)
        manifest = patiently(job, PHASE, lambda: read_manifest(job.store, dataset.artifact))
        return list(manifest.metadata.get("mask_labels", ()))


def _loaded(folder: Path, plan: CachePlan) -> dict[str, Tensor]:
    return joined_shards([load_file(folder / name) for name in plan.names])
