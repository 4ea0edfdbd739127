"""ControlNets from elsewhere, through the service: what becomes a version, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the compute extra is not installed")

from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: E402
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402

from toile.core.artifacts import ArtifactStore, fetch  # noqa: E402
from toile.core.catalog.engine import Catalog  # noqa: E402
from toile.core.catalog.models import ModelRow, ModelVersionRow  # noqa: E402
from toile.core.errors import InvalidArgumentError  # noqa: E402
from toile.core.settings import Settings  # noqa: E402
from toile.diffusion.controls import CONTROLNET_FOLDER, load_controlnet  # noqa: E402
from toile.v1 import train_pb2  # noqa: E402
from toile.v1.train_pb2_grpc import TrainServiceStub  # noqa: E402

State = dict[str, "torch.Tensor"]
Import = Callable[..., train_pb2.ModelVersion]
Toile = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet as diffusers saves it."""
    unet = UNet2DConditionModel.from_pretrained(bundle_path / "unet")
    target = tmp_path_factory.mktemp("controlnet")
    ControlNetModel.from_unet(unet).half().save_pretrained(target)
    return target


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.fixture
def weights(folder: Path) -> State:
    return load_file(folder / SAFETENSORS_WEIGHTS_NAME)


@pytest.fixture
def import_(train: TrainServiceStub, store: ArtifactStore) -> Import:
    """Sends tensors as a file, and a configuration, to a service that has the base's files."""

    def send(content: State | bytes, config: Any) -> train_pb2.ModelVersion:
        data = content if isinstance(content, bytes) else save(content)
        header = train_pb2.ImportModelVersionHeader(
            parent="projects/p",
            model_id="found",
            controlnet_config=config if isinstance(config, str) else json.dumps(config),
        )

        def messages() -> Iterator[train_pb2.ImportModelVersionRequest]:
            yield train_pb2.ImportModelVersionRequest(header=header)
            for start in range(0, len(data), 1 << 20):
                yield train_pb2.ImportModelVersionRequest(chunk=data[start : start + (1 << 20)])

        return train.ImportModelVersion(messages()).version

    return send


def test_a_folder_becomes_a_version_that_the_server_loads(
    toile: Toile,
    folder: Path,
    weights: State,
    bundle_path: Path,
    catalog: Catalog,
    store: ArtifactStore,
    tmp_path: Path,
) -> None:
    made = toile("import", str(folder), "--name", "lines")
    shown = toile("show", "lines")
    assert shown == made
    assert (shown["adapter_type"], shown["base"]) == ("controlnet", "bases/tiny")
    assert {file["path"].rpartition("/")[2] for file in shown["files"]} == {
        "config.json",
        SAFETENSORS_WEIGHTS_NAME,
    }
    with catalog.reading() as session:
        artifact = session.get_one(ModelVersionRow, made["name"]).artifact
    unet = UNet2DConditionModel.load_config(bundle_path / "unet")
    network = load_controlnet(fetch(store, artifact, tmp_path) / CONTROLNET_FOLDER, unet)
    state = network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name].float()) for name in weights)
    (version,) = toile("versions", "lines")
    assert version["adapter_type"] == "controlnet"


def lacking(state: State) -> None:
    del state["controlnet_mid_block.weight"]


def with_more(state: State) -> None:
    state["up_blocks.0.weight"] = torch.zeros(1)


def of_another_shape(state: State) -> None:
    state["controlnet_mid_block.bias"] = torch.zeros(3)


def not_finite(state: State) -> None:
    state["controlnet_mid_block.bias"][0] = torch.inf


def of_integers(state: State) -> None:
    state["controlnet_mid_block.bias"] = state["controlnet_mid_block.bias"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacking, "lacks controlnet_mid_block.weight"),
        (with_more, "holds up_blocks.0.weight"),
        (of_another_shape, r"controlnet_mid_block.bias of \[3\]"),
        (not_finite, "not all finite numbers"),
        (of_integers, "not all finite numbers"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_left(
    import_: Import,
    catalog: Catalog,
    settings: Settings,
    weights: State,
    config: dict[str, Any],
    damage: Callable[[State], None],
    message: str,
) -> None:
    damage(weights)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        import_(weights, config)
    assert (raised.value.reason, raised.value.metadata["field"]) == ("BAD_CONTROLNET", "chunk")
    with catalog.reading() as session:
        assert session.get(ModelRow, "projects/p/models/found") is None
    assert not [path for path in settings.home_path.rglob("*imports*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "BAD_CONTROLNET"),
        ("[1]", "BAD_CONTROLNET"),
        ({"_class_name": "UNet2DConditionModel"}, "BAD_CONTROLNET"),
        ({"cross_attention_dim": 768}, "CONTROL_MISMATCH"),
        ({"block_out_channels": "wide"}, "CONTROL_MISMATCH"),
        ({"conditioning_embedding_out_channels": {"a": 1}}, "BAD_CONTROLNET"),
        ({"transformer_layers_per_block": []}, "BAD_CONTROLNET"),
        (" " * 70_000, "TOO_MANY_BYTES"),
    ],
)
def test_other_configurations_are_refused(
    import_: Import, weights: State, config: dict[str, Any], change: Any, reason: str
) -> None:
    text = change if isinstance(change, str) else json.dumps({**config, **change})
    with pytest.raises(InvalidArgumentError) as raised:
        import_(weights, text)
    assert (raised.value.reason, raised.value.metadata["field"]) == (reason, "controlnet_config")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\xff" * 100])
def test_files_of_other_kinds_are_refused(
    import_: Import, config: dict[str, Any], data: bytes
) -> None:
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        import_(data, config)


def test_folders_without_a_controlnet_are_named(toile: Toile, tmp_path: Path) -> None:
    assert "no config.json" in toile("import", str(tmp_path), "--name", "lines")
    (tmp_path / "config.json").write_text("{}")
    assert "no diffusion_pytorch_model" in toile("import", str(tmp_path), "--name", "lines")
