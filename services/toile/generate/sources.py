"""The image that a generation starts from, and its mask: found, read, checked."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.models import ImageRow
from toile.core.errors import BadImageError, InvalidArgumentError, NotFoundError
from toile.core.names import ImageName
from toile.core.settings import Limits
from toile.generate.checks import known, share, within, within_floats
from toile.generate.sizes import Sizes, bad_size
from toile.imaging.canvas import BoolArray, Float32Array, UInt8Array
from toile.imaging.decode import decode
from toile.imaging.inpaint import Border, box_around, expand_mask, fade
from toile.imaging.masks import Box
from toile.v1 import generate_pb2

DEFAULT_REDESIGN_STRENGTH = 0.6
HELD_REDESIGN_STRENGTH = 0.85
"""Default where a control holds the source's edges: colours and pattern can be new."""
DEFAULT_INPAINT_STRENGTH = 0.8
DEFAULT_UPSCALE_STRENGTH = 0.3
DEFAULT_MASK_BLUR_PIXELS = 4.0
MAX_MASK_BLUR_PIXELS = 64.0
MAX_PADDING_PIXELS = 4096
DEFAULT_FACTOR = 2.0
MAX_FACTOR = 4.0


@dataclass(frozen=True)
class Source:
    """What a generation starts from, in the catalog."""

    image: ImageRow
    mask: ImageRow | None

    @property
    def restricted(self) -> str:
        """Which of them is for adults: `image`, `mask`, or neither when empty."""
        parts = {"image": self.image, "mask": self.mask}
        rated = (name for name, row in parts.items() if row and row.content_rating == "RESTRICTED")
        return next(rated, "")


@dataclass(frozen=True)
class SourcePixels:
    """The pixels of a source: image `[H, W, 3]`, mask `[H, W]`, true where the drawing goes."""

    image: UInt8Array
    mask: BoolArray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.image.shape[1], self.image.shape[0]


def source_names(request: generate_pb2.GenerateRequest) -> Iterator[tuple[str, str]]:
    """Yield field and name of each image that a request starts from; the image, then the mask."""
    kind = request.WhichOneof("source")
    if kind is not None:
        yield f"{kind}.image", getattr(request, kind).image
    if request.inpaint.mask:
        yield "inpaint.mask", request.inpaint.mask


def find_source(
    session: Session,
    project: str,
    request: generate_pb2.GenerateRequest,
    *,
    for_use: bool = False,
) -> Source | None:
    """Return the image and the mask that a request names; None if it starts from noise.

    With `for_use` nobody can delete them before the transaction ends.

    Raises:
        InvalidArgumentError: It is not the name of an image.
        NotFoundError: There is no such image in the project; metadata `field` says which.
    """
    rows = [
        find_image(session, project, field, name, for_use=for_use)
        for field, name in source_names(request)
    ]
    return Source(rows[0], rows[1] if len(rows) > 1 else None) if rows else None


def find_image(
    session: Session, project: str, field: str, name: str, *, for_use: bool = False
) -> ImageRow:
    """Return an image that a field names; see `find_source`."""
    owner = ImageName.parse(name, field).project
    row = session.get(ImageRow, name, with_for_update={"read": True} if for_use else None)
    if row is None or owner != project:
        raise NotFoundError(
            f"there is no image {name} in projects/{project}",
            reason="IMAGE_NOT_FOUND",
            metadata={"name": name, "field": field},
        )
    return row


def read_source(
    store: ArtifactStore, limits: Limits, request: generate_pb2.GenerateRequest, source: Source
) -> SourcePixels:
    """Decode a source.

    Raises:
        BadImageError: An image cannot be decoded or is too large; metadata `field` says which.
        InvalidArgumentError: The mask has another size than the image (`MASK_SIZE`).
        DataLossError: The stored bytes are damaged.
    """
    fields = [field for field, _ in source_names(request)]
    image = read_image(store, limits, source.image, fields[0])
    if source.mask is None:
        return SourcePixels(image, np.zeros(image.shape[:2], dtype=np.bool_))
    # White strokes on nothing are a mask, too: what is transparent is not drawn.
    mask = read_image(store, limits, source.mask, fields[1], backdrop="black")
    if mask.shape != image.shape:
        sizes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (mask, image)]
        raise InvalidArgumentError(
            f"the mask has {sizes[0]} pixels and the image {sizes[1]}; they must be of one size",
            field=fields[1],
            reason="MASK_SIZE",
            metadata={"mask": sizes[0], "image": sizes[1]},
        )
    return SourcePixels(image, mask.mean(axis=2) >= 128)


def read_image(
    store: ArtifactStore, limits: Limits, row: ImageRow, field: str, *, backdrop: str = "white"
) -> UInt8Array:
    """Decode an image that a field names, as `[H, W, 3]`; see `read_source`."""
    try:
        picture = decode(store.get(row.artifact), limits, backdrop=backdrop)
        return np.asarray(picture, dtype=np.uint8)
    except BadImageError as error:
        raise BadImageError(
            f"{row.name}: {error.message}", field=field, reason=error.reason
        ) from error


def resolve_source(
    request: generate_pb2.GenerateRequest, pixels: SourcePixels, sizes: Sizes, limits: Limits
) -> tuple[int, int]:
    """Fill in what a source's fields leave open; return the shape to draw, width and height.

    Raises:
        InvalidArgumentError: A field is wrong, there is nothing to draw (`NO_MASK`,
            `EMPTY_MASK`), or the result would be too large (`BAD_SIZE`).
    """
    if request.HasField("redesign"):
        held = _edges_hold(request)
        default = HELD_REDESIGN_STRENGTH if held else DEFAULT_REDESIGN_STRENGTH
        _resolve_strength("redesign", request.redesign, default, request.steps)
        return pixels.size
    if request.HasField("inpaint"):
        _resolve_inpaint(request, limits, pixels)
        return drawn_part(request.inpaint, pixels).shape
    return _resolve_upscale(request, pixels, sizes, limits)


def _edges_hold(request: generate_pb2.GenerateRequest) -> bool:
    """Whether one of the controls, which are resolved, is of the source's edges."""
    return any(
        control.kind == generate_pb2.CONTROL_KIND_EDGES and control.image == request.redesign.image
        for control in request.controls
    )


def _resolve_strength(
    kind: str,
    source: generate_pb2.Redesign | generate_pb2.Inpaint | generate_pb2.Upscale,
    default: float,
    steps: int,
) -> None:
    if not source.HasField("strength"):
        source.strength = default
    field = f"{kind}.strength"
    share(field, source.strength)
    if int(steps * source.strength) < 1:
        raise InvalidArgumentError(
            f"{field} {source.strength:g} of {steps} steps leaves none to draw", field=field
        )


def _resolve_inpaint(
    request: generate_pb2.GenerateRequest, limits: Limits, pixels: SourcePixels
) -> None:
    inpaint = request.inpaint
    if request.repeat:
        raise InvalidArgumentError(
            "a part of an image cannot be a tile that repeats", field="repeat"
        )
    _resolve_strength("inpaint", inpaint, DEFAULT_INPAINT_STRENGTH, request.steps)
    if not inpaint.HasField("mask_blur"):
        inpaint.mask_blur = DEFAULT_MASK_BLUR_PIXELS
    within_floats("inpaint.mask_blur", inpaint.mask_blur, 0.0, MAX_MASK_BLUR_PIXELS)
    if inpaint.HasField("padding"):
        within("inpaint.padding", inpaint.padding, 0, MAX_PADDING_PIXELS)
    known("inpaint.preparation", inpaint.preparation, generate_pb2.InpaintPreparation)
    border = border_of(inpaint)
    for side in ("left", "top", "right", "bottom"):
        within(f"inpaint.expansion.{side}", getattr(border, side), 0, limits.upscaled_side_pixels)
    width, height = pixels.size
    width, height = width + border.left + border.right, height + border.top + border.bottom
    if width * height > limits.image_pixels:
        raise InvalidArgumentError(
            f"the expanded image would have {width} x {height} pixels, {limits.image_pixels:,} in "
            "all are allowed",
            field="inpaint.expansion",
            reason="TOO_MANY_PIXELS",
        )
    if not inpaint.mask and border == Border():
        raise InvalidArgumentError(
            "inpaint needs a mask, or an expansion", field="inpaint.mask", reason="NO_MASK"
        )
    if not expand_mask(pixels.mask, border).any():
        raise InvalidArgumentError(
            "the mask is black: there is nothing to draw",
            field="inpaint.mask",
            reason="EMPTY_MASK",
        )


def _resolve_upscale(
    request: generate_pb2.GenerateRequest, pixels: SourcePixels, sizes: Sizes, limits: Limits
) -> tuple[int, int]:
    upscale = request.upscale
    _resolve_strength("upscale", upscale, DEFAULT_UPSCALE_STRENGTH, request.steps)
    if not upscale.HasField("factor"):
        upscale.factor = DEFAULT_FACTOR
    within_floats("upscale.factor", upscale.factor, 1.0, MAX_FACTOR)
    if not upscale.HasField("overlap"):
        upscale.overlap = sizes.native // 4
    within("upscale.overlap", upscale.overlap, 0, sizes.native // 2)
    grids = (sizes.width_grid, sizes.height_grid)
    width, height = (
        round(side * upscale.factor / grid) * grid
        for side, grid in zip(pixels.size, grids, strict=True)
    )
    low, high = sizes.shortest, limits.upscaled_side_pixels
    if not (low <= min(width, height) and max(width, height) <= high):
        fitting = upscale.factor * (
            low / min(width, height) if min(width, height) < low else high / max(width, height)
        )
        raise bad_size(
            "upscale.factor",
            f"sides of an upscaled image must be {low} to {high} pixels, not {width} x {height}",
            [
                int(side * fitting / grid) * grid
                for side, grid in zip(pixels.size, grids, strict=True)
            ],
        )
    return width, height


@dataclass(frozen=True)
class DrawnPart:
    """What of an inpainted picture is drawn, once it is expanded.

    weights: `[H, W]`, how far the drawing covers what was there. box: the part that is drawn.
    """

    weights: Float32Array
    box: Box

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height of the part."""
        return self.box.width, self.box.height


def drawn_part(inpaint: generate_pb2.Inpaint, pixels: SourcePixels) -> DrawnPart:
    """Return what of a picture a resolved request draws."""
    weights = fade(expand_mask(pixels.mask, border_of(inpaint)), inpaint.mask_blur)
    height, width = weights.shape
    whole = Box(0, 0, width, height)
    box = box_around(weights > 0, inpaint.padding) if inpaint.HasField("padding") else whole
    return DrawnPart(weights, box)


def border_of(inpaint: generate_pb2.Inpaint) -> Border:
    """Return the border that an inpainting adds."""
    sides = inpaint.expansion
    return Border(sides.left, sides.top, sides.right, sides.bottom)
