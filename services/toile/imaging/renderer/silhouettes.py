"""Garments as parts: outlines in a frame where x is 0 on the axis and y runs 0..1 downwards."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from toile.imaging.renderer.geometry import Points, bezier, chain, ellipse, flip, mirrored
from toile.imaging.renderer.vocabulary import PART_NAMES

LABELS: Mapping[str, int] = {name: index for index, name in enumerate(PART_NAMES)}


@dataclass(frozen=True)
class Line:
    """A drawn line: `seam` (dark), `stitch` (dashed), `button` (each point), `edge` (light)."""

    kind: str
    points: Points


@dataclass(frozen=True)
class Part:
    """One piece of cloth, drawn in list order.

    paint: `main`, `deep` (a darker shade of main), `inside` (the back of the cloth, in shade) or
    `second`. origin and axis_degrees set the cloth's own grain (0 = hangs straight). folds:
    `soft`, `skirt`, `limb` or `none`. flare widens the folds towards the hem.
    """

    label: str
    outline: Points
    paint: str = "main"
    origin: tuple[float, float] = (0.0, 0.0)
    axis_degrees: float = 0.0
    folds: str = "soft"
    flare: float = 0.0
    lines: tuple[Line, ...] = field(default_factory=tuple)
    sheer: bool = True


Shape = Mapping[str, float]


def lerp(low: float, high: float, share: float) -> float:
    """Low at share 0, high at share 1."""
    return low + (high - low) * share


def both_sides(part: Part) -> list[Part]:
    """A right-hand part and its mirror image."""
    lines = tuple(Line(line.kind, flip(line.points)) for line in part.lines)
    left = Part(
        part.label,
        flip(part.outline),
        part.paint,
        (-part.origin[0], part.origin[1]),
        -part.axis_degrees,
        part.folds,
        part.flare,
        lines,
        part.sheer,
    )
    return [left, part]


@dataclass(frozen=True)
class Torso:
    """The measures tops and dresses share."""

    neck: float
    neck_depth: float
    shoulder: float
    shoulder_drop: float
    chest: float
    waist: float
    hem: float
    armpit_y: float
    waist_y: float
    hem_y: float
    hem_curve: float = 0.015
    v_neck: bool = False

    def neckline(self) -> Points:
        """From the centre front to the shoulder's neck point."""
        start, end = (0.0, self.neck_depth), (self.neck, 0.0)
        control = (
            (0.35 * self.neck, 0.6 * self.neck_depth)
            if self.v_neck
            else (
                self.neck,
                self.neck_depth,
            )
        )
        return chain(bezier(start, control, end), [end])

    def outline(self) -> Points:
        """The whole front."""
        right = chain(
            self.neckline(),
            bezier(
                (self.shoulder, self.shoulder_drop),
                (0.86 * self.shoulder, lerp(self.shoulder_drop, self.armpit_y, 0.6)),
                (self.chest, self.armpit_y),
            ),
            bezier(
                (self.chest, self.armpit_y),
                (lerp(self.chest, self.waist, 0.8), lerp(self.armpit_y, self.waist_y, 0.5)),
                (self.waist, self.waist_y),
            ),
            bezier(
                (self.waist, self.waist_y),
                (lerp(self.waist, self.hem, 0.3), lerp(self.waist_y, self.hem_y, 0.5)),
                (self.hem, self.hem_y),
            ),
            [(self.hem, self.hem_y)],
            bezier(
                (self.hem, self.hem_y),
                (0.5 * self.hem, self.hem_y + self.hem_curve),
                (0.0, self.hem_y + self.hem_curve),
            ),
        )
        return mirrored(right)

    def back(self) -> Part:
        """The inside of the back, seen through the neck hole."""
        width = self.neck + 0.012
        return Part(
            "collar",
            chain(
                bezier((-width, 0.0), (0.0, 0.035), (width, 0.0)),
                bezier(
                    (width, 0.0), (width, self.neck_depth + 0.02), (0.0, self.neck_depth + 0.03)
                ),
                bezier((0.0, self.neck_depth + 0.03), (-width, self.neck_depth), (-width, 0.0)),
            ),
            "inside",
            folds="none",
            sheer=False,
        )

    def neck_rib(self, width: float = 0.018) -> Part:
        """A narrow band along the neckline."""
        inner = self.neckline()
        outer = inner * np.array([1.0, 1.0]) + np.array([0.0, width])
        outer[:, 0] += width * 0.6 * inner[:, 0] / max(self.neck, 1e-6)
        outer[-1, 1] -= width * 0.6
        band = chain(flip(inner)[::-1], inner, outer[::-1], flip(outer))
        return Part("collar", band, "deep", folds="none", sheer=False)

    def sleeves(self, length: float, width: float, angle: float, cuff: float = 0.0) -> list[Part]:
        """A pair of sleeves hanging at so many degrees from the vertical."""
        heading = np.deg2rad(angle)
        along = np.array([np.sin(heading), np.cos(heading)])
        out = np.array([np.cos(heading), -np.sin(heading)])
        top = np.array([self.shoulder + 0.004, self.shoulder_drop - 0.004])
        pit = np.array([self.chest - 0.03, self.armpit_y + 0.004])
        centre = (top + pit) / 2
        end = centre + length * along
        outer, inner = end + 0.5 * width * out, end - 0.5 * width * out
        bulge = top + 0.22 * length * along + 0.035 * out
        outline = chain(
            bezier(top, bulge, lerp_point(bulge, outer, 0.35)),
            [lerp_point(bulge, outer, 0.35), outer],
            bezier(outer, end + 0.012 * along, inner),
            [inner, pit, np.array([0.78 * self.shoulder, 0.5 * (top[1] + pit[1])])],
        )
        hem = chain(
            bezier(outer - 0.022 * along, end - 0.012 * along, inner - 0.022 * along),
            [inner - 0.022 * along],
        )
        lines = (Line("seam", hem),)
        origin = (float(centre[0]), float(centre[1]))
        parts = both_sides(Part("sleeves", outline, "main", origin, angle, "limb", lines=lines))
        if cuff > 0:
            band = chain(
                [outer - cuff * along + 0.004 * out, outer + 0.004 * out],
                [inner - 0.004 * out, inner - cuff * along - 0.004 * out],
            )
            parts += both_sides(Part("trim", band, "deep", origin, angle, "none", sheer=False))
        return parts


def lerp_point(first: Points, second: Points, share: float) -> Points:
    """A point between two."""
    point: Points = first + (second - first) * share
    return point


def buttons(x: float, top: float, bottom: float, count: int) -> Line:
    """Buttons in a row down the front."""
    ys = np.linspace(top, bottom, count)
    return Line("button", np.stack([np.full(count, x), ys], axis=1))


def straight(*points: tuple[float, float], kind: str = "seam") -> Line:
    """A seam or stitch line through points."""
    return Line(kind, np.asarray(points, dtype=float))


def band(label: str, half_top: float, half_bottom: float, top: float, bottom: float) -> Part:
    """A waistband, hatband or hem."""
    outline = np.array(
        [(-half_top, top), (half_top, top), (half_bottom, bottom), (-half_bottom, bottom)]
    )
    return Part(label, outline, "deep", folds="none", sheer=False)


def skirt_part(
    half_waist: float, half_hem: float, top: float, bottom: float, flare: float, curve: float
) -> Part:
    """The flared cloth of a skirt or dress, from the waist to a curved hem."""
    hip = lerp(half_waist, half_hem, 0.42)
    right = chain(
        [(0.0, top), (half_waist, top)],
        bezier((half_waist, top), (hip + 0.05, lerp(top, bottom, 0.22)), (half_hem, bottom)),
        [(half_hem, bottom)],
        bezier((half_hem, bottom), (0.5 * half_hem, bottom + curve), (0.0, bottom + curve)),
    )
    return Part("skirt", mirrored(right), "main", (0.0, top), 0.0, "skirt", flare)


def round_part(label: str, centre: tuple[float, float], rx: float, ry: float, paint: str) -> Part:
    """An ellipse of cloth."""
    return Part(label, ellipse(centre, rx, ry), paint, centre, 0.0, "soft")
