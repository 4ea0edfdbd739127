"""LoRA files: diffusers' PEFT layout and kohya's, read and written without loss.

A model version holds both. Sources: diffusers' `save_lora_weights` with its
`lora_adapter_metadata` header, and the key rules of kohya's sd-scripts that ComfyUI and InvokeAI
read: `lora_unet_<module path, dots as underscores>.lora_down.weight`, `.lora_up.weight` and
`.alpha`. The strength of a layer is alpha / rank; both files carry the real alpha.
"""

import json
import math
import re
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

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"

_DIFFUSERS_METADATA = "lora_adapter_metadata"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_KOHYA_PREFIX = "lora_unet_"
_ATTENTION = re.compile(
    r"(?P<side>(?:down|up)_blocks|mid_block)(?:\.(?P<block>\d+))?"
    r"\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)
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
    """A LoRA in memory: layers by the UNet's module path, and the file's header."""

    layers: Mapping[str, LoraLayer]
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_digest(self) -> str:
        """Digest of the base it was trained on; empty when the file does not say."""
        return self.header.get("toile.base_digest", "")

    @property
    def size_bytes(self) -> int:
        """Bytes that the layers take."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers.values()
            for tensor in (layer.down, layer.up)
        )

    def peft_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors under PEFT's names, relative to the UNet."""
        state: dict[str, torch.Tensor] = {}
        for path, layer in sorted(self.layers.items()):
            state[path + _DOWN], state[path + _UP] = layer.down, layer.up
        return state

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of the `peft.LoraConfig` that gives each layer its strength."""
        ranks = {path: layer.rank for path, layer in self.layers.items()}
        alphas = {path: layer.alpha for path, layer in self.layers.items()}
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{p}": r for p, r in sorted(ranks.items()) if r != rank},
            "alpha_pattern": {f"^{p}": a for p, a in sorted(alphas.items()) if a != alpha},
            "target_modules": sorted(self.layers),
            "lora_dropout": 0.0,
            "bias": "none",
        }


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
        state: Tensors under PEFT's names, as `get_peft_model_state_dict(unet)` gives them.
        rank: Rank of the training's configuration.
        alpha: Alpha of the training's configuration.
        card: What the headers say of it.

    Raises:
        InvalidArgumentError: The tensors are no LoRA of this rank (`BAD_ADAPTER`).
    """
    layers = _layers_of(
        {_unet_path(key): tensor for key, tensor in state.items()}, lambda _: float(alpha)
    )
    for path, layer in layers.items():
        if layer.rank != rank:
            raise _bad(f"{path} has rank {layer.rank}, not {rank}")
    return write_adapter(folder, AdapterWeights(layers), card)


def write_adapter(folder: Path, weights: AdapterWeights, card: AdapterCard) -> list[Path]:
    """Write an adapter as both files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    kohya = _kohya_state(weights)
    ranks = [layer.rank for layer in weights.layers.values()]
    alphas = [layer.alpha for layer in weights.layers.values()]
    facts = header(card, kohya, rank=_commonest(ranks), alpha=_commonest(alphas))
    save_file(kohya, folder / KOHYA_FILE, metadata=facts)
    config = {f"unet.{key}": value for key, value in weights.peft_config().items()}
    save_file(
        {f"unet.{key}": value.contiguous() for key, value in weights.peft_state().items()},
        folder / DIFFUSERS_FILE,
        metadata={
            **facts,
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
    layers = _layers_of(
        {_unet_path(key): tensor for key, tensor in state.items()},
        lambda layer_path: _alpha_of(config, layer_path),
    )
    for layer_path, layer in layers.items():
        declared = _by_pattern(config, "rank_pattern", "r", layer_path)
        if declared is not None and int(declared) != layer.rank:
            raise _bad(f"{layer_path} has rank {layer.rank}; the header says {declared}")
    return AdapterWeights(layers, facts)


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
        suffix, target = dot + rest, paths.get(name)
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
    layers = _layers_of(renamed, alphas.get)
    for orphan in alphas.keys() - layers.keys():
        raise _bad(f"{orphan} has an alpha but no weights")
    return AdapterWeights(layers, facts)


def kohya_names(targets: Iterable[str]) -> dict[str, str]:
    """Return module paths by the names that kohya's layout has for them, of which there are two.

    sd-scripts train SDXL on Stability's own module names (`input_blocks.4.1` for
    `down_blocks.1.attentions.0`); other trainers, and Toile, write diffusers'. Readers take both.
    """
    paths = list(targets)
    names = {_KOHYA_PREFIX + path.replace(".", "_"): path for path in paths}
    inside = [match for path in paths if (match := _ATTENTION.fullmatch(path))]
    down_layers = [int(m["layer"]) for m in inside if m["side"] == "down_blocks"]
    stride = max(down_layers, default=0) + 2  # the layers of a block, and what changes its size
    for match in inside:
        rest = match["rest"].replace(".", "_")
        if match["side"] == "mid_block":
            names[f"{_KOHYA_PREFIX}middle_block_1_{rest}"] = match[0]
            continue
        down = match["side"] == "down_blocks"
        number = int(match["block"]) * stride + int(match["layer"]) + down  # after the input's own
        names[f"{_KOHYA_PREFIX}{'in' if down else 'out'}put_blocks_{number}_1_{rest}"] = match[0]
    return names


def linear_targets(network: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return the Linears that a LoRA can change: (in, out) by module path."""
    targets: dict[str, tuple[int, int]] = {}
    for path, module in network.named_modules():
        base = getattr(module, "base_layer", module)  # a Linear that peft has wrapped
        inside = ".base_layer" in path or ".lora_" in path
        if isinstance(base, torch.nn.Linear) and not inside:
            targets[path] = (base.in_features, base.out_features)
    return targets


def check_fits(weights: AdapterWeights, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that a UNet with these Linears cannot apply whole.

    Raises:
        InvalidArgumentError: A layer is not there, has other sizes, or its rank is over
            `MAX_RANK` (`ADAPTER_MISMATCH`).
    """
    for path, layer in weights.layers.items():
        have = (int(layer.down.shape[1]), int(layer.up.shape[0]))
        want = targets.get(path)
        if want is None:
            problem = f"the base has no Linear {path}"
        elif have != want:
            problem = f"{path} is {have[0]} to {have[1]}; the base's is {want[0]} to {want[1]}"
        elif layer.rank > MAX_RANK:
            problem = f"{path} has rank {layer.rank}; at most {MAX_RANK} can be served"
        else:
            continue
        raise InvalidArgumentError(
            f"the adapter does not fit the base: {problem}",
            field="adapters",
            reason="ADAPTER_MISMATCH",
        )


def _kohya_state(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path, layer in sorted(weights.layers.items()):
        name = _KOHYA_PREFIX + path.replace(".", "_")
        state[name + _KOHYA_DOWN] = layer.down.contiguous()
        state[name + _KOHYA_UP] = layer.up.contiguous()
        state[name + _KOHYA_ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def _layers_of(state: Mapping[str, torch.Tensor], alpha_of: Any) -> dict[str, LoraLayer]:
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
    if not layers:
        raise _bad("it has no layers")
    return layers


def _unet_path(key: str) -> str:
    """Strip what may stand before the UNet's own path; refuse what is not the UNet's."""
    for prefix in ("base_model.model.", "unet."):
        key = key.removeprefix(prefix)
    if key.startswith(("text_encoder", "lora_te")):
        raise _unknown_key(key)
    return key


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
        if config.get(f"unet.{feature}"):
            raise _bad(f"it needs {feature}, which cannot be served")
    return {key.removeprefix("unet."): value for key, value in config.items()}


def _alpha_of(config: Mapping[str, Any], path: str) -> float | None:
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", path)
    if alpha is not None and not isinstance(alpha, int | float):
        raise _bad(f"{_DIFFUSERS_METADATA} has an alpha of {path} that is no number")
    return None if alpha is None else float(alpha)


def _by_pattern(config: Mapping[str, Any], pattern: str, default: str, path: str) -> Any:
    """Look a layer's value up as PEFT does: by a key that is its path or the end of it."""
    for key, value in (config.get(pattern) or {}).items():
        plain = str(key).removeprefix("^")
        if path == plain or (plain == key and path.endswith("." + plain)):
            return value
    return config.get(default)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _unknown_key(key: str) -> InvalidArgumentError:
    return _bad(f"{key[:200]} is not a LoRA tensor of the UNet; nothing of a file is left out")


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the adapter cannot be used: {message}", field="adapters", reason="BAD_ADAPTER"
    )
