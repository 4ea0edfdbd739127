"""LoRA files: diffusers' PEFT layout and kohya's, read and written without loss.

A model version holds both. Sources: diffusers' `save_lora_weights` with its
`lora_adapter_metadata` header, and the key rules of kohya's sd-scripts that ComfyUI and InvokeAI
read: `lora_unet_<module path, dots as underscores>.lora_down.weight`, `.lora_up.weight` and
`.alpha`, with `lora_te1_` and `lora_te2_` for the text encoders' modules. The strength of a layer
is alpha / rank; both files carry the real alpha.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_header import AdapterCard, header
from toile.diffusion.bank import MAX_RANK
from toile.diffusion.kohya_keys import kohya_name, kohya_names, kohya_text_path

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"

_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
_TEXT_MODEL = "text_model."
"""Around an encoder's modules in files; in memory where transformers does not flatten them."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_KOHYA_DOWN, _KOHYA_UP, _KOHYA_ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The update of one Linear: `W x + alpha / rank * up (down x)`."""

    down: torch.Tensor
    """`[rank, in]`"""
    up: torch.Tensor
    """`[out, rank]`"""
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return int(self.down.shape[0])


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
    def size_bytes(self) -> int:
        """Bytes that the layers take."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in (*self.layers.values(), *self.text_layers.values())
            for tensor in (layer.down, layer.up)
        )

    def peft_state(self) -> dict[str, torch.Tensor]:
        """Return the UNet's tensors under PEFT's names, relative to it."""
        return _peft_state(self.layers)

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of the `peft.LoraConfig` that gives each layer its strength."""
        return _peft_config(self.layers, anchor="^")


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
            raise _bad(f"{path} has rank {layer.rank}, not {rank}")
    return write_adapter(folder, weights, card)


def write_adapter(folder: Path, weights: AdapterWeights, card: AdapterCard) -> list[Path]:
    """Write an adapter as both files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = _commonest(layer.rank for layer in weights.layers.values())
    alpha = _commonest(layer.alpha for layer in weights.layers.values())
    kohya = _kohya_state(weights)
    save_file(kohya, folder / KOHYA_FILE, metadata=header(card, kohya, rank=rank, alpha=alpha))
    state = {f"unet.{key}": value for key, value in weights.peft_state().items()}
    state |= _peft_state(weights.text_layers)
    state = {key: value.contiguous() for key, value in state.items()}
    config = {f"unet.{key}": value for key, value in weights.peft_config().items()}
    for part in _PARTS[1:]:
        # Matched from their end, without `text_model.`: diffusers 0.42 strips that of the keys of
        # an encoder that transformers has flattened, but not of this.
        layers = {
            path.removeprefix(part).removeprefix(_TEXT_MODEL): layer
            for path, layer in weights.text_layers.items()
            if path.startswith(part)
        }
        if layers:
            config |= {part + key: value for key, value in _peft_config(layers).items()}
    save_file(
        state,
        folder / DIFFUSERS_FILE,
        metadata={
            **header(card, state, rank=rank, alpha=alpha),
            "format": "pt",
            _DIFFUSERS_METADATA: json.dumps(config, indent=2, sort_keys=True),
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
    raise _bad(f"{folder.name} has neither {DIFFUSERS_FILE} nor {KOHYA_FILE}")


def read_diffusers(path: Path) -> AdapterWeights:
    """Read a file in diffusers' PEFT layout.

    Without `lora_adapter_metadata` the alpha is the rank, as diffusers takes it.

    Raises:
        InvalidArgumentError: It cannot be applied whole (`BAD_ADAPTER`).
    """
    state, facts = _read(path)
    config = _peft_config_of(facts)
    weights = _weights_of(_by_path(state), lambda layer: _alpha_of(config, layer), facts)
    for layer_path, layer in (*weights.layers.items(), *weights.text_layers.items()):
        declared = _by_pattern(config, "rank_pattern", "r", layer_path)
        if declared is not None and int(declared) != layer.rank:
            raise _bad(f"{layer_path} has rank {layer.rank}; the header says {declared}")
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
        if target is None or suffix not in (_KOHYA_DOWN, _KOHYA_UP, _KOHYA_ALPHA):
            raise _unknown_key(key)
        if suffix == _KOHYA_ALPHA and tensor.numel() != 1:
            raise _bad(f"{key} is not one number")
        half = target + (_DOWN if suffix == _KOHYA_DOWN else _UP)
        if (target in alphas) if suffix == _KOHYA_ALPHA else (half in renamed):
            raise _bad(f"{target} is there twice, under both of its names")
        if suffix == _KOHYA_ALPHA:
            alphas[target] = float(tensor)
        else:
            renamed[half] = tensor
    weights = _weights_of(renamed, alphas.get, facts)
    for orphan in alphas.keys() - weights.layers.keys() - weights.text_layers.keys():
        raise _bad(f"{orphan} has an alpha but no weights")
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
    return f"{part}.{_TEXT_MODEL}{rest}" if rest.startswith("encoder.") else path


def check_base(weights: AdapterWeights, base_digest: str) -> None:
    """Refuse an adapter that says that it was trained on another base than this one.

    Raises:
        InvalidArgumentError: It was (`ADAPTER_MISMATCH`).
    """
    if base_digest and weights.base_digest and base_digest != weights.base_digest:
        raise InvalidArgumentError(
            "the adapter was trained on another base",
            field="adapters",
            reason="ADAPTER_MISMATCH",
            metadata={"base_digest": base_digest, "adapter_base_digest": weights.base_digest},
        )


def check_fits(weights: AdapterWeights, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that a UNet with these Linears cannot apply whole.

    Raises:
        InvalidArgumentError: A layer is not there, has other sizes, or its rank is over
            `MAX_RANK` (`ADAPTER_MISMATCH`).
    """
    check_layers(weights.layers, targets)
    for path, layer in weights.layers.items():
        if layer.rank > MAX_RANK:
            raise _misfit(f"{path} has rank {layer.rank}; at most {MAX_RANK} can be served")


def check_layers(layers: Mapping[str, LoraLayer], targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse layers that networks with these Linears cannot apply.

    Raises:
        InvalidArgumentError: One is not there, or has other sizes (`ADAPTER_MISMATCH`).
    """
    for path, layer in layers.items():
        have = (int(layer.down.shape[1]), int(layer.up.shape[0]))
        want = targets.get(path)
        if want is None:
            raise _misfit(f"the base has no Linear {path}")
        if have != want:
            raise _misfit(f"{path} is {have[0]} to {have[1]}; the base's is {want[0]} to {want[1]}")


def _misfit(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the adapter does not fit the base: {problem}",
        field="adapters",
        reason="ADAPTER_MISMATCH",
    )


def _peft_state(layers: Mapping[str, LoraLayer]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path, layer in sorted(layers.items()):
        state[path + _DOWN], state[path + _UP] = layer.down, layer.up
    return state


def _peft_config(layers: Mapping[str, LoraLayer], *, anchor: str = "") -> dict[str, Any]:
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchor + p: r for p, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {anchor + p: a for p, a in sorted(alphas.items()) if a != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _kohya_state(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path, layer in sorted({**weights.layers, **weights.text_layers}.items()):
        name = kohya_name(path)
        state[name + _KOHYA_DOWN] = layer.down.contiguous()
        state[name + _KOHYA_UP] = layer.up.contiguous()
        state[name + _KOHYA_ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def _weights_of(
    state: Mapping[str, torch.Tensor], alpha_of: Any, facts: Mapping[str, str]
) -> AdapterWeights:
    """Pair downs with ups; `alpha_of(path)` may be None, for an alpha equal to the rank."""
    layers: dict[str, LoraLayer] = {}
    for key in sorted(state):
        path = key.removesuffix(_DOWN).removesuffix(_UP)
        if path == key:
            raise _unknown_key(key)
        down, up = state.get(path + _DOWN), state.get(path + _UP)
        if down is None or up is None:
            raise _bad(f"{path} lacks half of its weights")
        if down.ndim != 2 or up.ndim != 2:
            raise _bad(f"{path} is not the LoRA of a Linear, and others cannot be served")
        if down.shape[0] != up.shape[1] or not down.shape[0]:
            raise _bad(f"{path} has ranks {down.shape[0]} and {up.shape[1]}")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise _bad(f"{path} holds numbers that are not finite")
        alpha = alpha_of(path)
        alpha = float(down.shape[0] if alpha is None else alpha)
        if not math.isfinite(alpha):
            raise _bad(f"{path} has the alpha {alpha}")
        layers[path] = LoraLayer(down.detach(), up.detach(), alpha)
    text_layers = {path: layer for path, layer in layers.items() if path.startswith(_PARTS[1:])}
    of_unet = {path: layer for path, layer in layers.items() if path not in text_layers}
    if not of_unet:
        raise _bad("it has no layers of the UNet")
    return AdapterWeights(of_unet, facts, text_layers)


def _by_path(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strip what may stand before the UNet's own paths; those of text encoders become files'."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        path = text_path(key.removeprefix("base_model.model.").removeprefix("unet."))
        if path in found:
            raise _bad(f"{path[:200]} is there twice, under both of its names")
        found[path] = tensor
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise _bad(f"{path.name} is not a safetensors file: {error}") from error


def _peft_config_of(facts: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(facts.get(_DIFFUSERS_METADATA, "{}"))
    except ValueError as error:
        raise _bad(f"{_DIFFUSERS_METADATA} is not JSON") from error
    if not isinstance(config, dict):
        raise _bad(f"{_DIFFUSERS_METADATA} is not a JSON object")
    for feature in ("use_dora", "use_rslora", "lora_bias"):
        if any(config.get(part + feature) for part in _PARTS):
            raise _bad(f"it needs {feature}, which cannot be served")
    return {key if key.startswith(_PARTS) else f"unet.{key}": config[key] for key in config}


def _alpha_of(config: Mapping[str, Any], path: str) -> float | None:
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", path)
    if alpha is not None and not isinstance(alpha, int | float):
        raise _bad(f"{_DIFFUSERS_METADATA} has an alpha of {path} that is no number")
    return None if alpha is None else float(alpha)


def _by_pattern(config: Mapping[str, Any], pattern: str, default: str, path: str) -> Any:
    """Look a layer's value up as PEFT does: by a key that is its path or the end of it."""
    part = next((part for part in _PARTS if path.startswith(part)), "unet.")
    path = path.removeprefix(part).removeprefix(_TEXT_MODEL)
    for key, value in (config.get(part + pattern) or {}).items():
        plain = str(key).removeprefix("^").removeprefix(_TEXT_MODEL)
        if path == plain or (not str(key).startswith("^") and path.endswith("." + plain)):
            return value
    return config.get(part + default)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _unknown_key(key: str) -> InvalidArgumentError:
    return _bad(
        f"{key[:200]} is not a LoRA tensor of the UNet or the text encoders; nothing of a file is "
        "left out"
    )


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the adapter cannot be used: {message}", field="adapters", reason="BAD_ADAPTER"
    )
