"""Where a bundle's networks are, and how they are had by several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from toile.diffusion import bundle as bundles
from toile.diffusion.bundle import Bundle
from toile.diffusion.prompts import PromptEmbeddings, encode_prompts


def test_networks_are_where_the_bundle_is(tiny_bundle: Path) -> None:
    """The meta device stands for any that is not the CPU."""
    bundle = Bundle.load(tiny_bundle, device=torch.device("meta"))
    networks = (bundle.unet, bundle.vae, bundle.text_encoder, bundle.text_encoder_2)
    assert {network.device.type for network in networks} == {"meta"}
    assert Bundle.load(tiny_bundle).unet.device.type == "cpu"


def test_its_parts_are_had_while_a_prompt_is_encoded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(tiny_bundle)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> PromptEmbeddings:
        begun.set()
        assert go_on.wait(60)
        return encode_prompts(*args, **options)

    monkeypatch.setattr(bundles, "encode_prompts", slow)
    with ThreadPoolExecutor(2) as pool:
        encoding = pool.submit(bundle.encode_prompt, "a red dress")
        try:
            assert begun.wait(60)
            assert pool.submit(lambda: bundle.vae).result(60) is bundle.vae
        finally:
            go_on.set()
        assert encoding.result(60).prompt.shape[1] == 77


def test_networks_that_are_loaded_at_once_have_their_weights(tiny_bundle: Path) -> None:
    """diffusers and transformers patch torch while they make one, for all threads."""
    wanted = {k: v.clone() for k, v in Bundle.load(tiny_bundle).vae.state_dict().items()}
    names = ["vae", "unet", "text_encoder", "text_encoder_2"] * 2
    two = [Bundle.load(tiny_bundle) for _ in range(2)]
    start = threading.Barrier(len(names), timeout=60)

    def load(number: int) -> Any:
        start.wait()
        return getattr(two[number // 4], names[number])

    with ThreadPoolExecutor(len(names)) as pool:
        networks = list(pool.map(load, range(len(names))))
    assert {p.device.type for network in networks for p in network.parameters()} == {"cpu"}
    for network in (networks[0], networks[4]):
        assert all(torch.equal(v, wanted[k]) for k, v in network.state_dict().items())
