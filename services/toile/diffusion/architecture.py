"""The tiny base: SDXL's own classes at a size that trains in an hour on two cores.

A bundle is a folder in diffusers' SDXL layout, loadable by an unmodified
`StableDiffusionXLPipeline.from_pretrained`, with four things beside it: `image_encoder` (the CLIP
image tower of the second text encoder), `segmenter`, `refiner` and `toile.json`.

`refiner` holds only a UNet and a `model_index.json` of `StableDiffusionXLImg2ImgPipeline`: like
SDXL's refiner it has no first text encoder and asks for an aesthetics score; every other
component is the bundle's own. `load_refiner` composes the two.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import (
    CLIPImageProcessorPil as CLIPImageProcessor,
)

from toile.diffusion.controls import CONTROLNET_FOLDER
from toile.diffusion.segmenter import Segmenter
from toile.diffusion.tokenizer import MAX_TOKENS, write_tokenizer
from toile.imaging.colours import NAMED_COLOURS
from toile.imaging.control_maps import ControlKind
from toile.imaging.renderer.vocabulary import CATEGORIES, GARMENTS, MATERIALS, PATTERNS

NATIVE_SIZE = 128
"""Pixels a side that the base is trained at; the latents are `[4, 16, 16]`."""

TEXT_WIDTH = 128
PROJECTION_WIDTH = 128
TIME_IDS_BASE = 6
TIME_IDS_REFINER = 5
_TIME_EMBED_WIDTH = 32

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 48, 96, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": NATIVE_SIZE,
    "force_upcast": False,
}

UNET_CONFIG: dict[str, Any] = {
    "sample_size": NATIVE_SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 144),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 3, 4),
    "norm_num_groups": 16,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": _TIME_EMBED_WIDTH,
    "projection_class_embeddings_input_dim": PROJECTION_WIDTH + TIME_IDS_BASE * _TIME_EMBED_WIDTH,
}

REFINER_CONFIG: dict[str, Any] = {
    **UNET_CONFIG,
    "block_out_channels": (48, 64, 80),
    "layers_per_block": 1,
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": TEXT_WIDTH,
    "projection_class_embeddings_input_dim": PROJECTION_WIDTH
    + TIME_IDS_REFINER * _TIME_EMBED_WIDTH,
}

UNTRAINED_SIZES: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": (16, 24, 32, 32)},
    "unet": {"block_out_channels": (32, 48, 64), "layers_per_block": 1},
    "refiner": {"block_out_channels": (32, 32, 32)},
}
"""What a bundle that nobody trained has in place of the above, to be quicker in tests."""

SCHEDULER_CONFIG: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}

IMAGE_PROCESSOR_CONFIG: dict[str, Any] = {
    "size": {"shortest_edge": NATIVE_SIZE},
    "crop_size": {"height": NATIVE_SIZE, "width": NATIVE_SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass
class TinyBase:
    """The trainable parts of a bundle, in memory."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    refiner_unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    segmenter: Segmenter
    clip_logit_scale: float = 1.0
    controlnet: ControlNetModel | None = None
    """Shown edges; a bundle may lack it."""


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Both text encoders' size: four layers of width 128."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=PROJECTION_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )


def vision_config() -> CLIPVisionConfig:
    """The image tower's size: 64 patches of 16 pixels, five layers of width 144."""
    return CLIPVisionConfig(
        hidden_size=144,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=NATIVE_SIZE,
        patch_size=16,
        projection_dim=PROJECTION_WIDTH,
        hidden_act="gelu",
    )


def build_models(
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    sizes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> TinyBase:
    """Every network of the tiny base with random weights.

    Args:
        tokenizer: Whose words the text encoders know.
        seed: Of the weights.
        sizes: What of the configurations is different, by network, as in `UNTRAINED_SIZES`.
    """
    vae, unet, refiner = (sizes.get(name, {}) for name in ("vae", "unet", "refiner"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyBase(
            vae=AutoencoderKL(**{**VAE_CONFIG, **vae}),
            unet=UNet2DConditionModel(**{**UNET_CONFIG, **unet}),
            refiner_unet=UNet2DConditionModel(**{**REFINER_CONFIG, **refiner}),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
            image_encoder=CLIPVisionModelWithProjection(vision_config()),
            segmenter=Segmenter(),
        )


def save_bundle(
    path: Path, models: TinyBase, tokenizer: CLIPTokenizer, *, extra: Mapping[str, Any]
) -> None:
    """Write a bundle in half precision. `extra` is merged into `toile.json`."""
    models = _half_precision_copy(models)
    pipeline = StableDiffusionXLPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        text_encoder_2=models.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=models.unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER_CONFIG),
        image_encoder=models.image_encoder,
        feature_extractor=CLIPImageProcessor(**IMAGE_PROCESSOR_CONFIG),
        add_watermarker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        _declare_float32(path / name / "config.json")
    models.segmenter.save(path / "segmenter")
    if models.controlnet is not None:
        models.controlnet.save_pretrained(path / CONTROLNET_FOLDER / ControlKind.EDGES)
    _save_refiner(path / "refiner", models.refiner_unet)
    description = {**bundle_description(), "clip_logit_scale": models.clip_logit_scale, **extra}
    (path / "toile.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def bundle_description() -> dict[str, Any]:
    """What `toile.json` says of every tiny base: size, vocabularies, templates, licence."""
    return {
        "name": "tiny-base",
        "licence": "Apache-2.0",
        "native_size": NATIVE_SIZE,
        "guidance_scale": 3.0,
        "categories": list(CATEGORIES),
        "garments": list(GARMENTS),
        "colours": list(NAMED_COLOURS),
        "patterns": list(PATTERNS),
        "materials": list(MATERIALS),
        "caption_templates": {
            "category": "a {category}",
            "colour": "a {colour} {category}",
            "pattern": "a {pattern} {category}",
            "material": "a {material} {category}",
        },
        "prompt_template": "a {colour} {pattern} {material} {category} on {background} background",
    }


def build_random_bundle(path: Path, *, seed: int = 0) -> None:
    """Write an untrained bundle of the final layout and smaller networks, for tests."""
    write_tokenizer(path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    models = build_models(tokenizer, seed=seed, sizes=UNTRAINED_SIZES)
    save_bundle(path, models, tokenizer, extra={"trained": False})


def load_refiner(
    path: Path, base: StableDiffusionXLPipeline, *, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionXLImg2ImgPipeline:
    """The refiner pipeline of a bundle, sharing all but the UNet with the base's pipeline."""
    unet = UNet2DConditionModel.from_pretrained(path / "refiner" / "unet", torch_dtype=torch_dtype)
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(base.scheduler.config),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,  # unlike the base: see `_save_refiner`
        add_watermarker=False,
    )


def _half_precision_copy(models: TinyBase) -> TinyBase:
    copied = copy.deepcopy(models)
    for part in vars(copied).values():
        if isinstance(part, torch.nn.Module):
            part.half()
    return copied


def _declare_float32(config_file: Path) -> None:
    """Make transformers load the stored halves as fp32, as diffusers does, unless told."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_refiner(path: Path, unet: UNet2DConditionModel) -> None:
    unet.save_pretrained(path / "unet", safe_serialization=True)
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
