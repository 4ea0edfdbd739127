"""What adapters there are."""

import enum


class AdapterType(enum.StrEnum):
    """What a model version is; the name of its recipe, too."""

    LORA = "lora"
    CONTROLNET = "controlnet"
