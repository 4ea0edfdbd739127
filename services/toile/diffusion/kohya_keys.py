"""Names that kohya's layout has for the modules that a LoRA changes.

Sources: `networks/lora.py` of kohya's sd-scripts, and `comfy/lora.py` of ComfyUI.
"""

import re
from collections.abc import Iterable

_UNET = "lora_unet_"
_ENCODERS = {"lora_te1_": "text_encoder.", "lora_te2_": "text_encoder_2."}
_LAYER = re.compile(
    r"text_model_encoder_layers_(?P<layer>\d+)_"
    r"(?P<block>self_attn|mlp)_(?P<linear>[qkv]_proj|out_proj|fc[12])"
)
_ATTENTION = re.compile(
    r"(?P<side>(?:down|up)_blocks|mid_block)(?:\.(?P<block>\d+))?"
    r"\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def kohya_name(path: str) -> str:
    """Return the name that Toile writes for a module of the UNet or, `text_encoder…`, of those."""
    for prefix, encoder in _ENCODERS.items():
        if path.startswith(encoder):
            return prefix + path.removeprefix(encoder).replace(".", "_")
    return _UNET + path.replace(".", "_")


def kohya_text_path(name: str) -> str | None:
    """Return the path of the text encoders' module that a name means; None if it means none."""
    for prefix, encoder in _ENCODERS.items():
        if not name.startswith(prefix):
            continue
        if name == prefix + "text_projection":
            return encoder + "text_projection"
        if found := _LAYER.fullmatch(name.removeprefix(prefix)):
            layer, block, linear = found["layer"], found["block"], found["linear"]
            return f"{encoder}text_model.encoder.layers.{layer}.{block}.{linear}"
    return None


def kohya_names(targets: Iterable[str]) -> dict[str, str]:
    """Return module paths by the names that kohya's layout has for them, of which there are two.

    sd-scripts train SDXL on Stability's own module names (`input_blocks.4.1` for
    `down_blocks.1.attentions.0`); other trainers, and Toile, write diffusers'. Readers take both.
    """
    paths = list(targets)
    names = {_UNET + path.replace(".", "_"): path for path in paths}
    inside = [match for path in paths if (match := _ATTENTION.fullmatch(path))]
    down_layers = [int(m["layer"]) for m in inside if m["side"] == "down_blocks"]
    stride = max(down_layers, default=0) + 2  # the layers of a block, and what changes its size
    for match in inside:
        rest = match["rest"].replace(".", "_")
        if match["side"] == "mid_block":
            names[f"{_UNET}middle_block_1_{rest}"] = match[0]
            continue
        down = match["side"] == "down_blocks"
        number = int(match["block"]) * stride + int(match["layer"]) + down  # after the input's own
        names[f"{_UNET}{'in' if down else 'out'}put_blocks_{number}_1_{rest}"] = match[0]
    return names
