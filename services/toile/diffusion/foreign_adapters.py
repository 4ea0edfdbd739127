"""LoRA files that were trained elsewhere: read whole, or refused with what stands against it.

The keys say what a file holds. Sources of their names: ComfyUI's `comfy/lora.py` and LyCORIS'
modules, which between them know the kinds that go around.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_fit import check_fits, check_layers
from toile.diffusion.adapters import (
    AdapterWeights,
    linear_targets,
    read_diffusers,
    read_kohya,
    text_path,
)
from toile.diffusion.banked_unet import ATTENTION_TARGETS, bank_layout
from toile.diffusion.kohya_keys import kohya_name, kohya_names
from toile.diffusion.text_encoders import text_targets
from toile.diffusion.triton.packed import check_adapter

_KINDS = {
    "text embeddings": r"bundle_emb\..*",
    "layers of another architecture": (
        r"(lora_prior_|lora_transformer_|transformer\.|diffusion_model\.).*"
    ),
    "LoHa": r".*\.hada_\w+",
    "LoKr": r".*\.lokr_\w+",
    "OFT": r".*\.(b?oft_\w+|oft_R\..*)",
    "GLoRA": r".*\.[ab][12]\.weight",
    "IA3": r".*\.on_input",
    "convolution layers": r".*\.lora_mid\.weight",
    "whole weights": r".*\.(diff|diff_b|set_weight|w_norm|b_norm)",
    "diffusers' early layout": r".*(\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_ENDS = re.compile(r"\.(lora_(down|up|A|B)\.weight|alpha|dora_scale|lora_magnitude_vector)$")
_TYPES = frozenset({"F32", "F16", "BF16"})
_SDXL = {"modelspec.architecture": "stable-diffusion-xl", "ss_base_model_version": "sdxl"}
_PICKLES = (b"\x80", b"PK\x03\x04")  # a bare one, and the archive that torch puts them in


def read_foreign(
    path: Path,
    unet: UNet2DConditionModel,
    text_encoders: Mapping[str, nn.Module],
    ends: Sequence[str] = ATTENTION_TARGETS,
) -> AdapterWeights:
    """Read a LoRA in kohya's layout or in diffusers'; nothing of it is left out.

    Args:
        path: A safetensors file.
        unet: Of the base that it is for; may be on the meta device.
        text_encoders: The base's, by name; likewise.
        ends: Of the module paths that the engine takes adapters for.

    Raises:
        InvalidArgumentError: It is no safetensors file or damaged (`BAD_ADAPTER`), holds what
            cannot be served; metadata say which and how much (`UNSUPPORTED_ADAPTER`), or does
            not fit the base (`ADAPTER_MISMATCH`).
    """
    with path.open("rb") as file:
        head = file.read(9)
        # A safetensors file begins with the length of its header, which may look like a pickle.
        if head.startswith(_PICKLES) and not head.endswith(b"{"):
            raise _refused("it is a pickle, which may run code; only safetensors are read")
    targets, text = linear_targets(unet), text_targets(text_encoders)
    kohya = _check_contents(path, set(targets), set(text))
    weights = read_kohya(path, targets) if kohya else read_diffusers(path)
    check_fits(weights, targets)
    check_layers(weights.text_layers, text)
    if not weights.is_dora:  # which no engine takes
        _check_served(weights, ends)
        check_adapter(weights, bank_layout(unet, ends))
    return weights


def _check_served(weights: AdapterWeights, ends: Sequence[str]) -> None:
    """Refuse layers that the engine could take, but was not made for."""
    dotted = tuple("." + end for end in ends)
    if others := sorted(path for path in weights.layers if not path.endswith(dotted)):
        raise InvalidArgumentError(
            f"the file changes {others[0]} ({len(others)} such layers), and the engine takes "
            f"LoRAs of {', '.join(ends)} alone; TOILE_ENGINE__TARGETS=transformer has it take "
            "those of all Linears of the UNet's transformers",
            field="chunk",
            reason="UNSUPPORTED_ADAPTER",
            metadata={"feature": "layers", "key": others[0], "count": str(len(others))},
        )


def _check_contents(path: Path, targets: set[str], text: set[str]) -> bool:
    """Look at the keys without reading the tensors; say whether the layout is kohya's."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: len(piece.get_shape()) for key, piece in slices.items()}
            types = {key: piece.get_dtype() for key, piece in slices.items()}
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise _refused(f"it is not a safetensors file: {error}") from error
    _check_architecture(facts)
    kohya = any(key.startswith("lora_unet_") for key in shapes)
    known = {*kohya_names(targets), *map(kohya_name, text)} if kohya else targets | text
    found = [
        (kind, key)
        for key in sorted(shapes)
        for kind in _unsupported(key, shapes[key], types[key], known)
    ]
    if found:
        kind, key = found[0]
        counts = Counter(kind for kind, _ in found)
        what = ", ".join(f"{kind} ({count} tensors)" for kind, count in counts.items())
        raise InvalidArgumentError(
            f"the file holds {what}, such as {key[:200]}; only LoRAs of the Linears "
            "of the UNet and the text encoders can be served, and nothing of a file is left out",
            field="chunk",
            reason="UNSUPPORTED_ADAPTER",
            metadata={"feature": kind, "key": key[:200], "count": str(counts[kind])},
        )
    return kohya


def _unsupported(key: str, dimensions: int, dtype: str, known: set[str]) -> Iterator[str]:
    """Yield why a tensor cannot be served, the first of the reasons."""
    for kind, pattern in _PATTERNS.items():
        if pattern.fullmatch(key):
            yield kind
            return
    layer = re.sub(r"^(base_model\.model\.)?(unet\.)?", "", key)
    layer = text_path(re.sub(_ENDS, "", layer))
    if dimensions > 2:
        yield "convolution layers"
    elif layer not in known:
        yield "unknown keys"
    elif dtype not in _TYPES:
        yield f"numbers of type {dtype}"


def _check_architecture(facts: dict[str, str]) -> None:
    for key, wanted in _SDXL.items():
        if not facts.get(key, wanted).startswith(wanted):
            raise InvalidArgumentError(
                f"the file says that it is for {facts[key][:80]} ({key}); the bases are SDXL's",
                field="chunk",
                reason="ADAPTER_MISMATCH",
                metadata={"key": key, "value": facts[key][:80]},
            )


def _refused(why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the file cannot be imported: {why}", field="chunk", reason="BAD_ADAPTER"
    )
