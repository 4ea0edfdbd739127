"""The exported files are what other programs look for, and as strong there as here.

The rules of ComfyUI and InvokeAI are in `toile.diffusion.conformance`, which the publish gate goes
by; here they are held against SDXL's own names, spelt out. diffusers is asked itself.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from toile.core.clock import now
from toile.core.errors import InvalidArgumentError, ToileError
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    AdapterWeights,
    LoraLayer,
    linear_targets,
    read_diffusers,
    read_kohya,
    write_adapter,
)
from toile.diffusion.bank import gather
from toile.diffusion.banked_unet import TARGETS, BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.conformance import (
    check_lora,
    comfyui_strengths,
    content_hash,
    invokeai_modules,
    module_path,
)
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.drawing import encode_prompts
from toile.diffusion.kohya_keys import kohya_name, kohya_names
from toile.diffusion.pipelines import DiffusionRequest
from toile.diffusion.text_encoders import text_targets
from toile.diffusion.triton.packed import pack_adapter

State = dict[str, torch.Tensor]
Facts = dict[str, str]
CARD = AdapterCard(title="lace", base="bases/sdxl", base_digest="", resolution=1024, created=now())
SDXL_SHAPE = {
    # Blocks, layers and depths of stable-diffusion-xl-base-1.0, on which the names depend;
    # narrow, which they do not depend on.
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": (1, 2, 4),
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}
TRANSFORMERS = {
    # Stability's name of each of SDXL's transformers, diffusers' name, and its depth.
    "input_blocks_4_1": ("down_blocks_1_attentions_0", 2),
    "input_blocks_5_1": ("down_blocks_1_attentions_1", 2),
    "input_blocks_7_1": ("down_blocks_2_attentions_0", 10),
    "input_blocks_8_1": ("down_blocks_2_attentions_1", 10),
    "middle_block_1": ("mid_block_attentions_0", 10),
    "output_blocks_0_1": ("up_blocks_0_attentions_0", 10),
    "output_blocks_1_1": ("up_blocks_0_attentions_1", 10),
    "output_blocks_2_1": ("up_blocks_0_attentions_2", 10),
    "output_blocks_3_1": ("up_blocks_1_attentions_0", 2),
    "output_blocks_4_1": ("up_blocks_1_attentions_1", 2),
    "output_blocks_5_1": ("up_blocks_1_attentions_2", 2),
}
LINEARS = ("to_q", "to_k", "to_v", "to_out_0")
FEED_FORWARD = ("ff_net_0_proj", "ff_net_2")
TEXT_LAYERS = {"1": 12, "2": 32}
"""Depths of SDXL's two text encoders."""
TEXT_LINEARS = (
    *(f"self_attn_{name}_proj" for name in ("k", "q", "v", "out")),
    *("mlp_fc1", "mlp_fc2"),
)


def linear_names(targets: str) -> Iterator[tuple[str, str]]:
    """Names of SDXL's attention Linears, or of all of its transformers' Linears.

    By Stability's modules and by diffusers'.
    """
    for stability, (diffusers, depth) in TRANSFORMERS.items():
        for rest in _linears(depth, targets):
            yield f"lora_unet_{stability}_{rest}", f"lora_unet_{diffusers}_{rest}"


def _linears(depth: int, targets: str) -> Iterator[str]:
    for number, attention, linear in itertools.product(range(depth), "12", LINEARS):
        yield f"transformer_blocks_{number}_attn{attention}_{linear}"
    if targets == "transformer":
        for number, linear in itertools.product(range(depth), FEED_FORWARD):
            yield f"transformer_blocks_{number}_{linear}"
        yield from ("proj_in", "proj_out")


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_SHAPE)


@pytest.fixture(scope="module", params=TARGETS)
def targets(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_names() -> Iterator[str]:
    """Names of all Linears of SDXL's text encoders' layers."""
    for encoder, depth in TEXT_LAYERS.items():
        for number, linear in itertools.product(range(depth), TEXT_LINEARS):
            yield f"lora_te{encoder}_text_model_encoder_layers_{number}_{linear}"


@pytest.fixture(scope="module")
def text_encoders() -> dict[str, torch.nn.Module]:
    """Encoders of SDXL's depths, narrow; neither is flattened, as where others read the files."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 9}
    with torch.device("meta"):
        return {
            name: CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=depth, **small))
            for name, depth in zip(
                ("text_encoder", "text_encoder_2"), TEXT_LAYERS.values(), strict=True
            )
        }


@pytest.fixture(scope="module")
def exported(
    sdxl: UNet2DConditionModel,
    targets: str,
    text_encoders: dict[str, torch.nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, AdapterWeights]:
    """An adapter on all of SDXL's targets whose layers differ in rank and alpha, as files."""
    folder = tmp_path_factory.mktemp("exported")
    of_text = {
        path: shape
        for path, shape in text_targets(text_encoders).items()
        if not path.endswith("text_projection")
    }
    weights = AdapterWeights(
        mixed_adapter(sdxl, targets, dtype=torch.bfloat16).layers,
        text_layers=mixed_layers(of_text, dtype=torch.bfloat16),
    )
    write_adapter(folder, weights, CARD)
    return folder, weights


def mixed_adapter(
    unet: UNet2DConditionModel,
    targets: str = "attention",
    *,
    alphas: Sequence[float] = (0.5, 3.0, 8.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for index, group in enumerate(bank_layout(unet, TARGETS[targets]).groups):
        for place, path in enumerate(group.targets):
            rank = 1 + (index + place) % 3
            layers[path] = LoraLayer(
                (0.1 * torch.randn(rank, group.in_features, generator=generator)).to(dtype),
                (0.1 * torch.randn(group.out_features, rank, generator=generator)).to(dtype),
                alpha=alphas[place % len(alphas)],
            )
    return AdapterWeights(layers)


def mixed_layers(
    targets: dict[str, tuple[int, int]],
    *,
    alphas: Sequence[float] = (0.5, 3.0, 8.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(4)
    return {
        path: LoraLayer(
            (0.1 * torch.randn(1 + place % 3, inputs, generator=generator)).to(dtype),
            (0.1 * torch.randn(outputs, 1 + place % 3, generator=generator)).to(dtype),
            alpha=alphas[place % len(alphas)],
        )
        for place, (path, (inputs, outputs)) in enumerate(sorted(targets.items()))
    }


def test_comfyui_takes_every_key_and_the_right_strength(
    exported: tuple[Path, AdapterWeights], targets: str
) -> None:
    folder, weights = exported
    known = itertools.chain((n for two in linear_names(targets) for n in two), text_names())
    strengths = comfyui_strengths(folder / KOHYA_FILE, known)
    # 70 transformer blocks with 8 Linears each; or 10 each, and 2 of each of the 11 transformers.
    # 44 layers of text encoders with 6.
    assert len(strengths) == {"attention": 560, "transformer": 722}[targets] + 264
    prefixes = {"text_encoder.": "lora_te1_", "text_encoder_2.": "lora_te2_"}
    names = {path: "lora_unet_" + path for path in weights.layers}
    for path in weights.text_layers:
        part = next(part for part in prefixes if path.startswith(part))
        names[path] = prefixes[part] + path.removeprefix(part)
    layers = {**weights.layers, **weights.text_layers}
    assert strengths == {
        name.replace(".", "_"): layers[path].alpha / layers[path].rank
        for path, name in names.items()
    }


@pytest.fixture(scope="module")
def dora(
    exported: tuple[Path, AdapterWeights], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, AdapterWeights]:
    """The same of the UNet, with magnitudes."""
    layers = {
        path: dataclasses.replace(layer, magnitude=1 + torch.arange(len(layer.up)).to(layer.up))
        for path, layer in exported[1].layers.items()
    }
    folder = tmp_path_factory.mktemp("dora")
    write_adapter(folder, AdapterWeights(layers), CARD)
    return folder, AdapterWeights(layers)


def test_a_dora_passes_the_gate(
    dora: tuple[Path, AdapterWeights], sdxl: UNet2DConditionModel, tmp_path: Path
) -> None:
    folder, weights = dora
    check_lora(folder, sdxl)
    names = {kohya_name(path) for path in weights.layers}
    assert comfyui_strengths(folder / KOHYA_FILE, names).keys() == names
    assert invokeai_modules(folder / KOHYA_FILE, sdxl) == weights.layers.keys()
    assert_same(read_kohya(folder / KOHYA_FILE, linear_targets(sdxl)), weights)
    assert_same(read_diffusers(folder / DIFFUSERS_FILE), weights)


def flattened(state: State, _: Facts) -> None:
    """As diffusers' own conversion writes it, which ComfyUI takes for scales of columns."""
    key = min(key for key in state if key.endswith(".dora_scale"))
    state[key] = state[key].flatten()


def longer(state: State, _: Facts) -> None:
    state[min(key for key in state if key.endswith(".dora_scale"))] *= 2


def without_a_magnitude(state: State, _: Facts) -> None:
    del state[min(key for key in state if key.endswith(".dora_scale"))]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (flattened, "scale the rows"),
        (longer, "other weights"),
        (without_a_magnitude, "no magnitudes"),
    ],
)
def test_a_spoilt_dora_does_not_pass(
    dora: tuple[Path, AdapterWeights],
    sdxl: UNet2DConditionModel,
    tmp_path: Path,
    spoil: Callable[[State, Facts], None],
    why: str,
) -> None:
    folder = tmp_path / "version"
    shutil.copytree(dora[0], folder)
    rewritten(folder / KOHYA_FILE, spoil)
    with pytest.raises(ToileError, match=why) as caught:
        check_lora(folder, sdxl)
    assert caught.value.metadata == {"file": KOHYA_FILE}


def test_invokeai_finds_the_module_of_every_key(
    exported: tuple[Path, AdapterWeights],
    sdxl: UNet2DConditionModel,
    text_encoders: dict[str, torch.nn.Module],
) -> None:
    folder, weights = exported
    found = invokeai_modules(folder / KOHYA_FILE, sdxl)
    assert found == {*weights.layers, *weights.text_layers}
    for key in load_file(folder / KOHYA_FILE):
        if not key.startswith("lora_unet_"):
            part = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}[key[:9]]
            path = module_path(text_encoders[part], key[9:].partition(".")[0])
            assert f"{part}.{path}" in weights.text_layers


# What the gate goes by. Each of these would load somewhere, wrong or in part.


def test_exported_files_pass_the_gate(
    exported: tuple[Path, AdapterWeights], sdxl: UNet2DConditionModel
) -> None:
    check_lora(exported[0], sdxl)


def respelt(state: State, _facts: Facts) -> None:
    """Stability's names, which InvokeAI does not take beside diffusers' and sd-scripts write."""
    stability = {theirs: its for its, theirs in linear_names("transformer")}
    for key in list(state):
        name, _, leaf = key.partition(".")
        state[f"{stability.get(name, name)}.{leaf}"] = state.pop(key)


def stronger(state: State, _: Facts) -> None:
    state[min(key for key in state if key.endswith(".alpha"))] *= 2


def rounded(state: State, _: Facts) -> None:
    for key in state:
        if "lora_" in key and key.endswith(".weight"):
            state[key] = state[key].float()


def without_an_alpha(state: State, _: Facts) -> None:
    del state[min(key for key in state if key.endswith(".alpha"))]


def moved_a_little(state: State, _: Facts) -> None:
    key = min(key for key in state if "lora_up" in key or "lora_B" in key)
    state[key].view(-1)[0] += 0.01


def without_a_layer(state: State, _: Facts) -> None:
    name = min(state).partition(".lora_")[0].removesuffix(".alpha")
    for key in [key for key in state if key.startswith(f"{name}.")]:
        del state[key]


def without_half_a_layer(state: State, _: Facts) -> None:
    del state[max(state)]


def without_its_prefix(state: State, _: Facts) -> None:
    for key in list(state):
        state[key.removeprefix("unet.")] = state.pop(key)


def of_another_architecture(_: State, facts: Facts) -> None:
    facts["modelspec.architecture"] = "flux-1-dev/lora"


def without_the_alphas(_: State, facts: Facts) -> None:
    del facts["lora_adapter_metadata"]


def without_its_network(_: State, facts: Facts) -> None:
    del facts["ss_network_module"]


def with_another_hash(_: State, facts: Facts) -> None:
    facts["modelspec.hash_sha256"] = "0x" + "0" * 64


@pytest.mark.parametrize(
    ("file", "spoil", "why"),
    [
        (KOHYA_FILE, respelt, "InvokeAI"),
        (KOHYA_FILE, stronger, "not the adapter of"),
        (KOHYA_FILE, rounded, "not the adapter of"),
        (KOHYA_FILE, without_an_alpha, "not the adapter of"),
        (KOHYA_FILE, moved_a_little, "not the adapter of"),
        (KOHYA_FILE, without_a_layer, "not the adapter of"),
        (KOHYA_FILE, without_half_a_layer, "lacks half"),
        (KOHYA_FILE, of_another_architecture, "does not say"),
        (KOHYA_FILE, without_its_network, "ss_network_module"),
        (KOHYA_FILE, with_another_hash, "hash"),
        (DIFFUSERS_FILE, without_half_a_layer, "lacks half"),
        (DIFFUSERS_FILE, without_its_prefix, "diffusers would not load"),
        (DIFFUSERS_FILE, of_another_architecture, "does not say"),
        (DIFFUSERS_FILE, with_another_hash, "hash"),
    ],
)
def test_a_spoilt_file_does_not_pass(
    exported: tuple[Path, AdapterWeights],
    sdxl: UNet2DConditionModel,
    tmp_path: Path,
    file: str,
    spoil: Callable[[State, Facts], None],
    why: str,
) -> None:
    folder = tmp_path / "version"
    shutil.copytree(exported[0], folder)
    rewritten(folder / file, spoil)
    with pytest.raises(ToileError, match=why) as caught:
        check_lora(folder, sdxl)
    assert caught.value.reason == "NOT_CONFORMANT"
    assert caught.value.metadata == {"file": file}


@pytest.mark.parametrize("spoil", [without_the_alphas, moved_a_little, without_a_layer])
def test_files_that_differ_do_not_pass(
    exported: tuple[Path, AdapterWeights],
    sdxl: UNet2DConditionModel,
    tmp_path: Path,
    spoil: Callable[[State, Facts], None],
) -> None:
    """Which of the two is wrong cannot be told from the files."""
    folder = tmp_path / "version"
    shutil.copytree(exported[0], folder)
    rewritten(folder / DIFFUSERS_FILE, spoil)
    with pytest.raises(ToileError, match=f"{KOHYA_FILE}.*{DIFFUSERS_FILE}") as caught:
        check_lora(folder, sdxl)
    assert caught.value.reason == "NOT_CONFORMANT"


def test_a_file_that_is_cut_off_does_not_pass(
    exported: tuple[Path, AdapterWeights], sdxl: UNet2DConditionModel, tmp_path: Path
) -> None:
    folder = tmp_path / "version"
    shutil.copytree(exported[0], folder)
    whole = (folder / KOHYA_FILE).read_bytes()
    (folder / KOHYA_FILE).write_bytes(whole[:-100])
    with pytest.raises(ToileError, match="not a safetensors file") as caught:
        check_lora(folder, sdxl)
    assert caught.value.metadata == {"file": KOHYA_FILE}


def rewritten(path: Path, spoil: Callable[[State, Facts], None]) -> None:
    """Spoil a file; its hash is that of what it then holds, unless that is what is spoilt."""
    with safe_open(path, "pt") as file:
        facts = dict(file.metadata())
    state = load_file(path)
    spoil(state, facts)
    save_file(state, path, metadata=facts)
    if not facts["modelspec.hash_sha256"].startswith("0x00"):
        facts["modelspec.hash_sha256"] = f"0x{content_hash(path)}"
        save_file(state, path, metadata=facts)


def test_both_names_of_sdxls_modules_are_read(sdxl: UNet2DConditionModel, targets: str) -> None:
    """sd-scripts' files have Stability's, which is what most SDXL LoRAs are."""
    names = kohya_names(linear_targets(sdxl))
    for stability, diffusers in linear_names(targets):
        assert names[stability] == names[diffusers]
        assert "lora_unet_" + names[stability].replace(".", "_") == diffusers


def test_a_file_of_stabilitys_names_is_the_same_adapter(
    exported: tuple[Path, AdapterWeights], sdxl: UNet2DConditionModel, targets: str, tmp_path: Path
) -> None:
    folder, weights = exported
    mine = load_file(folder / KOHYA_FILE)
    other = {diffusers: stability for stability, diffusers in linear_names(targets)}
    renamed = {
        f"{other.get(stem, stem)}.{leaf}": tensor
        for key, tensor in mine.items()
        for stem, _, leaf in [key.partition(".")]
    }
    save_file(renamed, tmp_path / KOHYA_FILE)
    assert_same(read_kohya(tmp_path / KOHYA_FILE, linear_targets(sdxl)), weights)
    key = next(key for key in mine if key.startswith("lora_unet_"))
    save_file({**renamed, key: mine[key].clone()}, tmp_path / KOHYA_FILE)
    with pytest.raises(InvalidArgumentError, match="twice"):
        read_kohya(tmp_path / KOHYA_FILE, linear_targets(sdxl))


# Round trips


def test_the_way_through_the_other_layout_changes_nothing(
    exported: tuple[Path, AdapterWeights], sdxl: UNet2DConditionModel, tmp_path: Path
) -> None:
    folder, weights = exported
    through_kohya = read_kohya(folder / KOHYA_FILE, linear_targets(sdxl))
    through_diffusers = read_diffusers(folder / DIFFUSERS_FILE)
    for name, again in (("kohya", through_kohya), ("diffusers", through_diffusers)):
        assert_same(again, weights)
        write_adapter(tmp_path / name, again, CARD)
        for file in (KOHYA_FILE, DIFFUSERS_FILE):
            # The header's own order is by chance: safetensors keeps it in a hash map.
            assert contents(tmp_path / name / file) == contents(folder / file)


def contents(path: Path) -> tuple[dict[str, str], dict[str, Any], bytes]:
    """Header, tensors' types, shapes and places, and the bytes of all tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    places = json.loads(data[8 : 8 + length])
    return places.pop("__metadata__"), places, data[8 + length :]


def assert_same(one: AdapterWeights, other: AdapterWeights) -> None:
    for mine, theirs in ((one.layers, other.layers), (one.text_layers, other.text_layers)):
        assert mine.keys() == theirs.keys()
        for path, layer in mine.items():
            assert layer.alpha == theirs[path].alpha
            assert layer.down.dtype == theirs[path].down.dtype
            assert torch.equal(layer.down, theirs[path].down)
            assert torch.equal(layer.up, theirs[path].up)


# Strength, by what comes out: diffusers' own loading against both of Toile's ways to draw.


@pytest.mark.parametrize(
    ("file", "alphas"),
    [
        (DIFFUSERS_FILE, [0.5, 3.0, 8.0, 1.0]),
        (DIFFUSERS_FILE, [5.0]),
        # One alpha, as a training gives: of several in a kohya file, diffusers 0.42 takes the
        # first for all layers and warns that the others match no module.
        (KOHYA_FILE, [5.0]),
    ],
)
def test_the_unet_predicts_in_diffusers_what_it_predicts_here(
    bundle: Bundle, targets: str, tmp_path: Path, file: str, alphas: list[float]
) -> None:
    adapter = mixed_adapter(bundle.unet, targets, alphas=alphas)
    write_adapter(tmp_path, adapter, dataclasses.replace(CARD, base_digest=bundle.digest))
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)
    inputs = model_inputs(pipeline.unet)
    # As strong as its rank, which is what a file without its alpha would be.
    wrong = AdapterWeights(
        {p: LoraLayer(y.down, y.up, float(y.rank)) for p, y in adapter.layers.items()}
    )
    mine = Bundle.load(bundle.path, digest=bundle.digest)  # adapters would stay in the shared one
    with torch.inference_mode():
        without = predict(pipeline.unet, inputs)
        pipeline.load_lora_weights(tmp_path, weight_name=file)
        theirs = predict(pipeline.unet, inputs)
        banked = through_the_bank(mine, adapter, inputs, targets)
        mistaken = through_the_bank(mine, wrong, inputs, targets)
        with TorchDenoiser(mine, bfloat16=False).session([LoadedAdapter("a", adapter)]) as unet:
            in_process = predict(unet, inputs)
    assert (theirs - in_process).abs().max() <= 1e-5
    assert (theirs - banked).abs().max() <= 1e-5
    assert (theirs - without).abs().max() > 1e-3
    assert (theirs - mistaken).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("file", "alphas"),
    [(DIFFUSERS_FILE, [0.5, 3.0, 8.0, 1.0]), (DIFFUSERS_FILE, [5.0]), (KOHYA_FILE, [5.0])],
)
def test_prompts_are_encoded_in_diffusers_as_they_are_here(
    bundle: Bundle, tmp_path: Path, file: str, alphas: list[float]
) -> None:
    unet_alone = mixed_adapter(bundle.unet, alphas=alphas)
    targets = text_targets(bundle.text_encoders)
    if file == KOHYA_FILE:
        # Of a kohya file, diffusers 0.42 overlooks that the projection has a rank of its own.
        del targets["text_encoder_2.text_projection"]
    text = mixed_layers(targets, alphas=alphas)
    adapter = AdapterWeights(unet_alone.layers, text_layers=text)
    write_adapter(tmp_path, adapter, dataclasses.replace(CARD, base_digest=bundle.digest))
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name=file)

    def encoded(*adapters: LoadedAdapter) -> list[torch.Tensor]:
        request = DiffusionRequest("a red dress", [1], negative_prompt="dull", adapters=adapters)
        found = encode_prompts(bundle, request)
        return [found.prompt, found.negative, found.pooled, found.negative_pooled]

    with torch.inference_mode():
        theirs = pipeline.encode_prompt("a red dress", negative_prompt="dull")
    key = f"{file}-{alphas}"  # the bundle is shared, and remembers
    ours, without = encoded(LoadedAdapter(key, adapter)), encoded()
    for one, other, plain in zip(theirs, ours, without, strict=True):
        assert (one - other).abs().max() <= 1e-5
        assert (one - plain).abs().max() > 1e-3


def model_inputs(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pooled = unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(1, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(
            1, 77, unet.config.cross_attention_dim, generator=generator
        ),
        "text_embeds": torch.randn(1, pooled, generator=generator),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
    }


def predict(unet: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {key: inputs[key] for key in ("text_embeds", "time_ids")}
    stock = {key: value for key, value in inputs.items() if key not in added}
    return unet(**stock, added_cond_kwargs=added).sample


def through_the_bank(
    bundle: Bundle, adapter: AdapterWeights, inputs: dict[str, torch.Tensor], targets: str
) -> torch.Tensor:
    """Predict as the engine does: the adapter is an input."""
    layout = bank_layout(bundle.unet, TARGETS[targets])
    arrays = gather([[(pack_adapter(adapter, layout), 1.0)]], layout)
    bank = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return BankedUNet(bundle.unet, layout)(**inputs, bank=bank)
