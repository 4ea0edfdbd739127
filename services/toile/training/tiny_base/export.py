"""From the stages' checkpoints to a bundle that pipelines load."""

from pathlib import Path

from torch import nn

from toile.diffusion.architecture import TinyBase, build_models, save_bundle
from toile.training.tiny_base.clip import load_clip, load_tokenizer
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.controls import STAGE, load_controls
from toile.training.tiny_base.segmenter import load_segmenter
from toile.training.tiny_base.tower import load_image_encoder
from toile.training.tiny_base.unet import load_unet
from toile.training.tiny_base.vae import load_vae

_OPTIONAL = ("unet", "refiner", "segmenter")


def export_bundle(config: RecipeConfig, path: Path, *, unet: nn.Module | None = None) -> None:
    """Write the bundle; a network whose stage has not begun is random and named in `untrained`.

    The ControlNet is left out instead: a base may lack it.

    unet, when given, is taken instead of the last checkpoint's.
    """
    tokenizer, trio = load_tokenizer(config), load_clip(config)
    models: TinyBase = build_models(tokenizer, seed=config.seed)
    models.vae = load_vae(config)
    models.text_encoder = trio.text_encoder
    models.text_encoder_2 = trio.text_encoder_2
    models.image_encoder = load_image_encoder(config)
    models.clip_logit_scale = trio.logit_scale
    done = {
        stage: (config.workdir / stage / "checkpoint.safetensors").exists() for stage in _OPTIONAL
    }
    if unet is not None:
        models.unet, done["unet"] = unet, True
    elif done["unet"]:
        models.unet = load_unet(config, "unet")
    if done["refiner"]:
        models.refiner_unet = load_unet(config, "refiner")
    if done["segmenter"]:
        models.segmenter = load_segmenter(config)
    if (config.workdir / STAGE / "checkpoint.safetensors").exists():
        models.controlnet = load_controls(config)
    untrained = [stage for stage, finished in done.items() if not finished]
    save_bundle(path, models, tokenizer, extra={"trained": not untrained, "untrained": untrained})
