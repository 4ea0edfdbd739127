"""The words the renderer can draw, and the base model therefore knows."""

CATEGORIES: tuple[str, ...] = (
    "dress",
    "skirt",
    "shirt",
    "t-shirt",
    "pants",
    "shorts",
    "jacket",
    "hat",
    "fabric",
)
"""Eight garments, and `fabric` for a textile swatch."""

GARMENTS: tuple[str, ...] = CATEGORIES[:-1]

PATTERNS: tuple[str, ...] = (
    "plain",
    "striped",
    "dotted",
    "checked",
    "plaid",
    "floral",
    "zigzag",
)

MATERIALS: tuple[str, ...] = ("cotton", "denim", "lace", "knit", "satin")

PART_NAMES: tuple[str, ...] = (
    "background",
    "body",
    "sleeves",
    "collar",
    "skirt",
    "legs",
    "waistband",
    "trim",
    "brim",
)
"""Index in this tuple = value in a label map; a whole garment is every value but 0."""

PATTERN_SYNONYMS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "dotted": ("dotted", "polka dot"),
    "checked": ("checked", "gingham"),
    "plaid": ("plaid", "tartan"),
    "floral": ("floral", "flowered"),
    "zigzag": ("zigzag", "chevron"),
}
