"""From a file to the artifacts of a version. Needs torch: loaded with the first import."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from toile.core.artifacts import ArtifactStore, Manifest, publish_folder, read_manifest
from toile.core.catalog.models import BaseRow
from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import AdapterWeights, load_lora, write_adapter
from toile.diffusion.banked_unet import TARGETS, bank_layout
from toile.diffusion.conformance import check_lora
from toile.diffusion.controls import CONTROLNET_FOLDER, check_controlnet
from toile.diffusion.foreign_adapters import read_foreign
from toile.diffusion.text_encoders import empty_text_encoders
from toile.diffusion.triton.packed import PackedFiles, empty_unet

_CONFIGS = ("unet/config.json", "text_encoder/config.json", "text_encoder_2/config.json")


def publish_lora(
    store: ArtifactStore,
    artifact: str,
    base: BaseRow,
    file: Path,
    *,
    title: str,
    trigger_word: str,
    targets: str,
) -> tuple[Manifest, dict[str, Any]]:
    """Publish both layouts of a LoRA file, and pack it for the engine of its base.

    Args:
        store: Where to.
        artifact: Prefix of what is published.
        base: That it is for.
        file: The LoRA.
        title: Of the published files.
        trigger_word: Likewise.
        targets: What the engine takes adapters for, by the settings' name.

    Returns:
        The manifest; and rank, alpha and whether it is a DoRA, as a configuration holds them: of
        the layer of the highest rank, for so much of an engine's rank the packed file takes.

    Raises:
        InvalidArgumentError: The file cannot be used; see `read_foreign`.
    """
    with tempfile.TemporaryDirectory(prefix="toile-import-") as scratch:
        configs = Path(scratch) / "base"
        _fetch_configs(store, base, configs)
        unet = empty_unet(configs)
        weights = _read(file, unet, empty_text_encoders(configs), base, TARGETS[targets])
        card = AdapterCard(
            title=title,
            base=base.name,
            base_digest=base.digest,
            resolution=base.native_size,
            trigger_word=trigger_word,
            description=weights.header.get("modelspec.description", ""),
            author=weights.header.get("modelspec.author", ""),
            license=weights.header.get("modelspec.license", ""),
        )
        folder = Path(scratch) / "version"
        write_adapter(folder, weights, card)
        check_lora(folder, unet)
        if not weights.is_dora:
            # What is packed is what the server would read.
            layout = bank_layout(unet, TARGETS[targets])
            packed = PackedFiles(store, layout, base_digest=base.digest)
            packed.put(artifact, load_lora(folder))
        manifest = publish_folder(store, artifact, folder)
    highest = max(weights.layers.values(), key=lambda layer: layer.rank)
    config = {"rank": highest.rank, "alpha": highest.alpha}
    return manifest, {**config, "use_dora": True} if weights.is_dora else config


def publish_controlnet(
    store: ArtifactStore, artifact: str, base: BaseRow, file: Path, config: str
) -> Manifest:
    """Publish a ControlNet in diffusers' layout as it came.

    Args:
        store: Where to.
        artifact: Prefix of what is published.
        base: That it is for.
        file: Its `diffusion_pytorch_model.safetensors`.
        config: Text of its `config.json`.

    Raises:
        InvalidArgumentError: The configuration is none (`BAD_CONTROLNET`) or of another kind of
            base (`CONTROL_MISMATCH`), or the file holds other weights (`BAD_CONTROLNET`).
    """
    with tempfile.TemporaryDirectory(prefix="toile-import-") as scratch:
        configs = Path(scratch) / "base"
        _fetch_configs(store, base, configs)
        _check_weights(file, _empty_controlnet(config, empty_unet(configs)))
        folder = Path(scratch) / "version"
        target = folder / CONTROLNET_FOLDER
        target.mkdir(parents=True)
        (target / "config.json").write_text(config, encoding="utf-8")
        shutil.copyfile(file, target / SAFETENSORS_WEIGHTS_NAME)
        return publish_folder(store, artifact, folder)


def _empty_controlnet(text: str, unet: UNet2DConditionModel) -> ControlNetModel:
    """A configuration's network on the meta device."""
    try:
        config = json.loads(text)
        if not isinstance(config, dict) or config.get("_class_name") != "ControlNetModel":
            raise ValueError('it has no "_class_name": "ControlNetModel"')
        check_controlnet(config, unet.config)
        with torch.device("meta"):
            return ControlNetModel.from_config(config)
    except InvalidArgumentError as error:
        error.metadata["field"] = "controlnet_config"  # drawings call it otherwise
        raise
    except Exception as error:  # diffusers raises what its values happen to break
        raise InvalidArgumentError(
            f"this is no configuration of a ControlNet: {error}",
            field="controlnet_config",
            reason="BAD_CONTROLNET",
        ) from error


def _check_weights(file: Path, network: ControlNetModel) -> None:
    """Refuse a file that holds other tensors than a network, or others' shapes, or no numbers."""
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            if lacking := sorted(wanted.keys() - names):
                raise _bad_weights(f"lacks {lacking[0]} ({len(lacking)} such)")
            if left := sorted(names - wanted.keys()):
                raise _bad_weights(f"holds {left[0]}, which is of no ControlNet ({len(left)} such)")
            for name in sorted(names):
                tensor = tensors.get_tensor(name)
                if list(tensor.shape) != wanted[name]:
                    shapes = f"{list(tensor.shape)}, not {wanted[name]}"
                    raise _bad_weights(f"has a {name} of {shapes}")
                if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                    raise _bad_weights(f"has a {name} that is not all finite numbers")
    except (SafetensorError, OSError) as error:
        raise _bad_weights(f"is not a safetensors file: {error}") from error


def _bad_weights(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the file {what}", field="chunk", reason="BAD_CONTROLNET")


def _fetch_configs(store: ArtifactStore, base: BaseRow, folder: Path) -> None:
    """Copy the configurations of the networks that LoRAs change; their weights are gigabytes."""
    manifest = read_manifest(store, base.artifact)
    for name in _CONFIGS:
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(store.get(manifest.key(base.artifact, name)))


def _read(
    file: Path,
    unet: UNet2DConditionModel,
    text_encoders: Mapping[str, nn.Module],
    base: BaseRow,
    ends: Sequence[str],
) -> AdapterWeights:
    try:
        weights = read_foreign(file, unet, text_encoders, ends)
    except InvalidArgumentError as error:
        error.metadata["field"] = "chunk"  # what a drawing calls its adapters
        raise
    if weights.base_digest and weights.base_digest != base.digest:
        raise InvalidArgumentError(
            f"the adapter was trained on another base than {base.name}",
            field="base",
            reason="ADAPTER_MISMATCH",
            metadata={"base_digest": base.digest, "adapter_base_digest": weights.base_digest},
        )
    return weights
