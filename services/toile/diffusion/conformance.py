"""What other programs look for in a published adapter: their loaders' rules, as checks of files.

Sources, in our own words: ComfyUI's `comfy/lora.py` (`model_lora_keys_unet`, `load_lora`) and, of
ControlNets, `comfy/controlnet.py` (`load_controlnet`) with `comfy/utils.py` (`unet_to_diffusers`),
InvokeAI's `backend/patches` (`sdxl_lora_conversion_utils.py`, `layer_patcher.py`), diffusers'
`loaders/lora_base.py` (the header `lora_adapter_metadata`), ModelSpec 1.0.1, and sd-scripts'
`library/train_util.py` (`addnet_hash_safetensors`), by whose hash user interfaces know a file.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from toile.core.errors import InvalidArgumentError, ToileError
from toile.diffusion.adapter_header import ARCHITECTURE
from toile.diffusion.adapters import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    AdapterWeights,
    linear_targets,
    read_diffusers,
    read_kohya,
)
from toile.diffusion.kohya_keys import kohya_name, kohya_names, kohya_text_path
from toile.diffusion.peft_config import PARTS

_PREFIX = "lora_unet_"
_LEAVES = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
_STABILITY = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out_")
"""How the module names begin that InvokeAI takes for Stability's."""
_MAPS = "controlnet_cond_embedding"
_HEADER = (
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
)
"""What ModelSpec demands, and what user interfaces tell an SDXL LoRA by."""


def check_lora(folder: Path, unet: UNet2DConditionModel) -> None:
    """Refuse a version's files that other programs would not take whole, or as strong.

    Args:
        folder: The version's, with both layouts.
        unet: Of its base; may be on the meta device.

    Raises:
        ToileError: A file does not conform; metadata say which (`NOT_CONFORMANT`).
    """
    targets = linear_targets(unet)
    diffusers, kohya = folder / DIFFUSERS_FILE, folder / KOHYA_FILE
    weights = _readable(diffusers, lambda: read_diffusers(diffusers))
    other = _readable(kohya, lambda: read_kohya(kohya, targets))
    if difference := _difference(weights, other):
        raise not_conformant(KOHYA_FILE, f"it is not the adapter of {DIFFUSERS_FILE}: {difference}")
    layers = {**weights.layers, **weights.text_layers}
    expected = {path: layer.alpha / layer.rank for path, layer in layers.items()}
    names = kohya_names(targets) | {kohya_name(path): path for path in weights.text_layers}
    strengths = comfyui_strengths(kohya, names)
    if {names[module]: strength for module, strength in strengths.items()} != expected:
        raise not_conformant(KOHYA_FILE, "ComfyUI would give layers another strength")
    if invokeai_modules(kohya, unet) != set(expected):
        raise not_conformant(KOHYA_FILE, "InvokeAI would patch other modules")
    for path in (diffusers, kohya):
        check_header(path)
    with safe_open(diffusers, framework="pt") as file:
        keys, facts = set(file.keys()), file.metadata()
    if foreign := sorted(key for key in keys if not key.startswith(PARTS)):
        raise not_conformant(DIFFUSERS_FILE, f"diffusers would not load {foreign[0]}")
    config = json.loads(facts.get("lora_adapter_metadata", "{}"))
    parts = {key.split(".", 1)[0] for key in keys}
    if not {f"{part}.{name}" for part in parts for name in ("r", "lora_alpha")} <= config.keys():
        raise not_conformant(DIFFUSERS_FILE, "diffusers would take the ranks for the alphas")


def check_controlnet(path: Path, unet: torch.nn.Module) -> None:
    """Refuse a ControlNet's file that diffusers or ComfyUI would not take whole.

    ComfyUI knows a ControlNet of diffusers by its first layer for maps, counts its outputs and its
    layers for maps from 0 to where one lacks, and takes the rest for parts of a UNet's encoder, by
    diffusers' names. What is left over is not loaded, with no more than a warning.

    Args:
        path: `diffusion_pytorch_model.safetensors`, with `config.json` beside it.
        unet: Of the base; may be on the meta device.

    Raises:
        ToileError: Something would be left over, or lacks (`NOT_CONFORMANT`).
    """
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    if config.get("_class_name") != "ControlNetModel":
        raise not_conformant("config.json", "diffusers would not know that it is a ControlNet")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise not_conformant(path.name, f"it is not a safetensors file: {error}") from error
    encoder = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    known = {key for key in unet.state_dict() if key.startswith(encoder)}
    own = ["controlnet_mid_block", f"{_MAPS}.conv_in", f"{_MAPS}.conv_out"]
    for part in ("controlnet_down_blocks", f"{_MAPS}.blocks"):
        own += itertools.takewhile(
            lambda name: f"{name}.weight" in keys, (f"{part}.{n}" for n in itertools.count())
        )
    known |= {f"{name}.{leaf}" for name in own for leaf in ("weight", "bias")}
    if lacking := sorted(known - keys):
        raise not_conformant(path.name, f"it lacks {lacking[0]} ({len(lacking)} such)")
    if left := sorted(keys - known):
        raise not_conformant(path.name, f"ComfyUI would not load {left[0]} ({len(left)} such)")


def comfyui_strengths(path: Path, modules: Iterable[str]) -> dict[str, float]:
    """Return the strength that ComfyUI gives each module of a file in kohya's layout.

    For each module that it knows it takes `.alpha`, `.lora_up.weight`, `.lora_down.weight` and
    `.dora_scale`, if there is one, and multiplies by alpha / rows of down. Scales are of rows where
    they are as many as those of the weight, `[out, 1]` (`comfy/weight_adapter/base.py`); of other
    shapes they would be of columns. How it divides by norms then is another matter (ADR 21). What
    is left over in the file is not loaded, with no more than a warning.

    Args:
        path: The file.
        modules: Names that ComfyUI knows modules of the UNet by.

    Raises:
        ToileError: Something would be left over, or a layer lacks a part (`NOT_CONFORMANT`).
    """
    left = _tensors(path)
    strengths: dict[str, float] = {}
    for module in modules:
        if (up := left.pop(f"{module}.lora_up.weight", None)) is None:
            continue
        scales = left.pop(f"{module}.dora_scale", None)
        if scales is not None and scales.shape != (len(up), 1):
            raise not_conformant(path.name, f"ComfyUI would not scale the rows of {module}")
        down, alpha = (
            left.pop(f"{module}.lora_down.weight", None),
            left.pop(f"{module}.alpha", None),
        )
        if down is None or alpha is None:
            raise not_conformant(path.name, f"{module} lacks a part of what ComfyUI takes")
        strengths[module] = alpha.item() / down.shape[0]
    if left:
        raise not_conformant(path.name, f"ComfyUI would not load {min(left)} ({len(left)} such)")
    return strengths


def invokeai_modules(path: Path, unet: torch.nn.Module) -> set[str]:
    """Return the paths of the modules that InvokeAI patches with a file in kohya's layout.

    Every key begins with `lora_unet_`, `lora_te1_` or `lora_te2_`; none may have a Stability name
    where another has not; the rest up to the first dot names a module, whose path is found as
    `module_path` does. Text encoders are nested there as they are in files, and may not be here, so
    the path of their modules is that of their names.

    Raises:
        ToileError: A key leads to no module, or is of another kind (`NOT_CONFORMANT`).
    """
    paths: set[str] = set()
    for stem, leaf in {tuple(key.split(".", 1)) for key in _tensors(path)}:
        flat = stem.removeprefix(_PREFIX)
        found = kohya_text_path(stem)
        if flat != stem and not flat.startswith(_STABILITY):
            found = module_path(unet, flat)
        if found is None or leaf not in _LEAVES:
            raise not_conformant(path.name, f"InvokeAI would not load {stem}.{leaf}")
        paths.add(found)
    return paths


def module_path(module: torch.nn.Module, flat: str) -> str | None:
    """Return the path of the module with a flat name, as InvokeAI finds it; None if there is none.

    It tries ever longer pieces between underscores.
    """
    path: list[str] = []
    name, *pieces = flat.split("_")
    for piece in pieces:
        children = dict(module.named_children())
        if name in children:
            module = children[name]
            path.append(name)
            name = piece
        else:
            name += "_" + piece
    return ".".join([*path, name]) if name in dict(module.named_children()) else None


def check_header(path: Path) -> None:
    """Refuse a LoRA's file whose header does not say what it is.

    Raises:
        ToileError: Something lacks, or is not so (`NOT_CONFORMANT`).
    """
    with safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
    for key in _HEADER:
        if not facts.get(key):
            raise not_conformant(path.name, f"its header lacks {key}")
    if facts["modelspec.architecture"] != ARCHITECTURE:
        raise not_conformant(path.name, f"its header does not say {ARCHITECTURE}")
    if facts.get("modelspec.hash_sha256") != f"0x{content_hash(path)}":
        raise not_conformant(path.name, "its header has another hash than it")


def content_hash(path: Path) -> str:
    """Return the SHA-256 of what follows the header of a safetensors file, in hexadecimal."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_conformant(file: str, why: str) -> ToileError:
    """Return the error of a file that other programs would not take."""
    return ToileError(
        f"{file} would not load everywhere: {why}",
        reason="NOT_CONFORMANT",
        metadata={"file": file},
    )


def _readable(path: Path, read: Callable[[], AdapterWeights]) -> AdapterWeights:
    try:
        return read()
    except InvalidArgumentError as error:
        raise not_conformant(path.name, error.message) from error


def _difference(one: AdapterWeights, other: AdapterWeights) -> str:
    """Say in what two adapters differ; empty when in nothing."""
    ones, others = ({**w.layers, **w.text_layers} for w in (one, other))
    for path in sorted(ones.keys() | others.keys()):
        a, b = ones.get(path), others.get(path)
        if a is None or b is None:
            return f"one of them lacks {path}"
        if a.rank != b.rank or a.alpha != b.alpha:
            return f"{path} has rank {a.rank} and {b.rank}, alpha {a.alpha:g} and {b.alpha:g}"
        mine, theirs = a.tensors, b.tensors
        if mine.keys() != theirs.keys() or not all(_equal(mine[k], theirs[k]) for k in mine):
            return f"{path} has other weights"
    return ""


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
