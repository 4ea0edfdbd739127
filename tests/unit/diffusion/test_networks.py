"""Networks of a bundle by name give what the stock pipelines compute."""

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from toile.core.errors import InvalidArgumentError
from toile.diffusion.bundle import Bundle
from toile.diffusion.networks import PARTS, UNET_CONTROL, Sizes, open_network
from toile.diffusion.shipped import shipped_bundle_path

PROMPT = "a red striped cotton dress"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path())


def test_text_encoders_give_what_the_pipeline_takes(bundle: Bundle):
    expected = bundle.encode_prompt(PROMPT)
    hidden, pooled = [], None
    for part, tokenizer in (
        ("text_encoder", bundle.tokenizer),
        ("text_encoder_2", bundle.tokenizer_2),
    ):
        ids = tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
        out = open_network(bundle.path, part).run({"input_ids": ids})
        hidden.append(out["hidden_states"])
        pooled = out.get("text_embeds")
    torch.testing.assert_close(torch.cat(hidden, -1), expected.prompt)
    torch.testing.assert_close(pooled, expected.pooled)


def test_the_decoder_gives_what_the_autoencoder_decodes(bundle: Bundle):
    network = open_network(bundle.path, "vae")
    inputs = network.example_inputs(Sizes(batch=2, latent_size=8))
    with torch.inference_mode():
        expected = bundle.vae.decode(inputs["latents"]).sample
    image = network.run(inputs)["image"]
    assert image.shape == (2, 3, 64, 64)
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("part", [part for part in PARTS if part != UNET_CONTROL])
def test_each_part_runs_on_its_own_example_inputs(part: str):
    network = open_network(shipped_bundle_path(), part)
    outputs = network.run(network.example_inputs(Sizes(batch=3)))
    assert list(outputs) == list(network.output_names)
    assert all(len(t) == 3 and t.isfinite().all() for t in outputs.values())
    assert (network.layout is None) == (part not in ("unet", "refiner"))


def test_controlnets_are_loaded_in_their_order(bundle: Bundle, tmp_path: Path):
    folders = [tmp_path / name for name in ("edges", "depth")]
    for folder, channels in zip(folders, ("rgb", "bgr"), strict=True):
        ControlNetModel.from_unet(bundle.unet, channels).save_pretrained(folder)
    network = open_network(bundle.path, UNET_CONTROL, controlnets=folders)
    orders = [n.config.controlnet_conditioning_channel_order for n in network.banked.controlnets]
    assert orders == ["rgb", "bgr"]
    inputs = network.example_inputs(Sizes(batch=1, latent_size=8))
    assert inputs["control_image_1"].shape == (1, 3, 64, 64)
    # New ControlNets add zeros.
    stock = open_network(bundle.path, "unet").run(inputs)
    torch.testing.assert_close(network.run(inputs), stock)


@pytest.mark.parametrize(
    ("part", "controlnets", "field"),
    [("decoder", (), "part"), (UNET_CONTROL, (), "controlnet"), ("unet", ("x",), "controlnet")],
)
def test_what_does_not_go_together_is_refused(part: str, controlnets, field: str):
    with pytest.raises(InvalidArgumentError) as caught:
        open_network(shipped_bundle_path(), part, controlnets=controlnets)
    assert caught.value.metadata["field"] == field
