"""Where a bundle's networks are."""

from pathlib import Path

import torch

from toile.diffusion.bundle import Bundle


def test_networks_are_where_the_bundle_is(tiny_bundle: Path) -> None:
    """The meta device stands for any that is not the CPU."""
    bundle = Bundle.load(tiny_bundle, device=torch.device("meta"))
    networks = (bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2)
    assert {network.device.type for network in networks} == {"meta"}
    assert Bundle.load(tiny_bundle).unet.device.type == "cpu"
