import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_fit import check_fits
from toile.diffusion.adapter_header import AdapterCard, TrainingImages
from toile.diffusion.adapters import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    AdapterWeights,
    LoraLayer,
    linear_targets,
    load_lora,
    read_diffusers,
    read_kohya,
    write_adapter,
    write_lora,
)
from toile.diffusion.bundle import Bundle
from unit.diffusion.doras import as_dora

PATHS = ("down_blocks.0.attn.to_q", "down_blocks.0.attn.to_out.0", "mid_block.attn_1.to_k")
TEXT_PATHS = (
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.10.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj",
    "text_encoder_2.text_projection",
)
CARD = AdapterCard(
    title="lace",
    base="bases/tiny",
    base_digest="d" * 64,
    resolution=128,
    trigger_word="<lace>",
    dataset_version="projects/p/datasets/lace/versions/3",
    dataset_digest="e" * 64,
    license="CC0-1.0",
    tags=("lace", "white"),
    prediction_type="v_prediction",
    images=(
        TrainingImages(["<lace>, Ivory lace", "<lace>,black lace, "]),
        TrainingImages(["<lace>, a collar"], repeats=3),
    ),
    held_out_count=2,
    class_prompt="a dress",
    class_image_count=4,
    seed=7,
    created=datetime(2026, 11, 21, 12, tzinfo=UTC),
)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def assert_same(one: AdapterWeights, other: AdapterWeights) -> None:
    for mine, theirs in ((one.layers, other.layers), (one.text_layers, other.text_layers)):
        assert mine.keys() == theirs.keys()
        for path, layer in mine.items():
            assert layer.alpha == theirs[path].alpha
            assert torch.equal(layer.down, theirs[path].down)
            assert torch.equal(layer.up, theirs[path].up)
            assert layer.tensors.keys() == theirs[path].tensors.keys()
            if layer.magnitude is not None:
                assert torch.equal(layer.magnitude, theirs[path].magnitude)


@st.composite
def adapters(draw: st.DrawFn) -> AdapterWeights:
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    layers, is_dora = {}, draw(st.booleans())
    paths = draw(st.sets(st.sampled_from(PATHS), min_size=1))
    for path in paths | draw(st.sets(st.sampled_from(TEXT_PATHS))):
        rank = draw(st.integers(1, 5))
        alpha = draw(st.floats(0.0625, 64, width=32))
        numbers = torch.arange(rank * 7, dtype=torch.float32).to(dtype)
        layers[path] = LoraLayer(
            numbers[: rank * 4].view(rank, 4),
            numbers[-rank * 3 :].view(3, rank),
            alpha,
            numbers[:3] + 1 if is_dora and path in PATHS else None,
        )
    text = {path: layers.pop(path) for path in layers.keys() - set(PATHS)}
    return AdapterWeights(layers, text_layers=text)


@given(weights=adapters())
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_both_files_give_back_what_was_written(weights: AdapterWeights, tmp_path: Path) -> None:
    write_adapter(tmp_path, weights, CARD)
    assert_same(read_diffusers(tmp_path / DIFFUSERS_FILE), weights)
    assert_same(read_kohya(tmp_path / KOHYA_FILE, PATHS), weights)


def test_a_trained_state_keeps_its_alpha_in_both_files(tmp_path: Path) -> None:
    state = {
        "down_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8),
        "down_blocks.0.attn.to_q.lora_B.weight": torch.ones(6, 4),
    }
    write_lora(tmp_path, state, 4, 1.5, CARD)
    kohya = load_file(tmp_path / KOHYA_FILE)
    assert set(kohya) == {
        f"lora_unet_down_blocks_0_attn_to_q{end}"
        for end in (".lora_down.weight", ".lora_up.weight", ".alpha")
    }
    assert float(kohya["lora_unet_down_blocks_0_attn_to_q.alpha"]) == 1.5
    config = json.loads(header_of(tmp_path / DIFFUSERS_FILE)["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 1.5)
    assert set(load_file(tmp_path / DIFFUSERS_FILE)) == {f"unet.{key}" for key in state}
    assert load_lora(tmp_path).layers["down_blocks.0.attn.to_q"].alpha == 1.5


def test_a_trained_state_has_its_text_encoders_in_both_files(tmp_path: Path) -> None:
    """Under one name, whether transformers flattens the first encoder, as 5 does, or not."""
    flat, nested = "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj"
    state = {
        "mid.to_q.lora_A.weight": torch.ones(4, 8),
        "mid.to_q.lora_B.weight": torch.ones(6, 4),
        f"text_encoder.{flat}.lora_A.weight": torch.full((4, 8), 2.0),
        f"text_encoder.{flat}.lora_B.weight": torch.ones(6, 4),
        f"text_encoder_2.text_model.{nested}.lora_A.weight": torch.full((4, 8), 3.0),
        f"text_encoder_2.text_model.{nested}.lora_B.weight": torch.ones(6, 4),
    }
    write_lora(tmp_path, state, 4, 1.5, CARD)
    kohya = load_file(tmp_path / KOHYA_FILE)
    te1 = kohya["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"]
    te2 = kohya["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"]
    assert (float(te1[0, 0]), float(te2[0, 0])) == (2.0, 3.0)
    assert float(kohya["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.alpha"]) == 1.5
    peft = load_file(tmp_path / DIFFUSERS_FILE)
    assert set(peft) == {
        (key if key.startswith("text_encoder") else f"unet.{key}").replace(
            "text_encoder.enc", "text_encoder.text_model.enc"
        )
        for key in state
    }
    config = json.loads(header_of(tmp_path / DIFFUSERS_FILE)["lora_adapter_metadata"])
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert (config[f"{part}.r"], config[f"{part}.lora_alpha"]) == (4, 1.5)


@pytest.mark.parametrize("anchor", ["", "^", "text_model.", "^text_model."])
@pytest.mark.parametrize("around", ["", "text_model."])
def test_text_encoders_of_a_peft_file_have_the_strength_of_their_header(
    tmp_path: Path, anchor: str, around: str
) -> None:
    one, other = "encoder.layers.1.mlp.fc1", "encoder.layers.11.mlp.fc1"
    state = {
        f"text_encoder.{around}{path}.lora_{half}.weight": torch.ones(2, 2)
        for path in (one, other)
        for half in "AB"
    }
    config = {
        "unet.lora_alpha": 9.0,
        "text_encoder.lora_alpha": 1.0,
        "text_encoder.alpha_pattern": {anchor + one: 0.5},
    }
    facts = {"lora_adapter_metadata": json.dumps(config)}
    save_file({**GOOD, **state}, tmp_path / DIFFUSERS_FILE, metadata=facts)
    weights = load_lora(tmp_path)
    assert {path: layer.alpha for path, layer in weights.text_layers.items()} == {
        f"text_encoder.text_model.{one}": 0.5,
        f"text_encoder.text_model.{other}": 1.0,
    }
    assert weights.layers["a.to_q"].alpha == 9.0


def test_a_state_of_another_rank_is_refused(tmp_path: Path) -> None:
    state = {"a.lora_A.weight": torch.ones(4, 8), "a.lora_B.weight": torch.ones(6, 4)}
    with pytest.raises(InvalidArgumentError, match="rank 4, not 8"):
        write_lora(tmp_path, state, 8, 8, CARD)
    assert not list(tmp_path.iterdir())


def test_the_header_is_the_golden_one(tmp_path: Path) -> None:
    weights = AdapterWeights({"a.to_q": LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    write_adapter(tmp_path, weights, CARD)
    header = header_of(tmp_path / KOHYA_FILE)
    whole = header.pop("modelspec.hash_sha256")
    assert header.pop("sshs_model_hash") == whole.removeprefix("0x")
    assert header == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "lace",
        "modelspec.resolution": "128x128",
        "modelspec.date": "2026-11-21T12:00:00+00:00",
        "modelspec.license": "CC0-1.0",
        "modelspec.trigger_phrase": "<lace>",
        "modelspec.usage_hint": "Put <lace> in the prompt.",
        "modelspec.tags": "lace, white",
        "modelspec.prediction_type": "v",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_output_name": "lace",
        "ss_resolution": "(128, 128)",
        "ss_seed": "7",
        # As sd-scripts count: three images with their repeats, captions by their tags.
        "ss_num_train_images": "5",
        "ss_num_validation_images": "2",
        "ss_num_reg_images": "4",
        "ss_tag_frequency": (
            '{"3_lace": {"<lace>": 1, "a collar": 1}, '
            '"lace": {"<lace>": 2, "black lace": 1, "ivory lace": 1}}'
        ),
        "ss_dataset_dirs": (
            '{"3_lace": {"img_count": 1, "n_repeats": 3}, "lace": {"img_count": 2, "n_repeats": 1}}'
        ),
        "ss_reg_dataset_dirs": '{"1_a dress": {"img_count": 4, "n_repeats": 1}}',
        "ss_bucket_info": '{"buckets": {"0": {"count": 9, "resolution": [128, 128]}}}',
        "sshs_legacy_hash": "e3b0c442",  # sha256 of nothing: the file ends before 1 MiB
        "toile.base": "bases/tiny",
        "toile.base_digest": "d" * 64,
        "toile.dataset_version": "projects/p/datasets/lace/versions/3",
        "toile.dataset_digest": "e" * 64,
        "toile.version": header["toile.version"],
    }


def test_the_model_hash_is_of_the_data_after_the_header(tmp_path: Path) -> None:
    weights = AdapterWeights({"a.to_q": LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    write_adapter(tmp_path, weights, CARD)
    data = (tmp_path / KOHYA_FILE).read_bytes()
    start = int.from_bytes(data[:8], "little") + 8
    assert header_of(tmp_path / KOHYA_FILE)["sshs_model_hash"] == (
        hashlib.sha256(data[start:]).hexdigest()
    )


GOOD = {
    "unet.a.to_q.lora_A.weight": torch.ones(2, 3),
    "unet.a.to_q.lora_B.weight": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unet.a.to_q.lora_E": torch.ones(4)}, "lora_E"),
        ({"text_encoder.x.lora_A.weight": torch.ones(2, 3)}, "text_encoder.x lacks half"),
        ({"text_encoder.x.lora_magnitude_vector": torch.ones(4)}, "text_encoder.x lacks half"),
        ({"a.to_q.lora_A.weight": torch.ones(2, 3)}, "twice"),
        ({"unet.b.lora_A.weight": torch.ones(2, 3)}, "half"),
        ({"unet.a.to_q.lora_B.weight": torch.ones(4, 3)}, "ranks 2 and 3"),
        ({"unet.a.to_q.lora_A.weight": torch.full((2, 3), torch.nan)}, "not finite"),
        (
            {
                "unet.c.lora_A.weight": torch.ones(2, 3, 3, 3),
                "unet.c.lora_B.weight": torch.ones(4, 2, 1, 1),
            },
            "Linear",
        ),
        ({"unet.x.hada_w1_a": torch.ones(2, 3)}, "hada_w1_a"),
    ],
)
def test_nothing_of_a_file_is_left_out(
    tmp_path: Path, change: dict[str, torch.Tensor], says: str
) -> None:
    save_file({**GOOD, **change}, tmp_path / DIFFUSERS_FILE)
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        load_lora(tmp_path)
    assert caught.value.reason == "BAD_ADAPTER"


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_x.lora_down.weight",
        "lora_te3_text_projection.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_q_proj_x.lora_down.weight",
        "lora_unet_elsewhere.lora_down.weight",
        "lora_unet_a_to_q.oft",
    ],
)
def test_unknown_kohya_keys_are_refused(tmp_path: Path, key: str) -> None:
    good = {
        "lora_unet_a_to_q.lora_down.weight": torch.ones(2, 3),
        "lora_unet_a_to_q.lora_up.weight": torch.ones(4, 2),
    }
    save_file(good, tmp_path / KOHYA_FILE)
    assert load_lora(tmp_path, targets=["a.to_q"]).layers["a.to_q"].alpha == 2  # none said: rank
    save_file({**good, key: torch.ones(2, 3)}, tmp_path / KOHYA_FILE)
    with pytest.raises(InvalidArgumentError, match="is not a LoRA tensor of the UNet"):
        load_lora(tmp_path, targets=["a.to_q"])


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": "[]"},
        {"lora_adapter_metadata": '{"unet.use_dora": true}'},
        {"lora_adapter_metadata": '{"text_encoder_2.use_dora": true}'},
        {"lora_adapter_metadata": '{"unet.r": 8, "unet.lora_alpha": 8}'},
    ],
)
def test_headers_that_contradict_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(GOOD, tmp_path / DIFFUSERS_FILE, metadata=metadata)
    with pytest.raises(InvalidArgumentError):
        load_lora(tmp_path)


def test_a_file_of_the_text_encoders_alone_is_refused(tmp_path: Path) -> None:
    state = {key.replace("unet.a", "text_encoder.a"): tensor for key, tensor in GOOD.items()}
    save_file(state, tmp_path / DIFFUSERS_FILE)
    with pytest.raises(InvalidArgumentError, match="no layers of the UNet"):
        load_lora(tmp_path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="neither"):
        load_lora(tmp_path)
    (tmp_path / DIFFUSERS_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        load_lora(tmp_path)


def test_what_does_not_fit_the_base_is_refused(bundle: Bundle, lora: AdapterWeights) -> None:
    targets = linear_targets(bundle.unet)
    check_fits(lora, targets)
    path = next(iter(lora.layers))
    inputs, outputs = targets[path]
    for layers, says in (
        ({"elsewhere": lora.layers[path]}, "no Linear elsewhere"),
        ({path: LoraLayer(torch.ones(2, 3), torch.ones(outputs, 2), 1)}, "the base's is"),
        ({path: LoraLayer(torch.ones(65, inputs), torch.ones(outputs, 65), 1)}, "rank 65"),
    ):
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            check_fits(AdapterWeights(layers), targets)
        assert caught.value.reason == "ADAPTER_MISMATCH"


DORA = {
    "unet.a.to_q.lora_A.weight": torch.ones(2, 3),
    "unet.a.to_q.lora_B.weight": torch.ones(4, 2),
    "unet.a.to_q.lora_magnitude_vector": torch.ones(4),
}
WORD = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def test_a_dora_says_so_in_both_files(tmp_path: Path) -> None:
    state = {key.removeprefix("unet."): tensor for key, tensor in DORA.items()}
    write_lora(tmp_path, state, 2, 2, CARD)
    assert set(load_file(tmp_path / DIFFUSERS_FILE)) == set(DORA)
    assert load_file(tmp_path / KOHYA_FILE)["lora_unet_a_to_q.dora_scale"].shape == (4, 1)
    header = header_of(tmp_path / DIFFUSERS_FILE)
    assert json.loads(header["lora_adapter_metadata"])["unet.use_dora"] is True
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"])["wd_on_output"] == "True"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unet.b.lora_A.weight": torch.ones(2, 3), "unet.b.lora_B.weight": torch.ones(4, 2)},
         "b has no magnitudes"),
        ({"unet.a.to_q.lora_magnitude_vector": torch.ones(3)}, "one for each of 4 rows"),
        ({"unet.a.to_q.lora_magnitude_vector": torch.full((4,), torch.nan)}, "not finite"),
        ({"unet.c.lora_magnitude_vector": torch.ones(3)}, "c lacks half"),
        ({key.replace("unet.a.to_q", "text_encoder.layers.0.mlp.fc1"): tensor + 1
          for key, tensor in DORA.items()},
         "of a text encoder"),
    ],
)  # fmt: skip
def test_what_is_no_dora_of_rows_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor], says: str
) -> None:
    save_file(DORA, tmp_path / DIFFUSERS_FILE)
    assert load_lora(tmp_path).is_dora
    save_file({**DORA, **change}, tmp_path / DIFFUSERS_FILE)
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        load_lora(tmp_path)
    assert caught.value.reason == "BAD_ADAPTER"


def test_a_header_that_forgets_the_magnitudes_is_refused(tmp_path: Path) -> None:
    """diffusers, which goes by it, would draw a plain LoRA."""
    facts = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'}
    save_file(DORA, tmp_path / DIFFUSERS_FILE, metadata=facts)
    with pytest.raises(InvalidArgumentError, match="whether it is a DoRA"):
        load_lora(tmp_path)


def test_scales_of_columns_are_not_taken_for_those_of_rows(tmp_path: Path) -> None:
    kohya = {
        "lora_unet_a_to_q.lora_down.weight": torch.ones(2, 4),
        "lora_unet_a_to_q.lora_up.weight": torch.ones(4, 2),
        "lora_unet_a_to_q.dora_scale": torch.ones(4, 1),
    }
    save_file(kohya, tmp_path / KOHYA_FILE)
    assert load_lora(tmp_path, targets=["a.to_q"]).layers["a.to_q"].magnitude is not None
    save_file({**kohya, "lora_unet_a_to_q.dora_scale": torch.ones(1, 4)}, tmp_path / KOHYA_FILE)
    with pytest.raises(InvalidArgumentError, match=r"magnitudes are \[1, 4\]"):
        load_lora(tmp_path, targets=["a.to_q"])


@pytest.mark.parametrize(
    ("file", "kind"),
    # Of a file in kohya's layout diffusers leaves the scales of a DoRA out, with a warning.
    [(DIFFUSERS_FILE, "lora"), (KOHYA_FILE, "lora"), (DIFFUSERS_FILE, "dora")],
)
def test_diffusers_itself_applies_the_files_at_the_right_strength(
    bundle: Bundle, lora: AdapterWeights, tmp_path: Path, file: str, kind: str
) -> None:
    """Strength equal by output: alpha differs from the rank here."""
    if kind == "dora":
        lora = as_dora(lora, bundle)
    write_adapter(tmp_path, lora, CARD)
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)
    inputs = {
        "sample": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.ones(1, 77, pipeline.unet.config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": torch.ones(1, pipeline.text_encoder_2.config.projection_dim),
            "time_ids": torch.ones(1, 6),
        },
    }
    merged = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True).unet
    for path, layer in lora.layers.items():
        weight = merged.get_submodule(path).weight.data
        weight += layer.alpha / layer.rank * layer.up @ layer.down
        if layer.magnitude is not None:
            weight *= (layer.magnitude / weight.norm(dim=1))[:, None]
    pipeline.load_lora_weights(tmp_path, weight_name=file)
    with torch.inference_mode():
        want = merged(**inputs).sample
        have = pipeline.unet(**inputs).sample
    assert torch.allclose(have, want, atol=1e-4)
