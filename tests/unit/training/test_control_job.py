"""A training of a ControlNet from its job to the published version, without Ray."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sqlalchemy import update

from toile.core.artifacts import ArtifactStore, fetch, publish_folder
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import BaseRow, DatasetVersionRow, JobRow, ModelVersionRow
from toile.core.errors import FailedPreconditionError
from toile.core.jobs import JobStore
from toile.core.jobs.runtime import JobContext, execute
from toile.core.settings import Settings
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import load_controlnet
from toile.diffusion.vision import Vision
from toile.imaging.alignment import edge_alignment, part_overlap, silhouette_overlap
from toile.imaging.control_maps import ControlKind, edge_map, joint_map, part_map
from toile.imaging.edges import canny
from toile.train.convert import VersionView, version_message
from toile.training import control_recipe, publish
from toile.training.caches import Cache, encoded
from toile.training.checks import hold_out
from toile.training.control_recipe import ControlNet, stored_dtype
from toile.training.controlnet import new_controlnet
from toile.training.data import Example, read_examples
from toile.training.maps import ControlCache, control_planes, with_maps
from toile.training.run import train_and_publish
from unit.training.runs import CONTROL_CONFIG

pytestmark = pytest.mark.usefixtures("quick_samples")
VERSION = "projects/p/models/lace-lines/versions/1"
Train = Callable[..., JobRow]


def version_of(catalog: Catalog) -> ModelVersionRow | None:
    with catalog.reading() as session:
        return session.get(ModelVersionRow, VERSION)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_training_becomes_a_version(
    train: Train,
    settings: Settings,
    catalog: Catalog,
    store: ArtifactStore,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    job = train(train_and_publish, "controlnet", learning_rate=5e-3, seed=3)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    assert version.adapter_type == "controlnet"
    # The base's files are half: the samples are drawn with what rounding leaves.
    assert stored_dtype(tiny_bundle / "unet") == torch.float16
    assert version.reproduction_difference == 0.0
    assert version.dataset_version == "projects/p/datasets/lace/versions/1"
    assert [file["path"] for file in version.files] == [
        "alignment.json",
        "config.json",
        "controlnet/config.json",
        "controlnet/diffusion_pytorch_model.safetensors",
        "loss.jsonl",
        "samples/00.map.png",
        "samples/00.png",
        "samples/01.map.png",
        "samples/01.png",
        "tensorboard/events.out.tfevents.0000",
    ]
    message = version_message(VersionView(version, []))
    assert not message.HasField("config")
    assert message.controlnet_config.control_kind == "edges"
    assert message.controlnet_config.seed == 3
    assert list(message.controlnet_config.sample_prompts) == ["<lace> dress 0", "<lace> dress 1"]

    folder = fetch(store, version.artifact, tmp_path / "fetched")
    assert len((folder / "loss.jsonl").read_text().splitlines()) == 4
    base = Bundle.load(tiny_bundle)
    network = load_controlnet(folder / "controlnet", base.unet.config)
    assert network.controlnet_mid_block.weight.abs().sum() > 0
    with safe_open(folder / "controlnet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["toile.dataset_digest"] == version.dataset_digest
        assert file.metadata()["toile.control_kind"] == "edges"
    # The map is that of the dataset's image, and what is measured is what can be seen.
    original = pixels(settings.home_path / "version" / "000001.png")
    assert np.array_equal(pixels(folder / "samples/01.map.png"), edge_map(original))
    facts = json.loads((folder / "alignment.json").read_text())
    assert [entry["image"] for entry in facts["samples"]] == ["000000.png", "000001.png"]
    assert not any(entry["held_out"] for entry in facts["samples"])
    measured = edge_alignment(canny(original), pixels(folder / "samples/01.png"))
    assert facts["samples"][1]["alignment"]["with_control"] == pytest.approx(measured)
    assert message.metrics.alignment == facts["measures"]["alignment"]["with_control"]
    without = facts["measures"]["alignment"]["without_control"]
    assert message.metrics.alignment_without_control == without
    overlap = facts["measures"]["silhouette_overlap"]["with_control"]
    assert message.metrics.silhouette_overlap == overlap
    assert not list(store.list(f"{version.artifact}.bank/")), "there is nothing to pack"
    assert not list(store.list(f"{job.name}/checkpoints/"))


def test_parts_are_those_that_the_base_sees(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    """The base here has random weights, so that its parts mean nothing."""
    job = train(
        train_and_publish,
        "controlnet",
        control_kind="parts",
        sample_prompts=["a"] * 5,
        validation_share=0.25,
        steps=2,
    )
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    names = [f"{index:06d}.png" for index in range(4)]
    (held_out,) = hold_out(names, 0.25)[1]
    original = Image.open(settings.home_path / "version" / names[held_out])
    base = fetch(store, _artifact(catalog), settings.home_path / "cache")
    labels, _ = Vision(base).segment(original)
    assert np.array_equal(pixels(folder / "samples/00.map.png"), part_map(labels))
    again = pixels(folder / "samples/04.map.png")
    assert np.array_equal(again, part_map(labels)), "the fifth sample is of the first image again"
    facts = json.loads((folder / "alignment.json").read_text())
    held_out = [entry["held_out"] for entry in facts["samples"]]
    assert held_out == [True, False, False, False, True]
    samples = [facts["samples"][index]["alignment"]["with_control"] for index in (0, 4)]
    assert facts["measures"]["alignment"]["with_control"] == pytest.approx(np.mean(samples))


def test_it_goes_on_from_the_base_s_own(
    train: Train, catalog: Catalog, store: ArtifactStore, tiny_bundle: Path, tmp_path: Path
) -> None:
    more = tmp_path / "base"
    shutil.copytree(tiny_bundle, more)
    own = new_controlnet(Bundle.load(tiny_bundle).unet, seed=5)
    torch.nn.init.normal_(own.controlnet_mid_block.weight, std=0.1)  # zeros when it is new
    own.save_pretrained(more / "controlnet" / "edges")
    artifact = f"{_artifact(catalog)}-with-edges"
    digest = publish_folder(store, artifact, more).digest
    with catalog.transaction() as session:
        session.execute(update(BaseRow).values(artifact=artifact, digest=digest))
    job = train(
        train_and_publish, "controlnet", initial_weights="base", steps=1, learning_rate=1e-9
    )
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    found = load_file(folder / "controlnet/diffusion_pytorch_model.safetensors")
    started = load_file(more / "controlnet/edges/diffusion_pytorch_model.safetensors")
    assert found.keys() == started.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), started[name].float(), atol=1e-3, rtol=0)


def test_maps_that_came_with_the_images_are_trained_on(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        train(train_and_publish, "controlnet", control_kind="given")
    assert caught.value.reason == "DATASET_LACKS_MAPS"
    assert caught.value.metadata == {"field": "controlnet.control_kind"}
    folder = settings.home_path / "version"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "conditioning").mkdir()
    for index, line in enumerate(lines):
        line["conditioning"] = f"conditioning/{line['file_name']}"
        Image.new("RGB", (128, 128), (40 * index, 255, 0)).save(folder / line["conditioning"])
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    republish(catalog, store, folder)
    job = train(train_and_publish, "controlnet", control_kind="given", steps=2)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    fetched = fetch(store, version.artifact, tmp_path / "fetched")
    assert (pixels(fetched / "samples/01.map.png") == (40, 255, 0)).all()
    facts = json.loads((fetched / "alignment.json").read_text())
    assert list(facts["measures"]) == ["silhouette_overlap"], "nobody says what such maps show"
    with safe_open(fetched / "controlnet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["toile.control_kind"] == "given"


def republish(
    catalog: Catalog, store: ArtifactStore, folder: Path, metadata: dict[str, Any] | None = None
) -> None:
    """Have the dataset version be what is in a folder now."""
    with catalog.transaction() as session:
        row = session.get_one(DatasetVersionRow, "projects/p/datasets/lace/versions/1")
        artifact = f"{row.artifact}-changed"
        row.artifact, row.digest = (
            artifact,
            publish_folder(store, artifact, folder, metadata).digest,
        )


def test_edges_and_parts_are_trained_and_measured_as_one_map(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    labels = Vision(fetch(store, _artifact(catalog), settings.home_path / "cache")).labels
    republish(catalog, store, settings.home_path / "version", {"mask_labels": labels})
    job = train(train_and_publish, "controlnet", control_kind="edges_parts", steps=2)
    assert (job.state, job.error_message) == ("SUCCEEDED", "")
    version = version_of(catalog)
    assert version is not None
    folder = fetch(store, version.artifact, tmp_path / "fetched")
    original = pixels(settings.home_path / "version" / "000000.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[16:112, 32:96] = 1
    shown = pixels(folder / "samples/00.map.png")
    assert np.array_equal(shown, joint_map(original, mask))
    facts = json.loads((folder / "alignment.json").read_text())
    drawn = Image.open(folder / "samples/00.png")
    edges = canny(original)
    base = fetch(store, _artifact(catalog), settings.home_path / "cache")
    found = Vision(base).segment(drawn)[0]
    overlap = part_overlap(mask[edges == 0], found[edges == 0])
    measured = (edge_alignment(edges, np.asarray(drawn.convert("RGB"))) + overlap) / 2
    assert facts["samples"][0]["alignment"]["with_control"] == pytest.approx(measured)
    original = Image.open(settings.home_path / "version" / "000000.png")
    shapes = (Vision(base).segment(image)[0] for image in (original, drawn))
    overlap = facts["samples"][0]["silhouette_overlap"]["with_control"]
    assert overlap == pytest.approx(silhouette_overlap(*shapes))


def _artifact(catalog: Catalog) -> str:
    with catalog.reading() as session:
        return session.get_one(BaseRow, "bases/tiny").artifact


def test_second_attempt_publishes_the_same_files(
    train: Train, settings: Settings, catalog: Catalog, store: ArtifactStore, tmp_path: Path
) -> None:
    train(train_and_publish, "controlnet")
    whole = version_of(catalog)
    assert whole is not None
    jobs = JobStore(catalog)

    def lost(job: JobContext) -> None:
        """Die when the closing samples are due, which is after the weights were rounded."""

        def superseded(*_: object) -> None:
            jobs.next_attempt(job.name, after=1, message="compute was lost")
            job.report("sample", 0, 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "draw_samples", superseded)
            train_and_publish(job)

    row = train(lost, "controlnet")
    assert execute(train_and_publish, settings, row.name, 2) == 0
    with catalog.reading() as session:
        again = session.get_one(ModelVersionRow, row.target)
    one, two = (fetch(store, v.artifact, tmp_path / "fetched") for v in (whole, again))
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    first, second = load_file(one / weights), load_file(two / weights)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for name in ("loss.jsonl", "alignment.json", "samples/01.png", "controlnet/config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_files_that_draw_something_else_are_not_published(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: dict[str, torch.Tensor], path: Path, **rest: dict[str, str]) -> None:
        save_file({name: 30 * tensor for name, tensor in state.items()}, path, **rest)

    monkeypatch.setattr(control_recipe, "save_file", spoil)
    job = train(train_and_publish, "controlnet", learning_rate=5e-3)
    assert (job.state, job.error_reason) == ("FAILED", "NOT_REPRODUCED")
    assert version_of(catalog) is None


def test_damaged_files_are_not_published(
    train: Train, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(state: dict[str, torch.Tensor], path: Path, **rest: dict[str, str]) -> None:
        save_file(state, path, **rest)
        path.write_bytes(path.read_bytes()[:-1000])

    monkeypatch.setattr(control_recipe, "save_file", cut_off)
    job = train(train_and_publish, "controlnet")
    assert (job.state, job.error_reason) == ("FAILED", "NOT_CONFORMANT")
    assert version_of(catalog) is None


def test_the_files_are_as_precise_as_the_base(tiny_bundle: Path, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(tiny_bundle / "unet" / name)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / name)
        assert stored_dtype(folder) == dtype


def test_maps_are_of_the_squares_that_the_latents_are_of(
    settings: Settings, tiny_bundle: Path
) -> None:
    bundle = Bundle.load(tiny_bundle, digest="base")
    version = settings.home_path / "version"
    wide = Image.open(version / "000000.png").resize((256, 200))
    wide.save(version / "000000.png")
    examples = read_examples(version)
    cache = encoded(bundle, examples)
    done: list[int] = []

    def mapped(kind: ControlKind) -> ControlCache:
        planes = control_planes(
            Vision(tiny_bundle), examples, kind, 128, lambda count, _: done.append(count)
        )
        return with_maps(cache, planes, kind)

    edges = mapped(ControlKind.EDGES)
    square = wide.crop((28, 0, 228, 200)).resize((128, 128), Image.Resampling.LANCZOS)
    (shown,) = edges.maps([0])
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), edge_map(np.asarray(square)))
    assert edges.planes.dtype == torch.uint8
    assert all(torch.equal(tensor, vars(edges)[name]) for name, tensor in vars(cache).items())
    assert done == [1, 2, 3, 4]
    parts = mapped(ControlKind.PARTS)
    assert not torch.equal(parts.planes, edges.planes)
    both, has_edge = mapped(ControlKind.EDGES_PARTS), edges.planes > 0
    assert torch.equal(both.planes[~has_edge], parts.planes[~has_edge])
    (shown,) = both.maps([0])
    assert (shown[:, has_edge[0]] == 255).all()


@pytest.mark.parametrize("same", [True, False])
def test_parts_are_those_of_the_masks_where_these_have_the_segmenters_labels(
    settings: Settings, tiny_bundle: Path, same: bool
) -> None:
    vision, examples = Vision(tiny_bundle), read_examples(settings.home_path / "version")
    labels = list(vision.labels) if same else ["background", "garment"]
    planes = control_planes(
        vision, examples, ControlKind.PARTS, 64, lambda *_: None, mask_labels=labels
    )
    of_mask = torch.zeros(64, 64, dtype=torch.uint8)
    of_mask[8:56, 16:48] = 1
    assert torch.equal(planes[0], of_mask) == same


def test_samples_are_measured_with_control_and_without(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    encoded = Cache(*(torch.zeros(1) for _ in range(5)))
    cache = ControlCache(
        **vars(encoded),
        planes=torch.zeros(1, 128, 128, dtype=torch.uint8),
        colours=torch.zeros(256, 3, dtype=torch.uint8),
    )
    picture = tmp_path / "a.png"
    Image.new("RGB", (128, 128), "white").save(picture)
    recipe = ControlNet(bundle, CONTROL_CONFIG, cache, [Example(picture, "a.png", "", "a.png")])
    drawn: list[int] = []

    def without(index: int) -> Image.Image:
        drawn.append(index)
        return Image.new("RGB", (128, 128), "white")

    assert recipe.judged([], without).files == {}
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::16] = 255
    judged = recipe.judged([Image.fromarray(stripes)], without)
    facts = json.loads(judged.files["alignment.json"])
    assert drawn == [0]
    measured = facts["measures"]["alignment"]
    assert (measured["with_control"], measured["without_control"]) == (0.0, 1.0)
    assert judged.metrics["alignment"] == 0.0
    assert judged.metrics["alignment_without_control"] == 1.0
    assert judged.metrics["silhouette_overlap_without_control"] == 1.0  # it is the picture itself
