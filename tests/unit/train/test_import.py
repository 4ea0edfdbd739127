"""LoRA files from elsewhere, through the service: what becomes a version, and what is refused."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the compute extra is not installed")

from safetensors.torch import load, save  # noqa: E402

from toile.core.artifacts import ArtifactStore, read_manifest  # noqa: E402
from toile.core.catalog.engine import Catalog  # noqa: E402
from toile.core.catalog.models import ModelRow, ModelVersionRow  # noqa: E402
from toile.core.errors import (  # noqa: E402
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RequestReusedError,
)
from toile.core.settings import EngineSettings, Settings  # noqa: E402
from toile.diffusion.adapters import DIFFUSERS_FILE, KOHYA_FILE, linear_targets  # noqa: E402
from toile.diffusion.banked_unet import TRANSFORMER_TARGETS, bank_layout  # noqa: E402
from toile.diffusion.kohya_keys import kohya_name  # noqa: E402
from toile.diffusion.text_encoders import empty_text_encoders, text_targets  # noqa: E402
from toile.diffusion.triton.packed import PackedFiles, empty_unet  # noqa: E402
from toile.train.importing import Importer  # noqa: E402
from toile.v1 import train_pb2  # noqa: E402
from toile.v1.train_pb2_grpc import TrainServiceStub  # noqa: E402

State = dict[str, "torch.Tensor"]
Import = Callable[..., train_pb2.ModelVersion]
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="module")
def unet(bundle_path: Path) -> Any:
    return empty_unet(bundle_path)


@pytest.fixture
def path(unet: Any) -> str:
    """Module path of an attention's Linear."""
    return next(path for path in linear_targets(unet) if path.endswith("attn1.to_q"))


@pytest.fixture
def kohya(unet: Any, path: str) -> State:
    """A file in kohya's layout, in bfloat16, whose alpha is half of its rank."""
    inputs, outputs = linear_targets(unet)[path]
    name = "lora_unet_" + path.replace(".", "_")
    return {
        f"{name}.lora_down.weight": torch.randn(RANK, inputs).bfloat16(),
        f"{name}.lora_up.weight": torch.randn(outputs, RANK).bfloat16(),
        f"{name}.alpha": torch.tensor(ALPHA),
    }


@pytest.fixture
def import_(train: TrainServiceStub, store: ArtifactStore) -> Import:
    """Sends bytes or tensors as a file, in pieces of a thousand bytes."""

    def send(
        content: State | bytes, *, facts: dict[str, str] | None = None, **fields: str
    ) -> train_pb2.ModelVersion:
        data = content if isinstance(content, bytes) else save(content, metadata=facts)
        header = {"parent": "projects/p", "model_id": "found", "trigger_word": "<lace>", **fields}

        def messages() -> Iterator[train_pb2.ImportModelVersionRequest]:
            yield train_pb2.ImportModelVersionRequest(
                header=train_pb2.ImportModelVersionHeader(**header)
            )
            for start in range(0, len(data), 1000):
                yield train_pb2.ImportModelVersionRequest(chunk=data[start : start + 1000])

        return train.ImportModelVersion(messages()).version

    return send


def download(train: TrainServiceStub, version: train_pb2.ModelVersion, path: str) -> State:
    request = train_pb2.DownloadModelFileRequest(name=version.name, path=path)
    return load(b"".join(answer.chunk for answer in train.DownloadModelFile(request)))


def as_diffusers(kohya: State, path: str) -> State:
    down, up, _ = (kohya[key] for key in sorted(kohya, key=lambda k: "alpha" in k))
    return {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}


def test_a_kohya_file_becomes_a_version_in_both_layouts(
    train: TrainServiceStub, import_: Import, kohya: State, path: str
) -> None:
    facts = {"modelspec.author": "somebody", "ss_base_model_version": "sdxl_base_v1-0"}
    data = save(kohya, metadata=facts)  # once: the order of a header is by chance
    version = import_(data)

    assert version.name == "projects/p/models/found/versions/1"
    assert (version.adapter_type, version.base) == ("lora", "bases/tiny")
    assert version.imported_digest == hashlib.sha256(data).hexdigest()
    assert not version.dataset_version
    assert not version.job
    assert (version.config.rank, version.config.alpha) == (RANK, ALPHA)
    assert not version.config.HasField("steps")
    assert version.trigger_word == "<lace>"
    again = download(train, version, KOHYA_FILE)
    assert again.keys() == kohya.keys()
    assert all(torch.equal(again[key], kohya[key]) for key in kohya)
    peft = download(train, version, DIFFUSERS_FILE)
    want = as_diffusers(kohya, path)
    assert peft.keys() == want.keys()
    assert all(torch.equal(peft[key], want[key]) for key in want)


def test_the_rank_of_a_version_is_what_engines_must_hold(
    import_: Import, kohya: State, unet: Any
) -> None:
    for path, (inputs, outputs) in linear_targets(unet).items():
        if path.endswith(("attn1.to_k", "attn1.to_v")):
            name, rank = "lora_unet_" + path.replace(".", "_"), 2
            if "mid_block" in path and path.endswith("to_k"):
                rank = 3 * RANK
            kohya[f"{name}.lora_down.weight"] = torch.randn(rank, inputs).bfloat16()
            kohya[f"{name}.lora_up.weight"] = torch.randn(outputs, rank).bfloat16()
            kohya[f"{name}.alpha"] = torch.tensor(float(rank))
    version = import_(kohya)
    assert (version.config.rank, version.config.alpha) == (3 * RANK, 3 * RANK)


TEXT_PATHS = (
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj",
)


@pytest.fixture
def with_text(kohya: State, bundle_path: Path) -> State:
    """The same file with layers of both text encoders, of a rank over what the bank takes."""
    targets = text_targets(empty_text_encoders(bundle_path))
    state = dict(kohya)
    for path in TEXT_PATHS:
        inputs, outputs = targets[path]
        name = kohya_name(path)
        state[f"{name}.lora_down.weight"] = torch.randn(70, inputs)
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, 70)
        state[f"{name}.alpha"] = torch.tensor(35.0)
    return state


def test_the_text_encoders_of_a_kohya_file_come_along(
    train: TrainServiceStub, import_: Import, with_text: State, store: ArtifactStore, unet: Any
) -> None:
    version = import_(with_text)
    again = download(train, version, KOHYA_FILE)
    assert again.keys() == with_text.keys()
    assert all(torch.equal(again[key], with_text[key]) for key in with_text)
    peft = download(train, version, DIFFUSERS_FILE)
    assert {key.rpartition(".lora_")[0] for key in peft if key.startswith("text")} == {*TEXT_PATHS}
    assert (version.config.rank, version.config.alpha) == (RANK, ALPHA), "the UNet's"
    (packed,) = [info.key for info in store.list("projects/p/models/") if ".bank/" in info.key]
    assert load(store.get(packed)).keys() == set(bank_layout(unet).input_names)

    # A PEFT file of the same, as transformers 5 names the first encoder's modules.
    flat = {key.replace("text_encoder.text_model.", "text_encoder."): peft[key] for key in peft}
    parts = {"unet": (RANK, ALPHA), "text_encoder": (70, 35.0), "text_encoder_2": (70, 35.0)}
    config = {f"{p}.r": r for p, (r, _) in parts.items()}
    config |= {f"{p}.lora_alpha": alpha for p, (_, alpha) in parts.items()}
    version = import_(flat, facts={"lora_adapter_metadata": json.dumps(config)})
    again = download(train, version, KOHYA_FILE)
    assert all(torch.equal(again[key], with_text[key]) for key in with_text)


def test_text_encoders_of_other_sizes_are_refused(import_: Import, with_text: State) -> None:
    name = kohya_name(TEXT_PATHS[0])
    with pytest.raises(InvalidArgumentError, match="the base's is") as caught:
        import_({**with_text, f"{name}.lora_down.weight": torch.ones(70, 3)})
    assert caught.value.reason == "ADAPTER_MISMATCH"
    assert caught.value.metadata["field"] == "chunk"


def test_names_of_stabilitys_own_blocks_are_understood(
    train: TrainServiceStub, import_: Import, unet: Any
) -> None:
    """What sd-scripts write for SDXL; the tiny base has attention in its second block and on."""
    targets = [path for path in linear_targets(unet) if path.endswith("attn1.to_q")]
    down = next(path for path in targets if path.startswith("down_blocks"))
    block, layer = down.split(".")[1], down.split(".")[3]
    per_block = unet.config.layers_per_block
    number = 1 + int(block) * (per_block + 1) + int(layer)
    inputs, outputs = linear_targets(unet)[down]
    names = {
        f"input_blocks_{number}_1_{'_'.join(down.split('.')[4:])}": (inputs, outputs),
        "middle_block_1_transformer_blocks_0_attn1_to_q": linear_targets(unet)[
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        ],
    }
    state: State = {}
    for name, (wide, tall) in names.items():
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, wide)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(tall, 2)
    version = import_(state)
    mine = download(train, version, DIFFUSERS_FILE)
    name = next(iter(names))
    assert torch.equal(
        mine[f"unet.{down}.lora_A.weight"], state[f"lora_unet_{name}.lora_down.weight"]
    )
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight" in mine
    assert version.config.alpha == 2  # none said: the rank


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", ""])
def test_a_peft_file_keeps_the_alpha_of_its_header(
    train: TrainServiceStub, import_: Import, kohya: State, path: str, prefix: str
) -> None:
    state = {prefix + k.removeprefix("unet."): v for k, v in as_diffusers(kohya, path).items()}
    facts = {"lora_adapter_metadata": f'{{"unet.r": {RANK}, "unet.lora_alpha": {ALPHA}}}'}
    version = import_(state, facts=facts)
    again = download(train, version, KOHYA_FILE)
    assert all(torch.equal(again[key], kohya[key]) for key in kohya)


def test_the_bank_gets_its_file_and_deleting_takes_it_along(
    train: TrainServiceStub, import_: Import, kohya: State, unet: Any, store: ArtifactStore
) -> None:
    version = import_(kohya)
    (info,) = [info for info in store.list("projects/p/models/") if ".bank/" in info.key]
    artifact = info.key.partition(".bank/")[0]
    assert info.key == PackedFiles(store, bank_layout(unet)).key(artifact)
    assert set(read_manifest(store, artifact).files) == {DIFFUSERS_FILE, KOHYA_FILE}
    train.DeleteModelVersion(train_pb2.DeleteModelVersionRequest(name=version.name))
    assert list(store.list("projects/p/models/")) == []


def test_the_same_request_is_one_version(
    train: TrainServiceStub, import_: Import, kohya: State, catalog: Catalog
) -> None:
    first = import_(kohya, request_id="one")
    assert import_(kohya, request_id="one") == first
    assert import_(kohya, request_id="two").name == "projects/p/models/found/versions/2"
    other = {key: tensor + 1 for key, tensor in kohya.items()}
    for change in ({"content": other}, {"content": kohya, "model_id": "elsewhere"}):
        with pytest.raises(RequestReusedError):
            import_(**change, request_id="one")
    train.DeleteModelVersion(train_pb2.DeleteModelVersionRequest(name=first.name))
    assert import_(kohya, request_id="one").name == "projects/p/models/found/versions/3"


def test_a_dora_becomes_a_version_that_no_engine_is_given(
    train: TrainServiceStub,
    import_: Import,
    store: ArtifactStore,
    kohya: State,
    path: str,
    unet: Any,
) -> None:
    name = "lora_unet_" + path.replace(".", "_")
    scale = torch.rand(linear_targets(unet)[path][1], 1)
    feed_forward = next(path for path in linear_targets(unet) if path.endswith("ff.net.2"))
    inputs, outputs = linear_targets(unet)[feed_forward]
    other = "lora_unet_" + feed_forward.replace(".", "_")
    dora = {
        **kohya,
        f"{name}.dora_scale": scale,
        f"{other}.lora_down.weight": torch.ones(2, inputs),
        f"{other}.lora_up.weight": torch.ones(outputs, 2),
        f"{other}.dora_scale": torch.ones(outputs, 1),
        f"{other}.alpha": torch.tensor(1.0),
    }
    version = import_(dora)
    assert version.config.use_dora
    again = download(train, version, KOHYA_FILE)
    assert again.keys() == dora.keys()
    assert all(torch.equal(again[key], dora[key]) for key in dora)
    peft = download(train, version, DIFFUSERS_FILE)
    assert torch.equal(peft[f"unet.{path}.lora_magnitude_vector"], scale[:, 0])
    assert not [info for info in store.list("projects/p/models/") if ".bank/" in info.key]


def with_(key: str, *shape: int, dtype: Any = None) -> State:
    return {key: torch.ones(shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        (with_("lora_te1_text_model_x.lora_down.weight", 2, 3), "unknown keys"),
        (with_("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", 1), "unknown keys"),
        (with_("lora_te1_text_model_encoder_layers_9_mlp_fc1.alpha", 1), "unknown keys"),
        (with_("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", 2, 3), "LoHa"),
        (with_("text_encoder_2.x.lora_A.weight", 2, 3), "unknown keys"),
        (
            with_("text_encoder.layers.0.q_proj.lora_linear_layer.down.weight", 2, 3),
            "diffusers' early layout",
        ),
        (with_("lora_unet_x.lokr_w1", 2, 3), "LoKr"),
        (with_("lora_unet_x.hada_w1_a", 2, 3), "LoHa"),
        (with_("lora_unet_x.dora_scale", 2, 3), "unknown keys"),
        (with_("unet.x.lora_magnitude_vector", 2), "unknown keys"),
        (with_("lora_unet_conv_in.lora_down.weight", 2, 3, 3, 3), "convolution layers"),
        (with_("lora_unet_x.lora_mid.weight", 2, 2, 3, 3), "convolution layers"),
        (with_("lora_unet_x.diff", 2, 2), "whole weights"),
        (with_("unet.x.to_q_lora.down.weight", 2, 2), "diffusers' early layout"),
        (with_("bundle_emb.a.string_to_param.*", 2, 2), "text embeddings"),
        (with_("transformer.x.lora_A.weight", 2, 2), "layers of another architecture"),
        (with_("lora_unet_nowhere.lora_down.weight", 2, 3), "unknown keys"),
        (with_("anything", 2), "unknown keys"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    import_: Import,
    kohya: State,
    catalog: Catalog,
    store: ArtifactStore,
    extra: State,
    kind: str,
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        import_({**kohya, **extra})
    assert caught.value.reason == "UNSUPPORTED_ADAPTER"
    (key,) = extra
    facts = caught.value.metadata
    assert (facts["feature"], facts["key"], facts["count"]) == (kind, key, "1")
    assert kind in caught.value.message
    with catalog.reading() as session:
        assert session.query(ModelVersionRow).count() == session.query(ModelRow).count() == 0
    assert list(store.list("projects/")) == []


def test_numbers_that_cannot_be_served_are_refused(import_: Import, kohya: State) -> None:
    eighth = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in kohya.items()}
    with pytest.raises(InvalidArgumentError, match="numbers of type F8_E4M3") as caught:
        import_(eighth)
    assert caught.value.reason == "UNSUPPORTED_ADAPTER"


def test_layers_and_ranks_must_fit_the_base_and_the_bank(
    import_: Import, kohya: State, unet: Any
) -> None:
    name = next(iter(kohya)).partition(".")[0]
    outputs, inputs = kohya[f"{name}.lora_up.weight"].shape[0], 3
    cases = {
        "the base's is": {f"{name}.lora_down.weight": torch.ones(RANK, inputs)},
        "rank 65": {
            f"{name}.lora_down.weight": torch.ones(65, kohya[f"{name}.lora_down.weight"].shape[1]),
            f"{name}.lora_up.weight": torch.ones(outputs, 65),
        },
    }
    for says, change in cases.items():
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            import_({**kohya, **change})
        assert caught.value.reason == "ADAPTER_MISMATCH"
        assert caught.value.metadata["field"] == "chunk"


def whole_transformers(unet: Any) -> State:
    """What kohya's trainer writes unless it is told otherwise."""
    state: State = {}
    for path, (inputs, outputs) in linear_targets(unet).items():
        if path.endswith(tuple("." + end for end in TRANSFORMER_TARGETS)):
            name = "lora_unet_" + path.replace(".", "_")
            state[f"{name}.lora_down.weight"] = torch.randn(RANK, inputs)
            state[f"{name}.lora_up.weight"] = torch.randn(outputs, RANK)
    return state


def test_layers_beside_attention_want_an_engine_that_takes_them(
    import_: Import,
    settings: Settings,
    catalog: Catalog,
    store: ArtifactStore,
    unet: Any,
    tmp_path: Path,
) -> None:
    state = whole_transformers(unet)
    with pytest.raises(InvalidArgumentError, match="TOILE_ENGINE__TARGETS=transformer") as caught:
        import_(state)
    assert caught.value.reason == "UNSUPPORTED_ADAPTER"
    assert (
        int(caught.value.metadata["count"])
        == sum(not key.endswith("alpha") and "attn" not in key for key in state) // 2
    )

    wide = settings.model_copy(update={"engine": EngineSettings(targets="transformer")})
    file = tmp_path / "found.safetensors"
    file.write_bytes(save(state))
    header = train_pb2.ImportModelVersionHeader(parent="projects/p", model_id="found")
    view = Importer(wide, catalog, store).run(header, file)

    layout = bank_layout(unet, TRANSFORMER_TARGETS)
    assert store.exists(PackedFiles(store, layout).key(view.row.artifact))
    assert not store.exists(PackedFiles(store, bank_layout(unet)).key(view.row.artifact))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": torch.tensor(float("nan"))}, "alpha nan"),
        ({"alpha": torch.ones(3)}, "not one number"),
        ({"lora_up.weight": torch.ones(3, 5)}, "ranks 4 and 5"),
        ({"lora_up.weight": None}, "half"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    import_: Import, kohya: State, change: dict[str, Any], says: str
) -> None:
    name = next(iter(kohya)).partition(".")[0]
    for key, tensor in change.items():
        kohya[f"{name}.{key}"] = tensor
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        import_({key: tensor for key, tensor in kohya.items() if tensor is not None})
    assert caught.value.reason == "BAD_ADAPTER"


def test_pickles_are_known_by_their_content(import_: Import, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "lora.safetensors")
    for data in ((tmp_path / "lora.safetensors").read_bytes(), b"\x80\x04K\x01."):
        with pytest.raises(InvalidArgumentError, match="pickle") as caught:
            import_(data)
        assert caught.value.reason == "BAD_ADAPTER"
    for data in (b"", b"no LoRA at all", b"\xff" * 100):
        with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
            import_(data)


@pytest.mark.parametrize(
    "facts",
    [
        {"modelspec.architecture": "flux-1-dev/lora"},
        {"ss_base_model_version": "sd_v1"},
        {"toile.base_digest": "e" * 64},
    ],
)
def test_adapters_of_other_bases_are_refused(
    import_: Import, kohya: State, facts: dict[str, str]
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        import_(kohya, facts=facts)
    assert caught.value.reason == "ADAPTER_MISMATCH"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"parent": "p"}, "parent"),
        ({"model_id": "Found!"}, "model_id"),
        ({"base": "tiny"}, "base"),
        ({"trigger_word": "x" * 65}, "trigger_word"),
    ],
)
def test_mistakes_in_the_header_are_named(
    import_: Import, kohya: State, fields: dict[str, str], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        import_(kohya, **fields)
    assert caught.value.metadata["field"] == field


def test_unknown_base(import_: Import, kohya: State) -> None:
    with pytest.raises(NotFoundError):
        import_(kohya, base="bases/none")


def test_messages_in_the_wrong_order(train: TrainServiceStub) -> None:
    header = train_pb2.ImportModelVersionRequest(
        header=train_pb2.ImportModelVersionHeader(parent="projects/p", model_id="m")
    )
    chunk = train_pb2.ImportModelVersionRequest(chunk=b"x")
    for messages in ([], [chunk], [header, header], [train_pb2.ImportModelVersionRequest()]):
        with pytest.raises(InvalidArgumentError) as caught:
            train.ImportModelVersion(iter(messages))
        assert caught.value.reason == "BAD_MESSAGE_ORDER"


class TestSmallLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        limits = settings.limits.model_copy(update={"adapter_bytes": 2000})
        return settings.model_copy(update={"limits": limits})

    def test_files_over_the_limit_are_refused(self, import_: Import) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            import_(b"x" * 2001)
        assert caught.value.reason == "TOO_MANY_BYTES"


def test_a_service_without_torch_says_so(
    import_: Import, kohya: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "toile.train.conversion", None)
    with pytest.raises(FailedPreconditionError) as caught:
        import_(kohya)
    assert caught.value.reason == "IMPORT_UNAVAILABLE"
