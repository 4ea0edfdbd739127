"""What a replica of the models does on a GPU is what it does on processors."""

import numpy as np
import pytest
import torch
from PIL import Image

from toile.core.artifacts import open_store, publish_folder
from toile.core.settings import Settings
from toile.diffusion.shipped import shipped_bundle_path
from toile.imaging import decode, png
from toile.serving.models import Models
from toile.v1 import inference_pb2

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
BASE = "bases/tiny"
SIDE = 128


def picture() -> bytes:
    down, across = np.mgrid[0:SIDE, 0:SIDE].astype(np.uint8) * 2
    return png.encode(Image.fromarray(np.stack([down, across, 255 - down], axis=-1)))


def modes() -> dict[str, inference_pb2.DiffuseRequest]:
    def request(**more: object) -> inference_pb2.DiffuseRequest:
        return inference_pb2.DiffuseRequest(
            base_artifact=BASE,
            prompt="a red dress",
            seeds=[3],
            steps=6,
            guidance_scale=3.0,
            strength=0.6,
            **more,
        )

    mask = png.encode(Image.new("L", (SIDE, SIDE), 255))
    return {
        "from noise": request(),
        "refined": request(refiner_strength=0.3),
        "repeating": request(repeat=1),
        "redrawn": request(init_image=picture()),
        "inpainted": request(init_image=picture(), mask_image=mask),
        "upscaled": request(
            init_image=picture(),
            width=2 * SIDE,
            height=2 * SIDE,
            upscale=inference_pb2.UpscaleTiles(overlap=32),
        ),
        "with previews": request(preview_interval=2),
    }


def drawn(models: Models, request: inference_pb2.DiffuseRequest, settings: Settings) -> np.ndarray:
    images: list[bytes] = []
    models.diffuse(
        request,
        on_step=lambda *_: None,
        on_image=lambda _, data: images.append(data),
        on_preview=lambda *_: None,
        cancelled=lambda: False,
    )
    return np.asarray(decode.decode(images[0], settings.limits), np.float64)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    made = Settings(home=tmp_path_factory.mktemp("home"))
    publish_folder(open_store(made), BASE, shipped_bundle_path(), {})
    return made


@pytest.mark.parametrize("mode", modes())
def test_pictures_are_those_of_processors(
    settings: Settings, device: torch.device, mode: str
) -> None:
    store, request = open_store(settings), modes()[mode]
    there = drawn(Models(settings, store, device=device), request, settings)
    here = drawn(Models(settings, store), request, settings)
    # Processors compute UNets in bfloat16 where they can.
    assert 10 * np.log10(255**2 / np.mean((there - here) ** 2)) >= 25


def test_what_is_seen_is_the_same(settings: Settings, device: torch.device) -> None:
    store = open_store(settings)
    there, here = Models(settings, store, device=device), Models(settings, store)
    for models in (there, here):
        models.warm_up(BASE)
    one, other = (models.embed_images(BASE, [picture()]) for models in (there, here))
    np.testing.assert_allclose(one, other, atol=1e-2)
    one, other = (models.embed_texts(BASE, ["a red dress"]) for models in (there, here))
    np.testing.assert_allclose(one, other, atol=1e-2)
    assert there.describe(BASE, picture()) == here.describe(BASE, picture())
    assert there.segment(BASE, picture())[1] == here.segment(BASE, picture())[1]
