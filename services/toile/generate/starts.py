"""From a source's pixels to what the models get, and from their drawing to the image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from toile.generate.sources import SourcePixels, border_of, drawn_part
from toile.imaging.canvas import UInt8Array, drawing_input, encode, lay_over, resized
from toile.imaging.inpaint import Preparation, expand, prepare, with_colours_of
from toile.imaging.palette import hold_to, parse_colour
from toile.v1 import generate_pb2

Finish: TypeAlias = Callable[[UInt8Array], UInt8Array]
"""Makes the image of a drawing; both `[H, W, 3]`."""


@dataclass(frozen=True)
class Start:
    """What a drawing starts from, encoded for the models, and how it ends."""

    finish: Finish
    init_image: bytes = b""
    mask_image: bytes = b""


def make_start(request: generate_pb2.GenerateRequest, pixels: SourcePixels | None) -> Start:
    """Prepare the pixels of a resolved request; `pixels` are its source's."""
    colour = _palette(request)
    if pixels is None:
        return Start(colour)
    if request.HasField("inpaint"):
        return _inpaint(request, pixels, colour)
    if request.HasField("upscale"):
        return Start(colour, encode(pixels.image))
    return Start(colour, encode(fitted(pixels.image, request)))


def fitted(image: UInt8Array, request: generate_pb2.GenerateRequest) -> UInt8Array:
    """Return an image `[H, W, 3]` at the size of a resolved request.

    What does not fit into the shape is cut off evenly: nothing is stretched.
    """
    size = (request.width, request.height)
    fit = ImageOps.fit(Image.fromarray(image), size, Image.Resampling.LANCZOS)
    return np.asarray(fit, dtype=np.uint8)


def _palette(request: generate_pb2.GenerateRequest) -> Finish:
    if not request.HasField("palette"):
        return lambda drawing: drawing
    palette = request.palette
    colours = [rgb for text in palette.colours if (rgb := parse_colour(text)) is not None]
    return lambda drawing: hold_to(drawing, colours, palette.strength)


def _inpaint(request: generate_pb2.GenerateRequest, pixels: SourcePixels, colour: Finish) -> Start:
    inpaint, part = request.inpaint, drawn_part(request.inpaint, pixels)
    canvas = expand(pixels.image, border_of(inpaint))
    rows, columns = slice(part.box.top, part.box.bottom), slice(part.box.left, part.box.right)
    there, weights = canvas[rows, columns], part.weights[rows, columns]
    how = generate_pb2.InpaintPreparation.Name(inpaint.preparation).rpartition("_")[2]
    preparation = Preparation.NONE if how == "UNSPECIFIED" else Preparation(how)
    init_image, mask_image = drawing_input(
        prepare(there, weights > 0, preparation), weights > 0, (request.width, request.height)
    )

    def finish(drawing: UInt8Array) -> UInt8Array:
        if inpaint.restore_colours:
            drawing = with_colours_of(resized(drawing, part.shape), there)
        if request.HasField("palette"):  # at the image's size, or enlarging would mix colours
            drawing = colour(resized(drawing, part.shape))
        image = canvas.copy()
        image[rows, columns] = lay_over(there, there, drawing, weights)
        return image

    return Start(finish, init_image, mask_image)
