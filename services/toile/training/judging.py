"""Which of a run's sets of samples is the best, by the scorers that the rank service has.

A ranking normalises scores over the images that it is asked about, and a run keeps the weights of
one set alone, so a set is ranked against the best one before it: over the images of both, as one
request to the rank service would be. The set whose images have the higher mean total stays; the
earlier one of two that are equal.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from toile.diffusion.vision import Vision
from toile.imaging.decode import decode
from toile.scoring import Evidence, Need, default_weights, get_scorer, rank
from toile.scoring.evidence import JUDGED_SIDE_PIXELS, FloatArray
from toile.scoring.ranking import check_finite
from toile.training.data import Example

ImageScores: TypeAlias = Mapping[str, float | None]
"""Scores of one image by scorer; None of one that has nothing to say."""

_BATCH = 16
_CHALLENGER = "challenger "
_NEEDED_PARTS = {
    Need.EMBEDDING: "image_encoder",
    Need.REFERENCES: "image_encoder",
    Need.GARMENT: "segmenter",
}


class Judge:
    """Scores pictures with what a base's models see, against the images that are trained on.

    A scorer that needs a model which the base lacks has no say.
    """

    def __init__(self, bundle_path: Path, examples: Sequence[Example]) -> None:
        self._vision = Vision(bundle_path)
        self._examples = examples
        self._references: FloatArray | None = None
        self._scorers = [
            scorer
            for scorer in map(get_scorer, default_weights(with_dataset=True))
            if all(
                (bundle_path / part).is_dir()
                for need, part in _NEEDED_PARTS.items()
                if need in scorer.needs
            )
        ]

    def scores(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Generator[None, None, list[ImageScores]]:
        """Score images, each by what its prompt says; yields after each piece of the work.

        Raises:
            FailedPreconditionError: The base has no image tower (`BASE_LACKS_VISION`), or a score
                is not a finite number (`SCORE_NOT_FINITE`).
        """
        if self._references is None:
            self._references = yield from self._embed_examples()
        found: list[ImageScores] = []
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            evidence = self._evidence(shrunk(image), prompt.strip(), self._references)
            scores = {scorer.name: scorer.score(evidence) for scorer in self._scorers}
            for scorer, score in scores.items():
                check_finite(scorer, {f"sample {index}": score})
            found.append(scores)
            yield
        return found

    def _evidence(self, image: Image.Image, prompt: str, references: FloatArray) -> Evidence:
        garment = None
        if any(Need.GARMENT in scorer.needs for scorer in self._scorers):
            labels, names = self._vision.segment(image)
            garment = labels != names.index("background")
        texts = self._vision.embed_texts([prompt]) if prompt else None
        return Evidence(
            pixels=np.asarray(image),
            prompt=prompt,
            embedding=self._vision.embed_images([image])[0].astype(np.float64),
            prompt_embedding=None if texts is None else texts[0].astype(np.float64),
            garment=garment,
            references=references,
        )

    def _embed_examples(self) -> Generator[None, None, FloatArray]:
        parts: list[FloatArray] = []
        for start in range(0, len(self._examples), _BATCH):
            images = [
                shrunk(decode(example.path, min_side_pixels=1))
                for example in self._examples[start : start + _BATCH]
            ]
            parts.append(self._vision.embed_images(images).astype(np.float64))
            yield
        return np.concatenate(parts)


def best_judged(sets: Mapping[int, Sequence[ImageScores]]) -> int:
    """The step of the best set; 0 if there is none."""
    best = 0
    for step in sorted(sets):
        if not best or _is_better(sets[step], sets[best]):
            best = step
    return best


def shrunk(image: Image.Image) -> Image.Image:
    """A copy of an image, at most as large as images are judged."""
    copy = image.convert("RGB")
    copy.thumbnail((JUDGED_SIDE_PIXELS, JUDGED_SIDE_PIXELS), Image.Resampling.LANCZOS)
    return copy


def _is_better(challenger: Sequence[ImageScores], best: Sequence[ImageScores]) -> bool:
    weights = {scorer: get_scorer(scorer).default_weight for scorer in best[0]}
    images = {f"{_CHALLENGER}{place}": scores for place, scores in enumerate(challenger)}
    images |= {f"best {place}": scores for place, scores in enumerate(best)}
    # Both have an image for each prompt. Summed exactly, so that equal sets are a tie.
    lead = math.fsum(
        placed.total if placed.name.startswith(_CHALLENGER) else -placed.total
        for placed in rank(images, weights)
    )
    return lead > 0
