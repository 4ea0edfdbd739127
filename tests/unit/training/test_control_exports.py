"""A ControlNet's published folder is what other programs load, and draws there what it draws here.

ComfyUI's rule is in `toile.diffusion.conformance`. It also goes by the sizes of SDXL's own blocks,
so that a ControlNet of another base than SDXL is none to it, whatever its keys.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from toile.core.errors import ToileError
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl, load_controlnet
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.shipped import shipped_bundle_path
from toile.training.caches import Cache
from toile.training.control_recipe import ControlNet
from toile.training.data import Example
from toile.training.maps import ControlCache
from unit.training.runs import CONTROL_CONFIG

WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"
STEPS = 3
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path())


@pytest.fixture(scope="module")
def recipe(bundle: Bundle) -> ControlNet:
    """As strong as a trained one."""
    encoded = Cache(*(torch.zeros(1) for _ in range(5)))
    planes = torch.zeros(1, 128, 128, dtype=torch.uint8)
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    cache = ControlCache(**vars(encoded), planes=planes, colours=colours)
    examples = [Example(bundle.path / "a.png", "a.png", "", "a.png")]  # which nothing reads here
    recipe = ControlNet(bundle, CONTROL_CONFIG, cache, examples)
    network = recipe.network.controlnet
    generator = torch.Generator().manual_seed(1)
    outputs = (*network.controlnet_down_blocks, network.controlnet_mid_block)
    for layer in (*outputs, network.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.05, generator=generator)
    recipe.finish()
    return recipe


@pytest.fixture
def folder(recipe: ControlNet, tmp_path: Path) -> Path:
    card = AdapterCard(title="lines", base="bases/tiny", base_digest="", resolution=128)
    recipe.export(tmp_path, card)
    return tmp_path


def test_the_stock_pipeline_draws_what_is_drawn_here(bundle: Bundle, folder: Path) -> None:
    sketch = Image.new("RGB", (128, 128))
    ImageDraw.Draw(sketch).ellipse((30, 20, 90, 110), outline="white", width=2)
    ours = drawn(
        bundle, [LoadedControl(load_controlnet(folder / "controlnet", bundle.unet.config), sketch)]
    )
    stock = StableDiffusionXLControlNetPipeline.from_pretrained(
        bundle.path,
        controlnet=ControlNetModel.from_pretrained(folder / "controlnet"),
        add_watermarker=False,
        local_files_only=True,
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a red dress",
        image=sketch,
        controlnet_conditioning_scale=1.0,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(5),
        width=128,
        height=128,
    ).images[0]
    assert np.abs(np.asarray(theirs, np.int16) - ours).max() <= 1
    assert np.abs(drawn(bundle, []) - ours).max() > 20


def drawn(bundle: Bundle, controls: list[LoadedControl]) -> np.ndarray:
    request = DiffusionRequest(
        "a red dress", [5], steps=STEPS, guidance_scale=3.0, controls=controls
    )
    return np.asarray(
        next(diffuse(bundle, TorchDenoiser(bundle, bfloat16=False), request)), np.int16
    )


def without_an_output(state: State) -> None:
    del state["controlnet_down_blocks.0.weight"]


def without_a_bias(state: State) -> None:
    del state["controlnet_mid_block.bias"]


def without_a_layer_for_maps(state: State) -> None:
    del state["controlnet_cond_embedding.conv_out.weight"]


def without_a_part_of_the_encoder(state: State) -> None:
    del state[next(key for key in state if key.startswith("down_blocks.1"))]


def inside_a_wrapper(state: State) -> None:
    for key in list(state):
        state[f"controlnet.{key}"] = state.pop(key)


@pytest.mark.parametrize(
    "spoil",
    [
        without_an_output,
        without_a_bias,
        without_a_layer_for_maps,
        without_a_part_of_the_encoder,
        inside_a_wrapper,
    ],
)
def test_a_spoilt_file_does_not_pass(
    recipe: ControlNet, folder: Path, spoil: Callable[[State], None]
) -> None:
    recipe.check(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        facts = file.metadata()
    state = load_file(folder / WEIGHTS)
    spoil(state)
    save_file(state, folder / WEIGHTS, metadata=facts)
    with pytest.raises(ToileError) as caught:
        recipe.check(folder)
    assert caught.value.reason == "NOT_CONFORMANT"
    assert caught.value.metadata == {"file": "diffusion_pytorch_model.safetensors"}
