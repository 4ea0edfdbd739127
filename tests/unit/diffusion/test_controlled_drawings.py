"""ControlNets in a drawing do what diffusers' own pipelines do with them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLControlNetPipeline
from PIL import Image, ImageDraw
from tests.unit.diffusion.test_controls import random_controlnet

from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl, load_controlnet
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.request import UpscaleTiles
from toile.diffusion.shipped import shipped_bundle_path
from toile.imaging.seams import Repeat

STEPS = 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path())


@pytest.fixture(scope="module")
def networks(bundle: Bundle) -> list:
    return [random_controlnet(bundle.unet, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def sketch() -> Image.Image:
    image = Image.new("RGB", (128, 128))
    ImageDraw.Draw(image).ellipse((30, 20, 90, 110), outline="white", width=2)
    return image


def draw(bundle: Bundle, controls: list[LoadedControl], **fields: object) -> np.ndarray:
    values = {"steps": STEPS, "guidance_scale": 3.0, **fields}
    request = DiffusionRequest("a red dress", [5], controls=controls, **values)
    denoiser = TorchDenoiser(bundle, bfloat16=False)
    return np.asarray(next(diffuse(bundle, denoiser, request)), np.int16)


def test_they_add_what_the_stock_pipeline_adds(bundle, networks, sketch):
    mirrored = sketch.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    ours = draw(
        bundle,
        [LoadedControl(networks[0], sketch, 0.7), LoadedControl(networks[1], mirrored, 0.5)],
    )
    encoded = bundle.encode_prompt("a red dress", "")
    stock = StableDiffusionXLControlNetPipeline(
        vae=bundle.vae,
        text_encoder=None,
        text_encoder_2=bundle.text_encoder_2,
        tokenizer=None,
        tokenizer_2=None,
        unet=bundle.unet,
        controlnet=networks,
        scheduler=_scheduler(bundle),
        add_watermarker=False,
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        image=[sketch, mirrored],
        controlnet_conditioning_scale=[0.7, 0.5],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(5),
        width=128,
        height=128,
        **encoded.arguments(1),
    ).images[0]
    assert np.abs(ours - np.asarray(theirs, np.int16)).max() <= 2
    assert np.abs(ours - draw(bundle, [])).mean() > 2, "they do nothing"
    assert "forward" not in vars(bundle.unet)


def _scheduler(bundle: Bundle):
    from toile.diffusion.schedulers import make_scheduler

    return make_scheduler("", bundle.scheduler_config)


def test_they_hold_only_where_they_are_told_to(bundle, networks, sketch):
    plain = draw(bundle, [])
    assert (draw(bundle, [LoadedControl(networks[0], sketch, 0.0)]) == plain).all()
    whole = draw(bundle, [LoadedControl(networks[0], sketch)])
    late = draw(bundle, [LoadedControl(networks[0], sketch, start=0.5)])
    differences = [np.abs(one - plain).mean() for one in (whole, late)]
    assert differences[0] > differences[1] > 0


def test_they_hold_an_image_that_is_redrawn(bundle, networks, sketch):
    start = Image.new("RGB", (128, 128), "navy")
    fields = {"init_image": start, "strength": 0.9, "steps": 4}
    plain = draw(bundle, [], **fields)
    assert np.abs(draw(bundle, [LoadedControl(networks[0], sketch)], **fields) - plain).mean() > 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scale": float("nan")}, "controls.scale"),
        ({"scale": 2.5}, "controls.scale"),
        ({"start": 0.6, "end": 0.4}, "controls.start"),
        ({"start": -0.1}, "controls.start"),
    ],
)
def test_numbers_out_of_range_are_refused(networks, sketch, fields, field):
    with pytest.raises(InvalidArgumentError) as caught:
        DiffusionRequest("", [1], controls=[LoadedControl(networks[0], sketch, **fields)])
    assert caught.value.metadata["field"] == field


def test_what_they_do_not_go_together_with_is_refused(networks, sketch):
    for more in (
        {"repeat": Repeat.STRAIGHT},
        {"init_image": sketch, "mask_image": Image.new("L", sketch.size, 255)},
        {"init_image": sketch, "upscale": UpscaleTiles(8), "width": 256, "height": 256},
    ):
        with pytest.raises(InvalidArgumentError, match="do not go together") as caught:
            DiffusionRequest("", [1], controls=[LoadedControl(networks[0], sketch)], **more)
        assert caught.value.metadata["field"] == "controls"


def test_a_network_is_loaded_for_its_base_alone(bundle, networks, tmp_path: Path):
    config = dict(bundle.unet.config)
    networks[0].save_pretrained(tmp_path / "good")
    loaded = load_controlnet(tmp_path / "good", config)
    for (name, mine), theirs in zip(
        networks[0].state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    with pytest.raises(InvalidArgumentError, match="block_out_channels") as caught:
        load_controlnet(tmp_path / "good", {**config, "block_out_channels": [320, 640, 1280]})
    assert caught.value.reason == "CONTROL_MISMATCH"


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut", "pickle", "not json"])
def test_what_is_no_network_is_refused(bundle, networks, tmp_path: Path, damage: str):
    folder = tmp_path / "net"
    copy.deepcopy(networks[0]).save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "not json":
        (folder / "config.json").write_text("{")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        if damage == "pickle":
            torch.save(networks[0].state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(InvalidArgumentError) as caught:
        load_controlnet(folder, dict(bundle.unet.config))
    assert caught.value.reason == "BAD_CONTROLNET"


def test_a_base_without_one_says_so(tiny_bundle: Path):
    bare = Bundle.load(tiny_bundle)
    assert list(bare.control_kinds) == []
    with pytest.raises(FailedPreconditionError) as caught:
        bare.controlnet("edges")
    assert caught.value.reason == "BASE_LACKS_PART"
