"""What `DiffuseRequest` says reaches the pipelines, and what cannot be drawn is refused."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.bases import import_base
from toile.core.catalog.engine import open_catalog
from toile.core.errors import (
    CancelledError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.core.settings import Limits, Settings
from toile.serving import models as serving_models
from toile.serving.models import Models
from toile.v1 import common_pb2, inference_pb2

SIDE = 64


class Drawn:
    """Everything that one request gave."""

    def __init__(self, models: Models, request: inference_pb2.DiffuseRequest) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.previews: list[tuple[int, int, Image.Image]] = []
        self.images: list[Image.Image] = []
        models.diffuse(
            request,
            on_step=lambda *step: self.steps.append(step),
            on_image=lambda _, data: self.images.append(Image.open(io.BytesIO(data))),
            on_preview=self._see,
            cancelled=lambda: False,
        )

    def _see(self, index: int, step: int, data: bytes) -> None:
        preview = Image.open(io.BytesIO(data))
        assert preview.format == "JPEG"
        self.previews.append((index, step, preview))


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, str]:
    return models_of(Settings(home=tmp_path_factory.mktemp("home")), tiny_bundle)


def models_of(settings: Settings, tiny_bundle: Path) -> tuple[Models, str]:
    catalog, store = open_catalog(settings), open_store(settings)
    catalog.migrate()
    base = import_base(settings, catalog, store, tiny_bundle)
    catalog.close()
    return Models(settings, store), base.artifact


def draw(served: tuple[Models, str], **fields: Any) -> Drawn:
    return Drawn(served[0], asked_of(served, **fields))


def asked_of(served: tuple[Models, str], **fields: Any) -> inference_pb2.DiffuseRequest:
    asked = {
        "base_artifact": served[1],
        "prompt": "a red dress",
        "seeds": [1],
        "steps": 4,
        "guidance_scale": 5.0,
        "width": SIDE,
        "height": SIDE,
        **fields,
    }
    return inference_pb2.DiffuseRequest(**asked)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_rescale": 0.7},
        {"repeat": common_pb2.REPEAT_HALF_DROP},
        {"repeat": common_pb2.REPEAT_BRICK},
        {"prompt": "a (red:1.5) dress"},
        {"prompt": "a red dress " * 30},
        {"refiner_strength": 0.5},
        {"refiner_strength": 0.5, "refiner_mode": common_pb2.REFINER_MODE_IMAGE_TO_IMAGE},
    ],
)
def test_each_field_changes_the_image(served: tuple[Models, str], fields: dict[str, Any]) -> None:
    plain, changed = draw(served).images[0], draw(served, **fields).images[0]
    assert not np.array_equal(np.asarray(plain), np.asarray(changed))


def test_an_unset_mode_splits_the_schedule(served: tuple[Models, str]) -> None:
    unset = draw(served, refiner_strength=0.5)
    split = draw(served, refiner_strength=0.5, refiner_mode=common_pb2.REFINER_MODE_SPLIT)
    assert np.array_equal(np.asarray(unset.images[0]), np.asarray(split.images[0]))
    assert unset.steps[-1] == (0, 4, 4)
    mode = common_pb2.REFINER_MODE_IMAGE_TO_IMAGE
    assert draw(served, refiner_strength=0.5, refiner_mode=mode).steps[-1] == (0, 6, 6)


def test_previews_come_as_jpeg(served: tuple[Models, str]) -> None:
    drawn = draw(served, preview_interval=2, seeds=[1, 2])
    assert [place[:2] for place in drawn.previews] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert not draw(served).previews


def test_pictures_that_are_looked_at_may_be_ribbons(served: tuple[Models, str]) -> None:
    models, base = served
    ribbon = png(Image.new("RGB", (1024, 7), "red"))
    assert models.describe(base, ribbon)
    assert len(models.embed_images(base, [ribbon])) == 1
    labels, _ = models.segment(base, ribbon)
    assert Image.open(io.BytesIO(labels)).size == (1024, 7)


def test_an_image_is_enlarged(served: tuple[Models, str]) -> None:
    drawn = draw(
        served,
        init_image=png(Image.new("RGB", (SIDE, SIDE), "teal")),
        strength=0.5,
        width=192,
        height=128,
        upscale=inference_pb2.UpscaleTiles(overlap=32),
    )
    assert drawn.images[0].size == (192, 128)
    assert drawn.steps[-1] == (0, 4, 4)  # two of each of two tiles


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guidance_rescale": float("nan")}, "guidance_rescale"),
        ({"guidance_rescale": 2.0}, "guidance_rescale"),
        ({"refiner_strength": float("nan")}, "refiner_strength"),
        ({"preview_interval": -1}, "preview_interval"),
        ({"repeat": 9}, "repeat"),
        ({"refiner_mode": 9}, "refiner_mode"),
        ({"repeat": common_pb2.REPEAT_BRICK, "width": 72}, "width"),
        ({"upscale": inference_pb2.UpscaleTiles(overlap=8)}, "upscale"),
        ({"prompt": "(red:99)"}, "prompt"),
        ({"negative_prompt": "red " * 700}, "negative_prompt"),
    ],
)
def test_what_cannot_be_drawn_names_its_field(
    served: tuple[Models, str], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        draw(served, **fields)
    assert caught.value.metadata["field"] == named


@pytest.mark.parametrize("slow", ["bases/slow/0123", "projects/p/models/slow/versions/1"])
def test_nobody_waits_for_what_others_fetch(
    served: tuple[Models, str], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    models, base = served
    fetching, go_on = threading.Event(), threading.Event()

    def fetch(store: ArtifactStore, artifact: str, cache: Path) -> Path:
        if artifact == slow:
            fetching.set()
            assert go_on.wait(120)
        return real(store, artifact, cache)

    real = serving_models.fetch_patiently
    monkeypatch.setattr(serving_models, "fetch_patiently", fetch)
    adapters = [inference_pb2.Adapter(artifact=slow, weight=1)] if "models" in slow else []
    fields = {"base_artifact": slow} if not adapters else {"adapters": adapters}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(draw, served, **fields)
        try:
            assert fetching.wait(120)
            assert len(pool.submit(models.embed_texts, base, ["a dress"]).result(120)) == 1
            assert len(pool.submit(draw, served).result(120).images) == 1
        finally:
            go_on.set()
        with pytest.raises(NotFoundError):
            waiting.result(120)


def test_a_base_is_not_loaded_for_a_caller_that_has_left(served: tuple[Models, str]) -> None:
    models, _ = served
    with pytest.raises(CancelledError):
        models.diffuse(
            inference_pb2.DiffuseRequest(base_artifact="bases/none/0123", seeds=[1]),
            on_step=lambda *_: None,
            on_image=lambda *_: None,
            on_preview=lambda *_: None,
            cancelled=lambda: True,
        )


def test_drawings_begin_by_priority(tiny_bundle: Path, tmp_path: Path) -> None:
    limits = Limits(running_generations=1, queued_generations=3)
    served = models_of(Settings(home=tmp_path, limits=limits), tiny_bundle)
    models, _ = served
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def one(name: str, priority: common_pb2.Priority) -> None:
        def on_step(*_: int) -> None:
            order.append(name)
            if name == "first":
                begun.set()
                assert go_on.wait(120)

        models.diffuse(
            asked_of(served, steps=1, priority=priority),
            on_step=on_step,
            on_image=lambda *_: None,
            on_preview=lambda *_: None,
            cancelled=lambda: False,
        )

    with ThreadPoolExecutor(4) as pool:
        drawings = [pool.submit(one, "first", common_pb2.PRIORITY_BATCH)]
        assert begun.wait(120)
        for number, (name, priority) in enumerate(
            [
                ("a row", common_pb2.PRIORITY_BATCH),
                ("a design", common_pb2.PRIORITY_INTERACTIVE),
                ("another", common_pb2.PRIORITY_INTERACTIVE),
            ],
            start=1,
        ):
            drawings.append(pool.submit(one, name, priority))
            while models._turns.waiting < number:
                time.sleep(0.001)
        with pytest.raises(ExhaustedError):
            one("one too many", common_pb2.PRIORITY_INTERACTIVE)
        go_on.set()
        for drawing in drawings:
            drawing.result(120)
    assert order == ["first", "a design", "another", "a row"]
