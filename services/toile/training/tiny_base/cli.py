"""The stages, in the order they build on one another; each resumes where it was stopped."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import nn

from toile.diffusion.segmenter import Segmenter
from toile.training.tiny_base.classifier import save_classifier, train_classifier
from toile.training.tiny_base.clip import train_clip
from toile.training.tiny_base.config import RecipeConfig
from toile.training.tiny_base.controls import train_controls
from toile.training.tiny_base.data import load_photographs, write_renders
from toile.training.tiny_base.evaluate import (
    edge_agreement,
    evaluate,
    held_out_renders,
    reconstruction_decibels,
    segmenter_agreement,
    write_evaluation,
)
from toile.training.tiny_base.export import export_bundle
from toile.training.tiny_base.segmenter import train_segmenter
from toile.training.tiny_base.sheet import write_sheet
from toile.training.tiny_base.tower import train_tower
from toile.training.tiny_base.unet import train_refiner, train_unet, write_latents
from toile.training.tiny_base.vae import load_vae, train_decoder, train_vae

_LOG = structlog.get_logger(__name__)
_RECONSTRUCTED_RENDERS = 64
_AGREEMENT_RENDERS = 200
_CONTROLLED_RENDERS = 48


def _renders(config: RecipeConfig) -> None:
    write_renders(config)
    load_photographs(config)


def _unet(config: RecipeConfig) -> None:
    def snapshot(average: nn.Module, step: int) -> None:
        if isinstance(average, UNet2DConditionModel):
            export_bundle(config, config.bundle, unet=average)
        _LOG.info("tiny_base.snapshot", step=step, bundle=config.bundle.name)

    train_unet(config, snapshot)


def _export(config: RecipeConfig) -> None:
    export_bundle(config, config.bundle)
    save_classifier(config)


def _evaluate(config: RecipeConfig) -> None:
    result = evaluate(config.bundle)
    write_evaluation(result, config.bundle / "evaluation.json")
    drawn = held_out_renders(_AGREEMENT_RENDERS)
    pictures = [r.image for r in drawn[:_RECONSTRUCTED_RENDERS]]
    held, free = edge_agreement(config.bundle, drawn[:_CONTROLLED_RENDERS])
    _LOG.info(
        "tiny_base.evaluation",
        edges_with_control=round(held, 3),
        edges_without=round(free, 3),
        colour=result.colour_accuracy,
        category=result.category_accuracy,
        classifier=result.classifier_accuracy,
        seconds_per_image=result.seconds_per_image,
        vae_decibels=round(reconstruction_decibels(load_vae(config), pictures), 2),
        segmenter_iou=round(
            segmenter_agreement(Segmenter.load(config.bundle / "segmenter"), drawn), 3
        ),
    )


def _sheet(config: RecipeConfig) -> None:
    write_sheet(config.bundle, config.workdir / "sheet.png")


STAGES: dict[str, Callable[[RecipeConfig], object]] = {
    "renders": _renders,
    "vae": train_vae,
    "decoder": train_decoder,
    "clip": train_clip,
    "tower": train_tower,
    "segmenter": train_segmenter,
    "classifier": train_classifier,
    "latents": write_latents,
    "unet": _unet,
    "refiner": train_refiner,
    "controls": train_controls,
    "export": _export,
    "evaluate": _evaluate,
    "sheet": _sheet,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(prog="python -m toile.training.tiny_base", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--workdir", type=Path, default=Path("out/tiny-base"))
    parser.add_argument("--bundle", type=Path, help="where the bundle goes; WORKDIR/bundle")
    parser.add_argument("--photos", type=Path, help="folder of photographs, one folder a category")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = RecipeConfig(workdir=options.workdir, threads=options.threads, seed=options.seed)
    if options.photos is not None:
        config = replace(config, photos=options.photos)
    if options.bundle is not None:
        config = replace(config, bundle_path=options.bundle)
    torch.set_num_threads(options.threads)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    for stage in STAGES if options.stage == "all" else [options.stage]:
        _LOG.info("tiny_base.stage", stage=stage)
        STAGES[stage](config)
