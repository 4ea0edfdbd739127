"""How well samples keep to what a ControlNet was shown, beside the same drawn without it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from toile.diffusion.vision import Vision
from toile.imaging.alignment import edge_alignment, part_overlap, silhouette_overlap
from toile.imaging.control_maps import EDGE, ControlKind, UInt8Array
from toile.training.data import Example, load_square

ALIGNMENT = "alignment"
SILHOUETTE = "silhouette_overlap"

_ALIGNMENTS = {
    ControlKind.EDGES: "F-measure of edges within 2 pixels",
    ControlKind.PARTS: "mean intersection over union of parts",
}
_ALIGNMENTS[ControlKind.EDGES_PARTS] = "mean of both: " + "; ".join(_ALIGNMENTS.values())
_SILHOUETTE = "intersection over union of the garment and that of the image, by the segmenter"


@dataclass(frozen=True)
class Sample:
    """A sample, and what it is to keep to."""

    example: Example
    """The image whose map it was drawn under."""
    held_out: bool
    """Whether the training did not see that."""
    plane: UInt8Array
    """The map as `control_planes` has it."""
    drawn: Image.Image
    without: Image.Image
    """The same prompt and seed, drawn without control."""


class Measures:
    """What can be measured of a kind of control on a base.

    The alignment to the map is measured where it is known what a map shows. How far the garment is
    where that of the image is, is measured on every base that has a segmenter.
    """

    def __init__(self, kind: ControlKind, vision: Vision, *, has_segmenter: bool) -> None:
        self._kind, self._vision = kind, vision
        self._known: dict[str, tuple[str, Callable[[Sample, Image.Image], float]]] = {}
        if kind in _ALIGNMENTS:
            self._known[ALIGNMENT] = (_ALIGNMENTS[kind], self._alignment)
        if has_segmenter:
            self._known[SILHOUETTE] = (_SILHOUETTE, self._silhouette)

    def __bool__(self) -> bool:
        """Whether anything can be measured."""
        return bool(self._known)

    def facts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Measure samples, at least one.

        Returns:
            `measures`, each with what it is and its means `with_control` and `without_control`, of
            the held-out samples where there are any; and the same of each of `samples`.
        """
        rows = [
            {
                "image": sample.example.file_name,
                "held_out": sample.held_out,
                **{
                    name: {
                        "with_control": measure(sample, sample.drawn),
                        "without_control": measure(sample, sample.without),
                    }
                    for name, (_, measure) in self._known.items()
                },
            }
            for sample in samples
        ]
        counted = [row for row in rows if row["held_out"]] or rows
        return {
            "measures": {
                name: {
                    "measure": measure,
                    "with_control": _mean(counted, name, "with_control"),
                    "without_control": _mean(counted, name, "without_control"),
                }
                for name, (measure, _) in self._known.items()
            },
            "samples": rows,
        }

    def _alignment(self, sample: Sample, image: Image.Image) -> float:
        plane, pixels = sample.plane, np.asarray(image.convert("RGB"))
        if self._kind is ControlKind.EDGES:
            return edge_alignment(plane, pixels)
        found = self._vision.segment(image)[0]
        if self._kind is ControlKind.PARTS:
            return part_overlap(plane, found)
        edges = plane == EDGE  # where the map says nothing of parts
        overlap = part_overlap(plane[~edges], found[~edges])
        return (edge_alignment(edges.astype(np.uint8), pixels) + overlap) / 2.0

    def _silhouette(self, sample: Sample, image: Image.Image) -> float:
        original = load_square(sample.example.path, image.width)
        return silhouette_overlap(self._vision.segment(original)[0], self._vision.segment(image)[0])


def metrics_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """The means by the names that `toile.v1.VersionMetrics` has for them."""
    return {
        name + suffix: mean[key]
        for name, mean in facts["measures"].items()
        for key, suffix in (("with_control", ""), ("without_control", "_without_control"))
    }


def _mean(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> float:
    return float(np.mean([row[name][key] for row in rows]))
