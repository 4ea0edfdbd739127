"""One function a category: its parts from the specification's shape numbers."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from toile.imaging.renderer.geometry import Points, bezier, chain, mirrored
from toile.imaging.renderer.silhouettes import (
    Line,
    Part,
    Shape,
    Torso,
    band,
    both_sides,
    buttons,
    lerp,
    round_part,
    skirt_part,
    straight,
)


def _torso(shape: Shape, *, hem_y: float, ease: float) -> Torso:
    chest = lerp(0.19, 0.245, shape["fit"]) + ease
    return Torso(
        neck=lerp(0.065, 0.105, shape["neck"]),
        neck_depth=lerp(0.05, 0.10, shape["neck_depth"]),
        shoulder=chest - 0.012,
        shoulder_drop=0.045,
        chest=chest,
        waist=chest - lerp(0.0, 0.035, shape["flare"]),
        hem=chest + lerp(-0.01, 0.02, shape["hem"]),
        armpit_y=0.27,
        waist_y=lerp(0.5, 0.6, shape["detail"]),
        hem_y=hem_y,
    )


def dress(shape: Shape) -> list[Part]:
    """Fitted bodice, flared or straight skirt; straps, short or long sleeves."""
    bodice = Torso(
        neck=lerp(0.07, 0.115, shape["neck"]),
        neck_depth=lerp(0.06, 0.15, shape["neck_depth"]),
        shoulder=0.155,
        shoulder_drop=0.03,
        chest=0.145,
        waist=0.108,
        hem=0.112,
        armpit_y=0.19,
        waist_y=0.36,
        hem_y=lerp(0.38, 0.41, shape["detail"]),
        v_neck=shape["neck"] > 0.6,
    )
    bottom = lerp(0.74, 0.98, shape["length"])
    half_hem = lerp(0.17, 0.36, shape["flare"])
    skirt = skirt_part(0.112, half_hem, bodice.hem_y, bottom, shape["flare"], 0.025)
    parts = [bodice.back()]
    if shape["sleeve"] > 0.66:
        parts += bodice.sleeves(lerp(0.36, 0.46, shape["sleeve_width"]), 0.075, 16.0)
    elif shape["sleeve"] > 0.33:
        parts += bodice.sleeves(lerp(0.1, 0.16, shape["sleeve_width"]), 0.115, 30.0)
    parts += [skirt, Part("body", bodice.outline(), lines=_bodice_lines(bodice))]
    if shape["kind"] > 0.55:
        parts.append(band("waistband", 0.111, 0.115, bodice.hem_y - 0.012, bodice.hem_y + 0.022))
    return parts


def _bodice_lines(bodice: Torso) -> tuple[Line, ...]:
    return (
        straight(
            (-bodice.hem, bodice.hem_y), (0.0, bodice.hem_y + 0.012), (bodice.hem, bodice.hem_y)
        ),
    )


def skirt(shape: Shape) -> list[Part]:
    """A waistband over anything from a pencil to a full circle."""
    half_waist = lerp(0.15, 0.18, shape["fit"])
    top, bottom = 0.14, lerp(0.6, 0.95, shape["length"])
    half_hem = half_waist + lerp(0.03, 0.27, shape["flare"])
    body = skirt_part(half_waist, half_hem, top, bottom, shape["flare"], 0.03)
    hem = chain(
        bezier((-half_hem, bottom - 0.035), (0.0, bottom + 0.035), (half_hem, bottom - 0.035))
    )
    body = Part(
        body.label,
        body.outline,
        "main",
        body.origin,
        0.0,
        "skirt",
        body.flare,
        (Line("seam", hem),) if shape["detail"] > 0.5 else (),
    )
    return [body, band("waistband", half_waist - 0.004, half_waist + 0.004, 0.08, 0.145)]


def shirt(shape: Shape) -> list[Part]:
    """Collar, button placket, long or short sleeves with cuffs."""
    torso = _torso(shape, hem_y=lerp(0.82, 0.92, shape["length"]), ease=0.0)
    long_sleeves = shape["sleeve"] > 0.35
    angle = lerp(8.0, 20.0, shape["sleeve_angle"]) if long_sleeves else 28.0
    length = lerp(0.52, 0.6, shape["sleeve_width"]) if long_sleeves else 0.2
    parts = [torso.back()]
    parts += torso.sleeves(
        length, 0.095 if long_sleeves else 0.15, angle, 0.05 if long_sleeves else 0
    )
    lines = (
        straight((-0.018, torso.neck_depth), (-0.018, torso.hem_y + 0.01)),
        straight((0.018, torso.neck_depth), (0.018, torso.hem_y + 0.01)),
        buttons(0.0, torso.neck_depth + 0.06, torso.hem_y - 0.06, 6),
    )
    parts.append(Part("body", torso.outline(), lines=lines))
    if shape["detail"] > 0.4:
        x, y = 0.5 * torso.chest, 0.3
        pocket = np.array(
            [
                (x - 0.05, y),
                (x + 0.05, y),
                (x + 0.05, y + 0.1),
                (x, y + 0.12),
                (x - 0.05, y + 0.1),
                (x - 0.05, y),
            ]
        )
        parts[-1] = Part("body", torso.outline(), lines=(*lines, Line("seam", pocket)))
    return parts + _shirt_collar(torso)


def _shirt_collar(torso: Torso) -> list[Part]:
    neck, depth = torso.neck, torso.neck_depth
    leaf = np.array(
        [
            (0.0, depth - 0.004),
            (neck - 0.004, -0.022),
            (neck + 0.028, 0.012),
            (neck + 0.012, depth + 0.05),
        ]
    )
    return both_sides(Part("collar", leaf, "main", (neck, 0.0), -25.0, "none", sheer=False))


def t_shirt(shape: Shape) -> list[Part]:
    """Round or V neck with a rib, short wide sleeves, no opening."""
    torso = _torso(shape, hem_y=lerp(0.78, 0.9, shape["length"]), ease=0.02)
    if shape["kind"] > 0.65:
        torso = Torso(**{**vars(torso), "v_neck": True, "neck_depth": 0.13})
    parts = [torso.back()]
    parts += torso.sleeves(
        lerp(0.15, 0.24, shape["sleeve"]),
        lerp(0.14, 0.19, shape["sleeve_width"]),
        lerp(32.0, 52.0, shape["sleeve_angle"]),
    )
    half, y = torso.hem, torso.hem_y
    hem = straight((-half, y - 0.025), (0.0, y - 0.012), (half, y - 0.025))
    parts.append(Part("body", torso.outline(), lines=(hem,)))
    return [*parts, torso.neck_rib()]


def jacket(shape: Shape) -> list[Part]:
    """Open front over a lining, lapels or a stand collar, long sleeves, pockets."""
    torso = _torso(shape, hem_y=lerp(0.76, 0.92, shape["length"]), ease=0.035)
    parts = [torso.back()]
    parts += torso.sleeves(
        lerp(0.52, 0.6, shape["sleeve"]),
        lerp(0.12, 0.145, shape["sleeve_width"]),
        lerp(7.0, 16.0, shape["sleeve_angle"]),
        0.045 if shape["kind"] <= 0.5 else 0.0,
    )
    inner = np.array(
        [(-0.09, 0.02), (0.09, 0.02), (0.1, torso.hem_y - 0.02), (-0.1, torso.hem_y - 0.02)]
    )
    parts.append(Part("body", inner, "second", folds="soft", sheer=False))
    gap_top, gap_bottom = lerp(0.03, 0.06, shape["second"]), lerp(0.025, 0.075, shape["second"])
    outline = torso.outline()
    right = outline[outline[:, 0] > gap_bottom + 0.01]
    front = chain(
        [(gap_bottom, torso.hem_y + 0.012), (gap_top, 0.32), (torso.neck, 0.0)],
        right[np.argmax(right[:, 0] > torso.neck + 0.02) :],
    )
    lines = (
        straight((0.45 * torso.chest, 0.62), (0.85 * torso.chest, 0.6)),
        straight((0.45 * torso.chest, 0.645), (0.85 * torso.chest, 0.625)),
        buttons(gap_bottom + 0.03, 0.42, torso.hem_y - 0.1, 3),
    )
    parts += both_sides(Part("body", front, lines=lines))
    parts += _lapels(torso, gap_top, 0.40) if shape["kind"] > 0.5 else _stand_collar(torso)
    if shape["kind"] <= 0.5:
        parts += both_sides(_jacket_hem(torso, gap_bottom))
    return parts


def _jacket_hem(torso: Torso, gap: float) -> Part:
    y, half = torso.hem_y, torso.hem + 0.003
    outline = np.array([(gap, y - 0.03), (half, y - 0.045), (half, y + 0.004), (gap, y + 0.016)])
    return Part("trim", outline, "deep", folds="none", sheer=False)


def _lapels(torso: Torso, gap: float, depth: float) -> list[Part]:
    leaf = np.array(
        [
            (gap - 0.004, depth),
            (torso.neck - 0.01, -0.012),
            (torso.neck + 0.035, 0.01),
            (torso.neck + 0.062, 0.13),
            (torso.neck + 0.028, 0.15),
            (torso.neck + 0.048, 0.185),
        ]
    )
    return both_sides(Part("collar", leaf, "deep", (torso.neck, 0.0), -20.0, "none", sheer=False))


def _stand_collar(torso: Torso) -> list[Part]:
    leaf = np.array(
        [(0.02, 0.075), (torso.neck - 0.004, -0.03), (torso.neck + 0.03, 0.005), (0.05, 0.125)]
    )
    return both_sides(Part("collar", leaf, "deep", (torso.neck, 0.0), 0.0, "none", sheer=False))


def _legs(shape: Shape, bottom: float, half_hem: float) -> list[Part]:
    half_waist = lerp(0.145, 0.175, shape["fit"])
    hip, crotch = half_waist + 0.035, 0.36
    apart = lerp(0.012, 0.045, shape["second"])
    inner = apart + 0.004
    centre_hem = inner + half_hem
    leg = chain(
        [(0.0, 0.06), (half_waist, 0.06)],
        bezier((half_waist, 0.06), (hip, 0.14), (hip + 0.004, 0.26)),
        bezier(
            (hip + 0.004, 0.26),
            (lerp(hip, centre_hem + half_hem, 0.55), 0.5),
            (centre_hem + half_hem, bottom),
        ),
        bezier((centre_hem + half_hem, bottom), (centre_hem, bottom + 0.014), (inner, bottom)),
        bezier((inner, bottom), (inner + 0.004, lerp(crotch, bottom, 0.4)), (0.0, crotch)),
    )
    lines = (
        straight((0.0, 0.08), (0.0, crotch), kind="seam"),
        Line(
            "stitch",
            bezier(
                (0.45 * half_waist, 0.075), (0.62 * half_waist, 0.16), (half_waist + 0.02, 0.165)
            ),
        ),
        straight((inner + 0.004, bottom - 0.025), (centre_hem + half_hem - 0.002, bottom - 0.025)),
    )
    tilt = float(np.rad2deg(np.arctan2(centre_hem - 0.5 * half_waist, bottom - 0.1)))
    right = Part("legs", leg, "main", (0.5 * half_waist, 0.1), tilt, "limb", lines=lines)
    return [
        *both_sides(right),
        band("waistband", half_waist - 0.002, half_waist + 0.004, 0.015, 0.065),
    ]


def pants(shape: Shape) -> list[Part]:
    """Long legs: skinny, straight or flared."""
    return _legs(shape, lerp(0.9, 0.98, shape["length"]), lerp(0.05, 0.1, shape["flare"]))


def shorts(shape: Shape) -> list[Part]:
    """Short wide legs."""
    return _legs(shape, lerp(0.46, 0.58, shape["length"]), lerp(0.085, 0.12, shape["flare"]))


def _scaled(part: Part, wide: float, tall: float, shift: float) -> Part:
    factor = np.array([wide, tall])

    def move(points: Points) -> Points:
        moved: Points = points * factor + np.array([0.0, shift])
        return moved

    lines = tuple(Line(line.kind, move(line.points)) for line in part.lines)
    origin = (part.origin[0] * wide, part.origin[1] * tall + shift)
    return replace(part, outline=move(part.outline), origin=origin, lines=lines)


def hat(shape: Shape) -> list[Part]:
    """A wide-brimmed sun hat, a cap with a visor, or a beanie."""
    if shape["kind"] > 0.6:
        return _beanie(shape)
    return _cap(shape) if shape["kind"] > 0.32 else _sun_hat(shape)


def _dome(half: float, base: float, top: float) -> Points:
    return mirrored(
        chain(
            bezier((0.0, top), (0.8 * half, top), (0.94 * half, lerp(top, base, 0.5))),
            bezier((0.94 * half, lerp(top, base, 0.5)), (half, lerp(top, base, 0.8)), (half, base)),
            bezier((half, base), (0.5 * half, base + 0.05), (0.0, base + 0.05)),
        )
    )


def _sun_hat(shape: Shape) -> list[Part]:
    half, brim = lerp(0.19, 0.24, shape["fit"]), lerp(0.38, 0.48, shape["flare"])
    top = lerp(0.2, 0.3, shape["length"])
    under = round_part("brim", (0.0, 0.62), brim, lerp(0.09, 0.14, shape["detail"]), "main")
    ring = mirrored(
        chain(
            bezier((0.0, 0.58), (0.6 * half, 0.58), (half, 0.52)),
            [(half, 0.52), (half + 0.004, 0.595)],
            bezier((half + 0.004, 0.595), (0.6 * half, 0.655), (0.0, 0.655)),
        )
    )
    return [
        under,
        Part("body", _dome(half, 0.6, top)),
        Part("trim", ring, "second", folds="none", sheer=False),
    ]


def _cap(shape: Shape) -> list[Part]:
    half, top = lerp(0.26, 0.31, shape["fit"]), lerp(0.2, 0.27, shape["length"])
    visor = mirrored(
        chain(
            bezier((0.0, 0.55), (0.7 * half, 0.56), (half * 0.98, 0.6)),
            bezier(
                (half * 0.98, 0.6), (half * 1.02, 0.76), (0.0, lerp(0.76, 0.82, shape["flare"]))
            ),
        )
    )
    seams = tuple(
        Line("seam", bezier((0.0, top), (x * 1.2, lerp(top, 0.6, 0.4)), (x, 0.63)))
        for x in (-0.5 * half, 0.0, 0.5 * half)
    )
    return [
        Part(
            "body", _dome(half, 0.6, top), lines=(*seams, buttons(0.0, top + 0.004, top + 0.004, 1))
        ),
        Part("brim", visor, "deep", (0.0, 0.55), 0.0, "soft", sheer=False),
    ]


def _beanie(shape: Shape) -> list[Part]:
    half, top = lerp(0.24, 0.3, shape["fit"]), lerp(0.14, 0.24, shape["length"])
    fold_top, fold_bottom = 0.6, lerp(0.74, 0.8, shape["flare"])
    cuff = mirrored(
        chain(
            bezier(
                (0.0, fold_top + 0.035), (0.6 * half, fold_top + 0.035), (half + 0.008, fold_top)
            ),
            [(half + 0.008, fold_top), (half + 0.012, fold_bottom)],
            bezier(
                (half + 0.012, fold_bottom),
                (0.6 * half, fold_bottom + 0.035),
                (0.0, fold_bottom + 0.035),
            ),
        )
    )
    parts = [
        Part("body", _dome(half, 0.66, top)),
        Part("brim", cuff, "deep", folds="none", sheer=False),
    ]
    if shape["detail"] > 0.55:
        parts.insert(0, round_part("trim", (0.0, top - 0.02), 0.075, 0.07, "second"))
    return parts


def fabric(shape: Shape) -> list[Part]:
    """A length of cloth: filling the picture, or laid out with a scalloped or cut edge."""
    if shape["kind"] < 0.6:
        square = np.array([(-0.9, -0.4), (0.9, -0.4), (0.9, 1.4), (-0.9, 1.4)])
        return [Part("body", square, folds="drape", flare=shape["detail"])]
    half, top = lerp(0.4, 0.47, shape["fit"]), lerp(0.03, 0.1, shape["length"])
    bottom = lerp(0.86, 0.95, shape["flare"])
    count = int(lerp(6, 10, shape["hem"]))
    x = np.linspace(half, -half, 24 * count)
    depth = 0.03 * np.abs(np.sin(np.pi * count * (x + half) / (2 * half)))
    outline = chain([(-half, top), (half, top)], np.stack([x, bottom + depth], axis=1))
    return [Part("body", outline, folds="drape", flare=shape["detail"])]


_DRAWERS: Mapping[str, Callable[[Shape], list[Part]]] = {
    "dress": dress,
    "skirt": skirt,
    "shirt": shirt,
    "t-shirt": t_shirt,
    "pants": pants,
    "shorts": shorts,
    "jacket": jacket,
    "hat": hat,
    "fabric": fabric,
}

# Width, height and shift that make each category fill the picture, as a shop would frame it.
_FRAMING: Mapping[str, tuple[float, float, float]] = {
    "dress": (1.3, 1.04, -0.01),
    "skirt": (1.36, 1.22, -0.12),
    "shirt": (1.2, 1.06, 0.0),
    "t-shirt": (1.3, 1.12, 0.0),
    "pants": (1.42, 1.02, -0.01),
    "shorts": (1.72, 1.55, 0.06),
    "jacket": (1.2, 1.06, 0.0),
    "hat": (1.18, 1.3, -0.16),
}


def garment_parts(category: str, shape: Shape) -> list[Part]:
    """The parts of a garment, framed to fill the picture."""
    parts = _DRAWERS[category](shape)
    if category not in _FRAMING:
        return parts
    return [_scaled(part, *_FRAMING[category]) for part in parts]
