"""How strong PEFT and diffusers make a LoRA: the `peft.LoraConfig` in a file's header.

Source: diffusers' `save_lora_weights`, which puts it under `lora_adapter_metadata`, each name after
the network that it is of: `unet.lora_alpha`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from toile.core.errors import InvalidArgumentError

METADATA = "lora_adapter_metadata"
PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
TEXT_MODEL = "text_model."
"""Around an encoder's modules in files; in memory where transformers does not flatten them."""


def make_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, use_dora: bool, anchor: str = ""
) -> dict[str, Any]:
    """Return the arguments of the `peft.LoraConfig` that gives each layer its strength.

    Args:
        ranks: By module path.
        alphas: By module path.
        use_dora: Whether the layers have magnitudes.
        anchor: What exceptions' paths begin with: `^` where they are whole paths.
    """
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    return {
        **({"use_dora": True} if use_dora else {}),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchor + p: r for p, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {anchor + p: a for p, a in sorted(alphas.items()) if a != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def read_config(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return what a header says, each name after its network's; empty when it says nothing.

    Raises:
        InvalidArgumentError: It is none, or asks for what cannot be served (`BAD_ADAPTER`).
    """
    try:
        config = json.loads(facts.get(METADATA, "{}"))
    except ValueError as error:
        raise bad_adapter(f"{METADATA} is not JSON") from error
    if not isinstance(config, dict):
        raise bad_adapter(f"{METADATA} is not a JSON object")
    for feature, parts in (("use_dora", PARTS[1:]), ("use_rslora", PARTS), ("lora_bias", PARTS)):
        if any(config.get(part + feature) for part in parts):
            raise bad_adapter(f"it needs {feature}, which cannot be served")
    return {key if key.startswith(PARTS) else f"unet.{key}": config[key] for key in config}


def alpha_of(config: Mapping[str, Any], path: str) -> float | None:
    """Return a layer's alpha; None if nothing is said of it.

    Raises:
        InvalidArgumentError: It is no number (`BAD_ADAPTER`).
    """
    alpha = by_pattern(config, "alpha_pattern", "lora_alpha", path)
    if alpha is not None and not isinstance(alpha, int | float):
        raise bad_adapter(f"{METADATA} has an alpha of {path} that is no number")
    return None if alpha is None else float(alpha)


def by_pattern(config: Mapping[str, Any], pattern: str, default: str, path: str) -> Any:
    """Look a layer's value up as PEFT does: by a key that is its path or the end of it."""
    part = next((part for part in PARTS if path.startswith(part)), "unet.")
    path = path.removeprefix(part).removeprefix(TEXT_MODEL)
    for key, value in (config.get(part + pattern) or {}).items():
        plain = str(key).removeprefix("^").removeprefix(TEXT_MODEL)
        if path == plain or (not str(key).startswith("^") and path.endswith("." + plain)):
            return value
    return config.get(part + default)


def commonest(values: Iterable[Any]) -> Any:
    """Return the value that is there most often."""
    return Counter(values).most_common(1)[0][0]


def bad_adapter(message: str) -> InvalidArgumentError:
    """Return the error of a file that cannot be applied whole (`BAD_ADAPTER`)."""
    return InvalidArgumentError(
        f"the adapter cannot be used: {message}", field="adapters", reason="BAD_ADAPTER"
    )
