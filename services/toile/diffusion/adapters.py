"""LoRA files: diffusers' PEFT layout and kohya's, read and written without loss.

A model version holds both. Sources: diffusers' `save_lora_weights` with its
`lora_adapter_metadata` header, and the key rules of kohya's sd-scripts that ComfyUI and InvokeAI
read: `lora_unet_<module path, dots as underscores>.lora_down.weight`, `.lora_up.weight` and
`.alpha`, with `lora_te1_` and `lora_te2_` for the text encoders' modules. The strength of a layer
is alpha / rank; both files carry the real alpha.

A DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024) also says how long each
row of the changed weight is: `lora_magnitude_vector` `[out]` in PEFT's layout, and in kohya's
`dora_scale` `[out, 1]`, as LyCORIS writes it (`wd_on_output`); `[1, in]` is of columns: another
adapter.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_header import AdapterCard, header
from toile.diffusion.kohya_keys import kohya_name, kohya_names, kohya_text_path
from toile.diffusion.peft_config import (
    METADATA,
    PARTS,
    TEXT_MODEL,
    alpha_of,
    bad_adapter,
    by_pattern,
    commonest,
    make_config,
    read_config,
)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"

_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_KOHYA_ALPHA = ".alpha"
_KOHYA_ENDS = {".lora_down.weight": _DOWN, ".lora_up.weight": _UP, ".dora_scale": _MAGNITUDE}
"""PEFT's ends of names by those of kohya's."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The update of one Linear to `V = W + alpha / rank * up down`; with magnitudes of V's rows."""

    down: torch.Tensor
    """`[rank, in]`"""
    up: torch.Tensor
    """`[out, rank]`"""
    alpha: float
    magnitude: torch.Tensor | None = None
    """`[out]`, what the norms of V's rows are brought to; None if they are left as they are."""

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return int(self.down.shape[0])

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What it holds, by the ends of PEFT's names."""
        more = {} if self.magnitude is None else {_MAGNITUDE: self.magnitude}
        return {_DOWN: self.down, _UP: self.up, **more}


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A LoRA in memory."""

    layers: Mapping[str, LoraLayer]
    """By the UNet's module path."""
    header: Mapping[str, str] = field(default_factory=dict)
    """The file's."""
    text_layers: Mapping[str, LoraLayer] = field(default_factory=dict)
    """Of the text encoders, by module path as files have it:
    `text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj`."""

    @property
    def base_digest(self) -> str:
        """Digest of the base it was trained on; empty when the file does not say."""
        return self.header.get("toile.base_digest", "")

    @property
    def is_dora(self) -> bool:
        """Whether it brings rows of the UNet's weights to magnitudes, of all its layers then."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def size_bytes(self) -> int:
        """Bytes that the layers take."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in (*self.layers.values(), *self.text_layers.values())
            for tensor in layer.tensors.values()
        )

    def peft_state(self) -> dict[str, torch.Tensor]:
        """Return the UNet's tensors under PEFT's names, relative to it."""
        return _peft_state(self.layers)

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of the `peft.LoraConfig` that gives each layer its strength."""
        return _config_of(self.layers, anchor="^")


def write_lora(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    rank: int,
    alpha: float,
    card: AdapterCard,
) -> list[Path]:
    """Write a trained LoRA as both files and return their paths.

    Args:
        folder: Where to; made when it is not there.
        state: Tensors under PEFT's names, as `get_peft_model_state_dict(unet)` gives them; those
            of text encoders after `text_encoder.` and `text_encoder_2.`.
        rank: Rank of the training's configuration.
        alpha: Alpha of the training's configuration.
        card: What the headers say of it.

    Raises:
        InvalidArgumentError: The tensors are no LoRA of this rank (`BAD_ADAPTER`).
    """
    weights = _weights_of(_by_path(state), lambda _: float(alpha), {})
    for path, layer in (*weights.layers.items(), *weights.text_layers.items()):
        if layer.rank != rank:
            raise bad_adapter(f"{path} has rank {layer.rank}, not {rank}")
    return write_adapter(folder, weights, card)


def write_adapter(folder: Path, weights: AdapterWeights, card: AdapterCard) -> list[Path]:
    """Write an adapter as both files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = commonest(layer.rank for layer in weights.layers.values())
    alpha = commonest(layer.alpha for layer in weights.layers.values())
    kohya = _kohya_state(weights)
    save_file(kohya, folder / KOHYA_FILE, metadata=header(card, kohya, rank=rank, alpha=alpha))
    state = {f"unet.{key}": value for key, value in weights.peft_state().items()}
    state |= _peft_state(weights.text_layers)
    state = {key: value.contiguous() for key, value in state.items()}
    config = {f"unet.{key}": value for key, value in weights.peft_config().items()}
    for part in PARTS[1:]:
        # Matched from their end, without `text_model.`: diffusers 0.42 strips that of the keys of
        # an encoder that transformers has flattened, but not of this.
        layers = {
            path.removeprefix(part).removeprefix(TEXT_MODEL): layer
            for path, layer in weights.text_layers.items()
            if path.startswith(part)
        }
        if layers:
            config |= {part + key: value for key, value in _config_of(layers).items()}
    save_file(
        state,
        folder / DIFFUSERS_FILE,
        metadata={
            **header(card, state, rank=rank, alpha=alpha),
            "format": "pt",
            METADATA: json.dumps(config, indent=2, sort_keys=True),
        },
    )
    return [folder / DIFFUSERS_FILE, folder / KOHYA_FILE]


def load_lora(folder: Path, *, targets: Iterable[str] = ()) -> AdapterWeights:
    """Read the adapter of a model version: diffusers' file if there, else kohya's.

    Args:
        folder: The version's folder.
        targets: Module paths of the UNet, needed to undo kohya's underscores.

    Raises:
        InvalidArgumentError: No file, or one that cannot be applied whole (`BAD_ADAPTER`).
    """
    if (folder / DIFFUSERS_FILE).is_file():
        return read_diffusers(folder / DIFFUSERS_FILE)
    if (folder / KOHYA_FILE).is_file():
        return read_kohya(folder / KOHYA_FILE, targets)
    raise bad_adapter(f"{folder.name} has neither {DIFFUSERS_FILE} nor {KOHYA_FILE}")


def read_diffusers(path: Path) -> AdapterWeights:
    """Read a file in diffusers' PEFT layout.

    Without `lora_adapter_metadata` the alpha is the rank, as diffusers takes it.

    Raises:
        InvalidArgumentError: It cannot be applied whole (`BAD_ADAPTER`).
    """
    state, facts = _read(path)
    config = read_config(facts)
    weights = _weights_of(_by_path(state), lambda layer: alpha_of(config, layer), facts)
    for layer_path, layer in (*weights.layers.items(), *weights.text_layers.items()):
        declared = by_pattern(config, "rank_pattern", "r", layer_path)
        if declared is not None and int(declared) != layer.rank:
            raise bad_adapter(f"{layer_path} has rank {layer.rank}; the header says {declared}")
    # A header that says nothing of it leaves it to the keys, but none says all of the rest.
    if config and bool(config.get("unet.use_dora")) != weights.is_dora:
        raise bad_adapter("its header and its keys differ in whether it is a DoRA")
    return weights


def read_kohya(path: Path, targets: Iterable[str]) -> AdapterWeights:
    """Read a file in kohya's layout; a layer without `.alpha` has the strength 1, as there.

    Raises:
        InvalidArgumentError: It cannot be applied whole (`BAD_ADAPTER`).
    """
    state, facts = _read(path)
    paths = kohya_names(targets)
    renamed: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name, dot, rest = key.partition(".")
        suffix, target = dot + rest, paths.get(name) or kohya_text_path(name)
        if target is None or suffix not in (*_KOHYA_ENDS, _KOHYA_ALPHA):
            raise _unknown_key(key)
        if suffix == _KOHYA_ALPHA and tensor.numel() != 1:
            raise bad_adapter(f"{key} is not one number")
        part = target + _KOHYA_ENDS.get(suffix, "")
        if (target in alphas) if suffix == _KOHYA_ALPHA else (part in renamed):
            raise bad_adapter(f"{target} is there twice, under both of its names")
        if suffix == _KOHYA_ALPHA:
            alphas[target] = float(tensor)
        elif part.endswith(_MAGNITUDE) and tensor.ndim == 2 and tensor.shape[1] == 1:
            renamed[part] = tensor[:, 0]
        else:
            renamed[part] = tensor
    weights = _weights_of(renamed, alphas.get, facts)
    for orphan in alphas.keys() - weights.layers.keys() - weights.text_layers.keys():
        raise bad_adapter(f"{orphan} has an alpha but no weights")
    return weights


def linear_targets(network: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return the Linears that a LoRA can change: (in, out) by module path."""
    targets: dict[str, tuple[int, int]] = {}
    for path, module in network.named_modules():
        base = getattr(module, "base_layer", module)  # a Linear that peft has wrapped
        inside = ".base_layer" in path or ".lora_" in path
        if isinstance(base, torch.nn.Linear) and not inside:
            targets[path] = (base.in_features, base.out_features)
    return targets


def text_path(path: str) -> str:
    """Return a text encoder's module path as files have it: of an encoder that is not flattened."""
    part, _, rest = path.partition(".")
    return f"{part}.{TEXT_MODEL}{rest}" if rest.startswith("encoder.") else path


def _peft_state(layers: Mapping[str, LoraLayer]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path, layer in sorted(layers.items()):
        state |= {path + end: tensor for end, tensor in layer.tensors.items()}
    return state


def _config_of(layers: Mapping[str, LoraLayer], *, anchor: str = "") -> dict[str, Any]:
    return make_config(
        {path: layer.rank for path, layer in layers.items()},
        {path: layer.alpha for path, layer in layers.items()},
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        anchor=anchor,
    )


def _kohya_state(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path, layer in sorted({**weights.layers, **weights.text_layers}.items()):
        name = kohya_name(path)
        for end, theirs in _KOHYA_ENDS.items():
            if (tensor := layer.tensors.get(theirs)) is not None:
                state[name + end] = tensor.reshape(len(tensor), -1).contiguous()
        state[name + _KOHYA_ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def _weights_of(
    state: Mapping[str, torch.Tensor], alpha_of: Any, facts: Mapping[str, str]
) -> AdapterWeights:
    """Pair downs with ups; `alpha_of(path)` may be None, for an alpha equal to the rank."""
    layers: dict[str, LoraLayer] = {}
    for key in sorted(state):
        path = key.removesuffix(_DOWN).removesuffix(_UP).removesuffix(_MAGNITUDE)
        if path == key:
            raise _unknown_key(key)
        down, up, magnitude = (state.get(path + end) for end in (_DOWN, _UP, _MAGNITUDE))
        if down is None or up is None:
            raise bad_adapter(f"{path} lacks half of its weights")
        if down.ndim != 2 or up.ndim != 2:
            raise bad_adapter(f"{path} is not the LoRA of a Linear, and others cannot be served")
        if down.shape[0] != up.shape[1] or not down.shape[0]:
            raise bad_adapter(f"{path} has ranks {down.shape[0]} and {up.shape[1]}")
        if magnitude is not None:
            _check_magnitude(path, magnitude, up)
        if not all(t.isfinite().all() for t in (down, up, magnitude) if t is not None):
            raise bad_adapter(f"{path} holds numbers that are not finite")
        alpha = alpha_of(path)
        alpha = float(down.shape[0] if alpha is None else alpha)
        if not math.isfinite(alpha):
            raise bad_adapter(f"{path} has the alpha {alpha}")
        layers[path] = LoraLayer(down, up, alpha, magnitude)
    text_layers = {path: layer for path, layer in layers.items() if path.startswith(PARTS[1:])}
    of_unet = {path: layer for path, layer in layers.items() if path not in text_layers}
    if not of_unet:
        raise bad_adapter("it has no layers of the UNet")
    plain = sorted(path for path, layer in of_unet.items() if layer.magnitude is None)
    if 0 < len(plain) < len(of_unet):
        raise bad_adapter(
            f"it is a DoRA, and {plain[0]} has no magnitudes ({len(plain)} such layers)"
        )
    return AdapterWeights(of_unet, facts, text_layers)


def _check_magnitude(path: str, magnitude: torch.Tensor, up: torch.Tensor) -> None:
    if path.startswith(PARTS[1:]):
        raise bad_adapter(f"{path} is a DoRA of a text encoder, and only the UNet's can be served")
    if magnitude.shape != up.shape[:1]:
        raise bad_adapter(
            f"{path} is a DoRA whose magnitudes are {list(magnitude.shape)}, not one for each of "
            f"{len(up)} rows, as PEFT has them"
        )


def _by_path(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strip what may stand before the UNet's own paths; those of text encoders become files'."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        path = text_path(key.removeprefix("base_model.model.").removeprefix("unet."))
        if path in found:
            raise bad_adapter(f"{path[:200]} is there twice, under both of its names")
        found[path] = tensor
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise bad_adapter(f"{path.name} is not a safetensors file: {error}") from error


def _unknown_key(key: str) -> InvalidArgumentError:
    return bad_adapter(
        f"{key[:200]} is not a LoRA tensor of the UNet or the text encoders; nothing of a file is "
        "left out"
    )
