"""Samples while a run trains: the same prompts and seeds, with the weights of that step.

Nothing that is drawn here touches what is trained: the seeds are the samples' own, and the loop
gives the weights back as they were. A ControlNet draws with its weights as they are, not yet
rounded to what its files hold.
"""

import io
import logging
from collections.abc import Generator, Sequence

from PIL import Image

from toile.core.errors import AlreadyExistsError, CancelledError, DataLossError, NotFoundError
from toile.core.jobs.progress import Figure
from toile.core.jobs.runtime import JobContext
from toile.core.jobs.samples import JobSamples, Sample, SampleSet
from toile.diffusion.bundle import Bundle
from toile.training.config import RecipeConfig
from toile.training.events import Events
from toile.training.judging import ImageScores, Judge
from toile.training.patience import PASSING, report
from toile.training.publish import draw_sample, sample_seed
from toile.training.recipe import Recipe

_log = logging.getLogger(__name__)


class Sampler:
    """Draws, judges, keeps and tells of a run's samples; of the leading rank alone."""

    def __init__(
        self,
        job: JobContext,
        bundle: Bundle,
        config: RecipeConfig,
        recipe: Recipe,
        judge: Judge | None,
        events: Events,
    ) -> None:
        """Make one; with a judge, samples that are due are scored."""
        self._job = job
        self._bundle = bundle
        self._config = config
        self._recipe = recipe
        self._judge = judge
        self._events = events
        self._kept = JobSamples(job.store, job.name)

    def wanted(self) -> bool:
        """Whether somebody seems to have asked for samples."""
        return self._job.samples_wanted()

    def draw(self, step: int, *, due: bool) -> Generator[None, None, SampleSet | None]:
        """Draw the set of a step, unless an earlier attempt did; yields after each piece of work.

        Args:
            step: Steps done.
            due: Whether it is the configuration that asks; else somebody must have.

        Returns:
            The set; None where nobody had asked, or the job should stop.
        """
        if not (due or self._is_asked()):
            return None
        judge = self._judge if due else None
        earlier = self._earlier(step, judged=judge is not None)
        if earlier is not None:
            return earlier
        prompts = self._config.sample_prompts
        images: list[Image.Image] = []
        for index in range(len(prompts)):
            try:
                self._say(step, f"drawing sample {index + 1} of {len(prompts)}")
                fields = self._recipe.trained(index)
                images.append(draw_sample(self._job, self._bundle, self._config, index, fields))
            except CancelledError:
                return None  # the loop keeps a checkpoint; the next attempt draws them
            yield
        scores: Sequence[ImageScores] = [{} for _ in images]
        if judge is not None:
            scores = yield from judge.scores(images, prompts)
        drawn = SampleSet(
            step,
            [
                Sample(prompt, sample_seed(self._config, index), scores[index])
                for index, prompt in enumerate(prompts)
            ],
        )
        self._keep(drawn, images)
        return drawn

    def tell(self, drawn: SampleSet, best_step: int) -> None:
        """Tell whoever watches the job of a set, and which one is the best so far.

        Raises:
            CancelledError: The job should stop.
        """
        figures: dict[str, Figure] = {"samples_step": drawn.step}
        if drawn.is_judged:
            figures |= {"sample_scores": drawn.mean_scores, "best_samples_step": best_step}
        report(self._job, "train", drawn.step, self._config.steps, **figures)

    def _is_asked(self) -> bool:
        try:
            return self._job.samples_asked()
        except PASSING:
            return False  # asked again at the next step

    def _say(self, step: int, message: str) -> None:
        report(self._job, "train", step, self._config.steps, message=message)

    def _earlier(self, step: int, *, judged: bool) -> SampleSet | None:
        """The set as it was kept before, if it says all that it should."""
        try:
            drawn = self._kept.get(step).drawn
            images = [self._image(step, index) for index in range(len(drawn.samples))]
        except (NotFoundError, DataLossError, *PASSING):
            return None
        if judged and not drawn.is_judged:
            return None
        if self._events.lack(step):
            self._events.samples(drawn, images)
        return drawn

    def _image(self, step: int, index: int) -> Image.Image:
        return Image.open(io.BytesIO(b"".join(self._kept.read(step, index))))

    def _keep(self, drawn: SampleSet, images: Sequence[Image.Image]) -> None:
        """Keep a set; a store that is away, or full, costs only that one."""
        self._events.samples(drawn, images)
        try:
            self._kept.keep(drawn, [_png(image) for image in images])
        except AlreadyExistsError:
            return  # by a process of this job that was thought lost
        except PASSING as error:
            _log.warning("no samples of step %d: %s", drawn.step, error.message)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
