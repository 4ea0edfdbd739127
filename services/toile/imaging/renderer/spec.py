"""What a rendered picture shows: a frozen specification, and how one is drawn at random."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from toile.imaging.colours import NAMED_COLOURS, RGB, lab_to_rgb, nearest_colour_name, rgb_to_lab
from toile.imaging.renderer.vocabulary import CATEGORIES, MATERIALS, PATTERNS

BACKGROUND_COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "white": (240, 240, 238),
        "grey": (176, 178, 182),
        "beige": (222, 208, 184),
        "pink": (238, 200, 208),
        "blue": (170, 200, 226),
        "green": (176, 206, 176),
        "yellow": (240, 226, 160),
        "black": (40, 40, 44),
    }
)
_BACKGROUND_WEIGHTS = (0.26, 0.24, 0.14, 0.08, 0.10, 0.06, 0.05, 0.07)

LACE_MOTIFS: tuple[str, ...] = ("daisy", "tulip", "leaf", "blossom")
"""Motif families the base is trained on; `rosette` is held out for the sample photographs."""

HELD_OUT_MOTIF = "rosette"

SKIN_TONES: tuple[RGB, ...] = ((236, 204, 180), (206, 160, 128), (150, 104, 78), (98, 66, 50))


@dataclass(frozen=True)
class Cloth:
    """One fabric: colours, what is printed or woven, and how large it repeats.

    scale is the pattern's repeat as a fraction of the picture's side. lining is what shows through
    lace; None lets the background through.
    """

    colour: RGB
    accent: RGB
    pattern: str = "plain"
    material: str = "cotton"
    scale: float = 0.1
    angle_degrees: float = 0.0
    motif: str = "daisy"
    lining: RGB | None = None
    seed: int = 0


@dataclass(frozen=True)
class Pose:
    """Where the garment lies in the picture: fractions of its side, and degrees."""

    centre_x: float = 0.5
    centre_y: float = 0.5
    scale: float = 0.86
    rotation_degrees: float = 0.0


@dataclass(frozen=True)
class Background:
    """Backdrop colour, kind (`plain`, `gradient`, `spot`, `paper`, `floor`) and its noise seed."""

    colour: RGB
    kind: str = "plain"
    seed: int = 0


@dataclass(frozen=True)
class GarmentSpec:
    """Everything a render depends on but its size.

    shape holds the silhouette's own numbers in 0..1 (sleeve, neck, fit, ...), read by
    `silhouettes`; names holds the words that captions use.
    """

    category: str
    cloth: Cloth
    background: Background
    pose: Pose
    names: Mapping[str, str]
    shape: Mapping[str, float] = field(default_factory=dict)
    light: float = 0.0
    seed: int = 0


def sample_spec(
    rng: np.random.Generator,
    *,
    category: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
    material: str | None = None,
    background: str | None = None,
) -> GarmentSpec:
    """Draw a specification; what is given is kept, the rest is random."""
    category = category or str(rng.choice(CATEGORIES))
    material = material or _pick_material(rng, category, pattern)
    pattern = pattern or _pick_pattern(rng, material)
    colour = colour or _pick_colour(rng, material)
    ground = jitter_colour(rng, colour)
    backdrop_name, backdrop = _pick_background(rng, ground, background)
    lace = material == "lace"
    names = {
        "category": category,
        "colour": colour,
        "pattern": "floral" if lace else pattern,
        "material": material,
        "background": backdrop_name,
    }
    cloth = Cloth(
        colour=ground,
        accent=_pick_accent(rng, ground),
        pattern="plain" if lace else pattern,
        material=material,
        scale=float(rng.uniform(0.46, 0.68) if lace else rng.uniform(0.075, 0.125)),
        angle_degrees=_pick_angle(rng, pattern),
        motif=str(rng.choice(LACE_MOTIFS)),
        lining=_pick_lining(rng, ground, category) if lace else None,
        seed=int(rng.integers(2**31)),
    )
    return GarmentSpec(
        category=category,
        cloth=cloth,
        background=Background(
            backdrop,
            str(rng.choice(["plain", "gradient", "spot", "paper", "floor"])),
            int(rng.integers(2**31)),
        ),
        pose=Pose(
            centre_x=float(0.5 + rng.normal(0, 0.015)),
            centre_y=float(0.5 + rng.normal(0, 0.015)),
            scale=float(rng.uniform(0.84, 0.96)),
            rotation_degrees=float(np.clip(rng.normal(0, 2.0), -5, 5)),
        ),
        names=MappingProxyType(names),
        shape=MappingProxyType({key: float(rng.random()) for key in SHAPE_KEYS}),
        light=float(rng.uniform(-1, 1)),
        seed=int(rng.integers(2**31)),
    )


SHAPE_KEYS: tuple[str, ...] = (
    "length",
    "fit",
    "flare",
    "sleeve",
    "sleeve_width",
    "sleeve_angle",
    "neck",
    "neck_depth",
    "kind",
    "detail",
    "second",
    "hem",
)


def jitter_colour(rng: np.random.Generator, name: str) -> RGB:
    """A shade of a named colour that still deserves the name."""
    centre = rgb_to_lab(NAMED_COLOURS[name])
    for _ in range(20):
        shade = lab_to_rgb(centre + rng.normal(0, (4.0, 4.0, 4.0)))
        if nearest_colour_name(shade) == name:
            return shade
    return NAMED_COLOURS[name]


def colour_distance(first: RGB, second: RGB) -> float:
    """Distance in CIELAB (about 2 is just noticeable)."""
    return float(np.linalg.norm(rgb_to_lab(first) - rgb_to_lab(second)))


def _pick_colour(rng: np.random.Generator, material: str) -> str:
    """Any name alike, but lace is white, beige or black half of the time, as it is in shops."""
    if material == "lace" and rng.random() < 0.5:
        return str(rng.choice(["white", "white", "white", "beige", "black"]))
    return str(rng.choice(list(NAMED_COLOURS)))


def _pick_material(rng: np.random.Generator, category: str, pattern: str | None) -> str:
    if pattern not in (None, "plain", "floral"):
        return "cotton"
    weights = np.array([0.46, 0.12, 0.18, 0.12, 0.12])
    if category == "fabric":
        weights = np.array([0.36, 0.10, 0.32, 0.12, 0.10])
    if category == "hat":
        weights = np.array([0.5, 0.12, 0.08, 0.22, 0.08])
    return str(rng.choice(MATERIALS, p=weights / weights.sum()))


def _pick_pattern(rng: np.random.Generator, material: str) -> str:
    if material != "cotton":
        return "plain"
    weights = np.array([0.34, 0.13, 0.12, 0.11, 0.08, 0.14, 0.08])
    return str(rng.choice(PATTERNS, p=weights))


def _pick_angle(rng: np.random.Generator, pattern: str) -> float:
    if pattern == "striped":
        return float(rng.choice([0.0, 90.0, 90.0, 45.0]) + rng.normal(0, 1.0))
    return float(rng.normal(0, 2.0))


def _pick_accent(rng: np.random.Generator, ground: RGB) -> RGB:
    """A second colour that stands off the ground; white and black most often."""
    names = ["white", "black", *NAMED_COLOURS]
    for _ in range(20):
        accent = NAMED_COLOURS[str(rng.choice(names))]
        if colour_distance(accent, ground) > 45:
            return accent
    return NAMED_COLOURS["white"]


def _pick_background(rng: np.random.Generator, ground: RGB, wanted: str | None) -> tuple[str, RGB]:
    for _ in range(20):
        name = wanted or str(rng.choice(list(BACKGROUND_COLOURS), p=_BACKGROUND_WEIGHTS))
        colour = lab_to_rgb(rgb_to_lab(BACKGROUND_COLOURS[name]) + rng.normal(0, (3.0, 1.5, 1.5)))
        if colour_distance(colour, ground) > (10 if wanted else 26):
            return name, colour
    return ("white", (240, 240, 238)) if wanted is None else (wanted, BACKGROUND_COLOURS[wanted])


def _pick_lining(rng: np.random.Generator, thread: RGB, category: str) -> RGB | None:
    """What lies under lace: skin, or cloth darker or lighter than the thread; swatches lie open."""
    if category == "fabric" and rng.random() < 0.4:
        return None
    for _ in range(30):
        if rng.random() < 0.3:
            under = SKIN_TONES[int(rng.integers(len(SKIN_TONES)))]
        else:
            under = NAMED_COLOURS[
                str(rng.choice(["black", "grey", "navy", "beige", "teal", "white"]))
            ]
        if colour_distance(under, thread) > 32:
            return under
    return NAMED_COLOURS["grey"]
