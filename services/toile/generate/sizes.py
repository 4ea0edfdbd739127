"""How large images are: what a base can draw, and the nearest to what was asked for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

from toile.core.errors import InvalidArgumentError
from toile.imaging.canvas import GRID, SIZE_FACTOR, drawing_size
from toile.v1 import common_pb2, generate_pb2

_RATIO = re.compile(r"([0-9]{1,5}(?:\.[0-9]{1,5})?):([0-9]{1,5}(?:\.[0-9]{1,5})?)")


@dataclass(frozen=True)
class Sizes:
    """Widths and heights in pixels that a base can draw.

    Sides are multiples of 8, and of 16 where a repeat moves copies by half a tile: half a tile
    must be a whole number of latents.
    """

    native: int
    longest: int
    width_grid: int = GRID
    height_grid: int = GRID

    @classmethod
    def of(cls, native: int, longest: int, repeat: common_pb2.Repeat.ValueType) -> "Sizes":
        """Return the sizes of a base, and of a repeat if one is asked for."""
        return cls(
            native,
            min(native * SIZE_FACTOR, longest),
            width_grid=2 * GRID if repeat == common_pb2.REPEAT_BRICK else GRID,
            height_grid=2 * GRID if repeat == common_pb2.REPEAT_HALF_DROP else GRID,
        )

    @property
    def shortest(self) -> int:
        """Shortest side."""
        return self.native // SIZE_FACTOR

    def nearest(self, width: float, height: float) -> tuple[int, int]:
        """Return the nearest width and height that can be drawn."""
        return self._snap(width, self.width_grid), self._snap(height, self.height_grid)

    def shaped(self, width: float, height: float) -> tuple[int, int]:
        """Return width and height of a shape at the base's native area."""
        scale = self.native / sqrt(width * height)
        return self.nearest(width * scale, height * scale)

    def _snap(self, side: float, grid: int) -> int:
        low, high = -(-self.shortest // grid) * grid, self.longest // grid * grid
        return min(max(round(side / grid) * grid, low), high)


def resolve_size(
    request: generate_pb2.GenerateRequest, sizes: Sizes, source: tuple[int, int] | None
) -> None:
    """Fill in width and height; an aspect ratio is replaced by them.

    Args:
        request: Changed.
        sizes: What the base can draw.
        source: Width and height of what the drawing starts from, whose shape is the default.

    Raises:
        InvalidArgumentError: The base cannot draw it; metadata `nearest` is a size that it can
            (`BAD_SIZE`); or it is no ratio (`BAD_ASPECT_RATIO`).
    """
    if request.aspect_ratio:
        if request.width or request.height:
            raise InvalidArgumentError(
                "aspect_ratio is instead of width and height", field="aspect_ratio"
            )
        size = _of_ratio(request.aspect_ratio, sizes)
        request.ClearField("aspect_ratio")
    elif source is not None and not (request.width or request.height):
        size = sizes.nearest(*drawing_size(*source, sizes.native))
    else:
        default = sizes.nearest(sizes.native, sizes.native)
        size = (request.width or default[0], request.height or default[1])
        nearest = sizes.nearest(*size)
        for field, side, near in zip(("width", "height"), size, nearest, strict=True):
            if side != near:
                grid = sizes.width_grid if field == "width" else sizes.height_grid
                raise bad_size(
                    field,
                    f"{field} must be a multiple of {grid} from {sizes.shortest} to "
                    f"{sizes.longest} pixels, not {side}",
                    nearest,
                )
    request.width, request.height = size


def bad_size(field: str, message: str, nearest: Iterable[int]) -> InvalidArgumentError:
    """Return the error of a size that cannot be drawn, which names one that can."""
    near = "x".join(map(str, nearest))
    return InvalidArgumentError(
        f"{message}; the nearest size that works is {near}",
        field=field,
        reason="BAD_SIZE",
        metadata={"nearest": near},
    )


def _of_ratio(text: str, sizes: Sizes) -> tuple[int, int]:
    match = _RATIO.fullmatch(text.replace(" ", ""))
    width, height = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not (width and height):
        raise InvalidArgumentError(
            f"aspect_ratio is width:height, such as 3:4, not {text[:40]!r}",
            field="aspect_ratio",
            reason="BAD_ASPECT_RATIO",
        )
    most = sizes.longest / sizes.shortest
    nearest = sizes.shaped(width, height)
    if not 1 / most <= width / height <= most:
        raise bad_size(
            "aspect_ratio",
            f"this base draws at most {most:g} times as long as wide, not {text[:40]}",
            nearest,
        )
    return nearest
