"""ControlNets of a base and of model versions reach the drawing."""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw
from tests.unit.diffusion.test_controls import random_controlnet

from toile.core.artifacts import ArtifactStore, open_store, publish, publish_folder
from toile.core.bases import import_base
from toile.core.catalog.engine import open_catalog
from toile.core.errors import (
    BadImageError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ToileError,
)
from toile.core.settings import Settings
from toile.diffusion.bundle import Bundle
from toile.serving.controls import ControlNets
from toile.serving.models import Models
from toile.v1 import inference_pb2

SIDE = 64
VERSION, SECOND = (f"projects/p/models/edges/versions/{number}/job" for number in (1, 2))
OTHER_BASE = "projects/p/models/wide/versions/1/job"
NO_CONTROLNET = "projects/p/models/lace/versions/1/job"


@dataclass
class Served:
    models: Models
    store: ArtifactStore
    base: str
    bundle: Bundle
    settings: Settings

    def draw(self, *controls: inference_pb2.ControlMap) -> np.ndarray:
        drawn: list[bytes] = []
        request = inference_pb2.DiffuseRequest(
            base_artifact=self.base,
            prompt="a red dress",
            seeds=[1],
            steps=2,
            guidance_scale=3.0,
            width=SIDE,
            height=SIDE,
            controls=controls,
        )
        self.models.diffuse(
            request,
            on_step=lambda *_: None,
            on_image=lambda _, data: drawn.append(data),
            on_preview=lambda *_: None,
            cancelled=lambda: False,
        )
        return np.asarray(Image.open(io.BytesIO(drawn[0])), np.int16)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A base with a ControlNet for edges, and model versions."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    networks = [random_controlnet(unet, seed) for seed in (1, 2)]
    networks[0].save_pretrained(folder / "controlnet" / "edges")
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    catalog, store = open_catalog(settings), open_store(settings)
    catalog.migrate()
    base = import_base(settings, catalog, store, folder)
    catalog.close()
    for network, artifact in zip(networks, (VERSION, SECOND), strict=True):
        version = tmp_path_factory.mktemp("version")
        network.save_pretrained(version / "controlnet")
        publish_folder(store, artifact, version)
    config = (folder / "controlnet/edges/config.json").read_bytes()
    wide = config.replace(b'"cross_attention_dim": ', b'"cross_attention_dim": 1')
    assert wide != config
    publish(store, OTHER_BASE, {"controlnet/config.json": wide})
    publish(store, NO_CONTROLNET, {"adapter_config.json": b"{}"})
    return Served(Models(settings, store), store, base.artifact, Bundle.load(folder), settings)


def sketch(*, mirrored: bool = False) -> bytes:
    image = Image.new("RGB", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse((8, 4, 40, 60), outline="white", width=2)
    buffer = io.BytesIO()
    (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image).save(buffer, "PNG")
    return buffer.getvalue()


def control(**fields: Any) -> inference_pb2.ControlMap:
    whole = {"kind": "edges", "map_png": sketch(), "scale": 1.0, "start": 0.0, "end": 1.0}
    return inference_pb2.ControlMap(**{**whole, **fields})


@pytest.fixture(scope="module")
def held(served: Served) -> np.ndarray:
    return served.draw(control())


@pytest.mark.parametrize(
    "fields",
    [
        {"map_png": sketch(mirrored=True)},
        {"scale": 0.3},
        {"end": 0.4},
        {"start": 0.6},
    ],
)
def test_each_field_changes_the_image(
    served: Served, held: np.ndarray, fields: dict[str, Any]
) -> None:
    assert not np.array_equal(held, served.draw(control(**fields)))


def test_a_control_changes_the_image_and_leaves_nothing_behind(
    served: Served, held: np.ndarray
) -> None:
    before = served.draw()
    assert np.abs(held - before).mean() > 1
    assert np.array_equal(before, served.draw(control(scale=0.0)))
    assert np.array_equal(held, served.draw(control()))
    assert np.array_equal(before, served.draw())


def test_a_version_draws_as_the_same_network_of_the_base(served: Served, held: np.ndarray) -> None:
    assert np.array_equal(held, served.draw(control(artifact=VERSION, kind="")))
    assert not np.array_equal(held, served.draw(control(artifact=SECOND, kind="")))


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"kind": "parts"}, FailedPreconditionError, "NO_CONTROLNET"),
        ({"kind": "../unet"}, FailedPreconditionError, "NO_CONTROLNET"),
        ({"artifact": f"{VERSION}/none"}, NotFoundError, "ARTIFACT_NOT_FOUND"),
        ({"artifact": OTHER_BASE}, InvalidArgumentError, "CONTROL_MISMATCH"),
        ({"artifact": NO_CONTROLNET}, InvalidArgumentError, "BAD_CONTROLNET"),
        ({"map_png": b"no image"}, BadImageError, "NOT_AN_IMAGE"),
        ({"scale": float("nan")}, InvalidArgumentError, "INVALID_ARGUMENT"),
        ({"start": 0.5, "end": 0.5}, InvalidArgumentError, "INVALID_ARGUMENT"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    served: Served, fields: dict[str, Any], kind: type[ToileError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        served.draw(control(**fields))
    assert caught.value.reason == reason


def test_a_bases_own_is_told_from_others(served: Served, tmp_path: Path) -> None:
    """By which the denoiser knows whether there is an engine with it."""
    nets = ControlNets(served.settings.limits, served.store, tmp_path)
    assert nets.load(served.bundle, control()).kind == "edges"
    assert nets.load(served.bundle, control(artifact=VERSION)).kind == ""


def test_versions_stay_until_others_push_them_out(served: Served, tmp_path: Path) -> None:
    limits = served.settings.limits

    def networks(budget_bytes: int) -> list[object]:
        nets = ControlNets(limits, served.store, tmp_path, budget_bytes=budget_bytes)
        asked = (VERSION, VERSION, SECOND, VERSION)
        return [nets.load(served.bundle, control(artifact=one)).network for one in asked]

    first, again, other, later = networks(1 << 30)
    assert first is again is later
    assert other is not first
    first, again, _, later = networks(1)
    assert first is again
    assert later is not first
