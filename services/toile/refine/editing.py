"""The part of an edit that needs no model: the pixels before and after the drawing."""

from dataclasses import dataclass

import numpy as np

from toile.core.errors import ComputeUnavailableError
from toile.imaging.canvas import UInt8Array, decode_png, drawing_input, drawing_size, lay_over
from toile.imaging.masks import feather
from toile.imaging.recolour import recolour
from toile.refine.instructions import Edit, Operation
from toile.refine.prompts import names_material
from toile.refine.regions import Region

STRENGTHS: dict[Operation, float] = {
    Operation.COLOUR: 0.3,
    Operation.PATTERN: 0.85,
    Operation.MATERIAL: 0.8,
}
"""Share of the schedule that is redrawn when a request does not say.

A new colour is laid on before the drawing, which only has to settle it; a pattern or material has
to come out of the drawing itself.
"""

_FADE_SHARE = 0.006  # of the shorter side: how far the drawing fades out inside the region


@dataclass(frozen=True)
class Sheet:
    """What the models get: image and mask as PNG, width and height in pixels."""

    image: bytes
    mask: bytes
    width: int
    height: int


class Editing:
    """One edit of one image; `prepare`, then `finish` with the drawing."""

    def __init__(self, pixels: UInt8Array, region: Region, edit: Edit, prompt: str) -> None:
        self._pixels = pixels
        self._region = region
        self._edit = edit
        self._ground = self._recoloured(prompt)

    def prepare(self, native_size: int) -> Sheet:
        """Make what the models get, for a base of that native size."""
        height, width = self._region.mask.shape
        size = drawing_size(width, height, native_size)
        image, mask = drawing_input(self._ground, self._region.mask, size)
        return Sheet(image, mask, *size)

    def finish(self, drawing_png: bytes) -> UInt8Array:
        """Lay the drawing over the source. Pixels outside the region keep their values.

        Raises:
            ComputeUnavailableError: The drawing is no image.
        """
        try:
            drawing = decode_png(drawing_png)
        except (OSError, ValueError, SyntaxError) as error:
            raise ComputeUnavailableError("the models sent a drawing that is no PNG") from error
        mask = self._region.mask
        return lay_over(
            self._pixels,
            self._ground,
            drawing,
            feather(mask, max(1.0, _FADE_SHARE * min(mask.shape))),
            keep_detail=self._edit.operation is Operation.COLOUR,
        )

    def _recoloured(self, prompt: str) -> UInt8Array:
        """The source with the new colour laid on, if there is one for the cloth itself."""
        edit = self._edit
        figures_only = edit.operation is Operation.PATTERN and edit.word != "plain"
        if edit.shade is None or figures_only:
            return self._pixels
        dye_everything = names_material(prompt, "lace") or edit.word == "plain"
        return recolour(
            np.ascontiguousarray(self._pixels),
            self._region.mask,
            edit.shade.rgb,
            keep_prints=not dye_everything,
        )
