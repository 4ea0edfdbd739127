"""From a specification to pixels: backdrop, shadow, cloth with folds, seams, label map, caption."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

from toile.imaging.colours import RGB
from toile.imaging.renderer.backdrop import draw_background
from toile.imaging.renderer.captions import make_caption
from toile.imaging.renderer.cloth import weave
from toile.imaging.renderer.garments import garment_parts
from toile.imaging.renderer.geometry import (
    Float32Array,
    Points,
    UInt8Array,
    fill_mask,
    line_mask,
    smooth_noise,
)
from toile.imaging.renderer.silhouettes import LABELS, Line, Part
from toile.imaging.renderer.spec import Cloth, GarmentSpec

_OVERSAMPLE = 2
_CAPTIONS = 6


@dataclass(frozen=True)
class Render:
    """image `[H, W, 3]` sRGB, labels `[H, W]` (indices of `PART_NAMES`), captions, attributes."""

    image: UInt8Array
    labels: UInt8Array
    captions: tuple[str, ...]
    attributes: Mapping[str, str]

    @property
    def caption(self) -> str:
        """The first of several captions, which differ in what they leave out."""
        return self.captions[0]


def render(spec: GarmentSpec, size: int) -> Render:
    """Draw a specification `size` pixels a side; the same specification gives the same pixels."""
    canvas = _Canvas(spec, size * _OVERSAMPLE)
    parts = garment_parts(spec.category, spec.shape)
    canvas.shadow(parts)
    for index, part in enumerate(parts):
        canvas.lay(part, index)
    image = cv2.resize(canvas.pixels, (size, size), interpolation=cv2.INTER_AREA)
    labels = canvas.labels[_OVERSAMPLE // 2 :: _OVERSAMPLE, _OVERSAMPLE // 2 :: _OVERSAMPLE]
    words = np.random.default_rng([spec.seed, 5])
    return Render(
        image=np.clip(image + 0.5, 0, 255).astype(np.uint8),
        labels=np.ascontiguousarray(labels),
        captions=tuple(make_caption(words, spec.names) for _ in range(_CAPTIONS)),
        attributes=MappingProxyType(dict(spec.names)),
    )


class _Canvas:
    """The picture under way, at the oversampled size."""

    def __init__(self, spec: GarmentSpec, size: int) -> None:
        self.spec, self.size = spec, size
        self.pixels = draw_background(spec.background, size, spec.light)
        self.labels = np.zeros((size, size), dtype=np.uint8)
        self.rng = np.random.default_rng([spec.seed, 3])
        angle = np.deg2rad(spec.pose.rotation_degrees)
        self.turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def to_pixels(self, points: Points) -> Points:
        """Garment coordinates (axis at 0, top at 0, bottom at 1) to pixels."""
        pose = self.spec.pose
        centred = (points - np.array([0.0, 0.5])) @ self.turn * pose.scale
        placed: Points = (centred + np.array([pose.centre_x, pose.centre_y])) * self.size
        return placed

    def shadow(self, parts: list[Part]) -> None:
        """A soft shadow on the backdrop, away from the light."""
        mask = np.zeros((self.size, self.size), dtype=np.uint8)
        for part in parts:
            mask = np.maximum(mask, fill_mask(self.to_pixels(part.outline), self.size))
        shift = np.array([[1, 0, -0.014 * self.size * self.spec.light], [0, 1, 0.016 * self.size]])
        moved = cv2.warpAffine(mask, shift, (self.size, self.size))
        soft = cv2.GaussianBlur(moved, (0, 0), 0.018 * self.size).astype(np.float32) / 255.0
        self.pixels *= (1.0 - 0.34 * soft)[..., None]

    def lay(self, part: Part, index: int) -> None:
        """Draw one part over what is there."""
        outline = self.to_pixels(part.outline)
        mask = fill_mask(outline, self.size)
        box = _bounds(mask)
        if box is None:
            return
        rows, columns = box
        mask = mask[rows, columns]
        self._contact_shadow(mask, rows, columns)
        cover = mask.astype(np.float32) / 255.0
        u, v = self._grain(part, rows, columns)
        depth = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3) / self.size
        shade = self._shading(part, index, depth, u, v)
        cloth = _painted(self.spec.cloth, part)
        under = self.pixels[rows, columns]
        if cloth.material == "lace" and cloth.lining is not None:
            lining = np.asarray(cloth.lining, dtype=np.float32) * (0.92 * shade)[..., None]
            under = np.asarray(under + cover[..., None] * (lining - under), dtype=np.float32)
        colour, thread = weave(cloth, u, v, self.size)
        lit = _light(colour, shade, cloth.material)
        if cloth.material == "lace":
            thread = np.maximum(thread, 0.95 * _border(depth))
        alpha = (cover * thread)[..., None]
        self.pixels[rows, columns] = under + alpha * (lit - under)
        for line in part.lines:
            self._line(line, mask, rows, columns)
        self._outline(outline, mask, rows, columns)
        self.labels[rows, columns][mask > 127] = LABELS[part.label]

    def _grain(self, part: Part, rows: slice, columns: slice) -> tuple[Float32Array, Float32Array]:
        """Cloth coordinates: fractions of the picture's side across and along the part's grain."""
        origin = self.to_pixels(np.array([part.origin]))[0]
        x = (np.arange(columns.start, columns.stop, dtype=np.float32) - origin[0]) / self.size
        y = (np.arange(rows.start, rows.stop, dtype=np.float32) - origin[1]) / self.size
        angle = np.deg2rad(part.axis_degrees - self.spec.pose.rotation_degrees)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u = x[None, :] * cos - y[:, None] * sin
        v = x[None, :] * sin + y[:, None] * cos
        return np.asarray(u, dtype=np.float32), np.asarray(v, dtype=np.float32)

    def _shading(
        self, part: Part, index: int, depth: Float32Array, u: Float32Array, v: Float32Array
    ) -> Float32Array:
        """Brightness `[h, w]` about 1: roundness towards the edges, folds, light from one side."""
        inside = np.clip(depth / 0.05, 0, 1)
        rounded = 0.80 + 0.20 * np.sqrt(inside)
        if part.folds in ("none", "drape"):
            rounded = 0.92 + 0.08 * inside
        shade = rounded + self._folds(part, index, u, v)
        shade = cv2.GaussianBlur(shade.astype(np.float32), (0, 0), 0.003 * self.size)
        shade = shade * (1.0 + 0.16 * self.spec.light * u)
        return np.asarray(np.clip(shade, 0.45, 1.3), dtype=np.float32)

    def _folds(self, part: Part, index: int, u: Float32Array, v: Float32Array) -> Float32Array:
        rng = np.random.default_rng([self.spec.seed, 11, index])
        if part.folds == "none":
            return np.zeros_like(u)
        size = max(u.shape)
        wobble = smooth_noise(rng, size, 2, 3)[: u.shape[0], : u.shape[1]]
        if part.folds == "skirt":
            spread = 0.45 + (0.5 + 1.3 * part.flare) * np.clip(v, 0, 1)
            across = u / spread + 0.012 * wobble
            ramp = np.clip(v / 0.25, 0, 1) * (0.35 + 0.65 * part.flare)
            count = 6.0 + 5.0 * rng.random()
            waves = np.sin(2 * np.pi * count * across + rng.random() * 6.3)
            waves = waves + 0.5 * np.sin(2 * np.pi * 1.7 * count * across + rng.random() * 6.3)
            return np.asarray(0.13 * ramp * waves, dtype=np.float32)
        if part.folds == "drape":
            turn = rng.uniform(-0.9, 0.9)
            across = u * np.cos(turn) + v * np.sin(turn) + 0.03 * wobble
            waves = np.sin(2 * np.pi * (1.5 + 2.0 * rng.random()) * across + rng.random() * 6.3)
            return np.asarray(0.11 * part.flare * waves + 0.02 * wobble, dtype=np.float32)
        if part.folds == "limb":
            creases = np.sin(2 * np.pi * (v + 0.45 * u + 0.02 * wobble) / 0.15 + rng.random() * 6.3)
            return np.asarray(0.045 * creases + 0.035 * wobble, dtype=np.float32)
        fine = smooth_noise(rng, size, 7, 4)[: u.shape[0], : u.shape[1]]
        return np.asarray(0.045 * wobble + 0.03 * fine, dtype=np.float32)

    def _contact_shadow(self, mask: UInt8Array, rows: slice, columns: slice) -> None:
        """Darken the parts already laid where the next one rests on them."""
        margin = round(0.03 * self.size)
        low = (max(0, rows.start - margin), max(0, columns.start - margin))
        around = (slice(low[0], rows.stop + margin), slice(low[1], columns.stop + margin))
        laid = self.labels[around] > 0
        if not laid.any():
            return
        padded = np.zeros(laid.shape, dtype=np.float32)
        top, left = rows.start - low[0], columns.start - low[1]
        padded[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        soft = cv2.GaussianBlur(padded, (0, 0), 0.009 * self.size) / 255.0
        self.pixels[around] *= np.where(laid, 1.0 - 0.32 * soft, 1.0)[..., None]

    def _line(self, line: Line, mask: UInt8Array, rows: slice, columns: slice) -> None:
        points = self.to_pixels(line.points)
        denim = self.spec.cloth.material == "denim"
        if line.kind == "button":
            self._buttons(points)
            return
        drawn = line_mask(points, self.size, 0.0065 * self.size, dashed=denim)
        weight = np.minimum(drawn[rows, columns], mask).astype(np.float32)[..., None] / 255.0
        region = self.pixels[rows, columns]
        if denim:
            region += 0.8 * weight * (np.array([226.0, 160.0, 74.0], dtype=np.float32) - region)
        else:
            region *= 1.0 - 0.3 * weight

    def _buttons(self, points: Points) -> None:
        dark = sum(self.spec.cloth.colour) > 330
        colour = np.array([70.0, 62.0, 58.0] if dark else [226.0, 222.0, 212.0], dtype=np.float32)
        turn = np.linspace(0, 2 * np.pi, 20)
        circle = 0.0095 * self.size * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        for point in points:
            low = np.floor(point - circle.max() - 2).astype(int).clip(0, self.size - 1)
            side = int(2 * circle.max()) + 5
            weight = fill_mask(circle + point - low, side).astype(np.float32)[..., None] / 255.0
            region = self.pixels[low[1] : low[1] + side, low[0] : low[0] + side]
            region += 0.9 * weight[: region.shape[0], : region.shape[1]] * (colour - region)

    def _outline(self, outline: Points, mask: UInt8Array, rows: slice, columns: slice) -> None:
        """A thin darker edge, so that parts of one colour stay apart."""
        closed = np.concatenate([outline, outline[:1]])
        drawn = line_mask(closed, self.size, 0.006 * self.size)[rows, columns]
        weight = np.minimum(drawn, mask).astype(np.float32) / 255.0
        self.pixels[rows, columns] *= 1.0 - 0.22 * weight[..., None]


def _border(depth: Float32Array) -> Float32Array:
    """Thread along the edge of lace: a corded line and a second one inside it."""
    cord = np.clip(1.0 - np.abs(depth - 0.006) / 0.006, 0, 1)
    inner = np.clip(1.0 - np.abs(depth - 0.032) / 0.004, 0, 1)
    return np.asarray(np.maximum(cord, 0.8 * inner), dtype=np.float32)


def _bounds(mask: UInt8Array) -> tuple[slice, slice] | None:
    left, top, width, height = cv2.boundingRect(mask)
    if width == 0 or height == 0:
        return None
    return slice(top, top + height), slice(left, left + width)


def _scaled(colour: RGB, factor: float) -> RGB:
    red, green, blue = (int(np.clip(channel * factor, 0, 255)) for channel in colour)
    return red, green, blue


def _neutral_against(colour: RGB) -> RGB:
    """White, grey or black: what lies inside a coloured garment without stealing its name."""
    brightness = sum(colour) / 3
    if brightness > 190:
        return (92, 94, 98)
    return (236, 235, 231) if brightness < 130 else (52, 52, 56)


def _painted(cloth: Cloth, part: Part) -> Cloth:
    """The cloth a part is cut from."""
    if part.paint == "inside":
        return Cloth(_scaled(cloth.colour, 0.55), cloth.accent, seed=cloth.seed)
    if part.paint == "second":
        return Cloth(_neutral_against(cloth.colour), cloth.colour, seed=cloth.seed)
    plain = cloth.material == "lace" and not part.sheer
    if part.paint == "deep" or plain:
        material = "cotton" if plain else cloth.material
        return Cloth(_scaled(cloth.colour, 0.88), cloth.accent, material=material, seed=cloth.seed)
    return cloth


def _light(colour: Float32Array, shade: Float32Array, material: str) -> Float32Array:
    """Cloth under light; satin answers folds with gloss."""
    lit = colour * np.minimum(shade, 1.12)[..., None]
    if material == "satin":
        gloss = np.clip((shade - 0.93) / 0.16, 0, 1) ** 2
        deep = np.clip((0.95 - shade) / 0.25, 0, 1)
        lit = lit * (1.0 - 0.25 * deep)[..., None]
        lit = lit + (0.42 * gloss)[..., None] * (255.0 - lit)
    return np.asarray(lit, dtype=np.float32)
