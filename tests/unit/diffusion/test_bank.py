"""LoRAs as inputs give what peft gives, for each sample of a mixed batch."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from toile.diffusion.adapters import AdapterWeights, LoraLayer
from toile.diffusion.bank import BankError, BankInputs, BankLayout, PackedAdapter, gather, pack
from toile.diffusion.banked_unet import (
    TRANSFORMER_TARGETS,
    BankedUNet,
    bank_layout,
)
from toile.diffusion.shipped import shipped_bundle_path

SDXL_IN_SMALL = {
    # stabilityai/stable-diffusion-xl-base-1.0's unet/config.json with its widths divided by ten
    # (attention heads of 32), all else as there.
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (1, 2, 4),
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 256,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 1536 + 128,
    "sample_size": 16,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}


@pytest.fixture(scope="module", params=["tiny", "sdxl"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if request.param == "tiny":
        made = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / "unet")
    else:
        made = UNet2DConditionModel(**SDXL_IN_SMALL)
    return made.float().eval().requires_grad_(False)


def random_lora(
    layout: BankLayout, rank: int, seed: int, *, alpha: float = 4.0, share: float = 1.0
) -> AdapterWeights:
    """A LoRA on a share of the targets, as strong as a trained one."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for group in layout.groups:
        for path in group.targets:
            if torch.rand((), generator=generator) <= share:
                layers[path] = LoraLayer(
                    torch.randn(rank, group.in_features, generator=generator) / rank,
                    torch.randn(group.out_features, rank, generator=generator) * 0.02,
                    alpha,
                )
    return AdapterWeights(layers)


def packed(weights: AdapterWeights, layout: BankLayout, dtype: type = np.float32) -> PackedAdapter:
    return pack(
        {
            path: (layer.down.numpy(), layer.up.numpy(), layer.alpha)
            for path, layer in weights.layers.items()
        },
        layout,
        dtype=dtype,
    )


def model_inputs(unet: UNet2DConditionModel, batch: int) -> dict[str, torch.Tensor]:
    config = unet.config
    ids = 6
    pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.randint(0, 1000, (batch,)).float(),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim),
        "text_embeds": torch.randn(batch, pooled),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(batch, 1),
    }


def with_peft(
    unet: UNet2DConditionModel, adapters: list[tuple[AdapterWeights, float]]
) -> UNet2DConditionModel:
    """A copy that has adapters `a0`, `a1`, … by diffusers with peft."""
    own = copy.deepcopy(unet)
    for index, (weights, _) in enumerate(adapters):
        own.load_lora_adapter(
            weights.peft_state(),
            prefix=None,
            adapter_name=f"a{index}",
            metadata=weights.peft_config(),
        )
    if adapters:
        own.set_adapters([f"a{i}" for i in range(len(adapters))], [w for _, w in adapters])
    return own


def predicted(own: UNet2DConditionModel, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """What a stock UNet predicts for one sample."""
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    with torch.inference_mode():
        return own(
            one["sample"],
            one["timestep"],
            one["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": one["text_embeds"], "time_ids": one["time_ids"]},
        ).sample[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_each_sample_of_a_mixed_batch_is_what_peft_gives(unet):
    layout = bank_layout(unet, TRANSFORMER_TARGETS)
    attention_only = bank_layout(unet)
    lace = random_lora(attention_only, 4, 1)
    rose = random_lora(attention_only, 16, 2, alpha=16.0)
    some = random_lora(layout, 3, 3, alpha=1.0, share=0.3)
    samples = [
        [],
        [(lace, 1.0)],
        [(rose, 0.7)],
        [(lace, -0.5), (rose, 1.2), (some, 1.0)],
    ]
    torch.manual_seed(5)
    inputs = model_inputs(unet, len(samples))
    arrays = gather(
        [[(packed(weights, layout), weight) for weights, weight in one] for one in samples], layout
    )
    bank = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        banked = BankedUNet(unet, layout)(**inputs, bank=bank)
    plain = predicted(unet, inputs, 1)
    assert (plain - banked[1]).abs().max() > 1e-2, "the adapters change nothing"
    for row, adapters in enumerate(samples):
        expected = predicted(with_peft(unet, adapters), inputs, row)
        assert (expected - banked[row]).abs().max() <= 1e-5, row


def test_wrapping_leaves_the_unet_as_it_was_and_shares_its_weights(unet):
    before = [path for path, _ in unet.named_modules()]
    banked = BankedUNet(unet, bank_layout(unet))
    assert [path for path, _ in unet.named_modules()] == before
    ours = {tensor.data_ptr() for tensor in banked.parameters()}
    assert ours == {tensor.data_ptr() for tensor in unet.parameters()}


LAYOUT = BankLayout.of({"b.to_q": (6, 4), "a.to_q": (6, 4), "a.to_k": (8, 4)})


def test_the_layout_does_not_depend_on_the_order_of_targets():
    assert BankLayout.of({"a.to_k": (8, 4), "a.to_q": (6, 4), "b.to_q": (6, 4)}) == LAYOUT
    assert BankLayout.from_json(LAYOUT.to_json()) == LAYOUT
    assert LAYOUT.input_names == ("down_6_4", "up_6_4", "down_8_4", "up_8_4")
    assert LAYOUT.bytes_per_rank() == 2 * (10 + 10 + 12)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_stacked_ranks_are_the_sum_of_the_updates(ranks, seed):
    rng = np.random.default_rng(seed)
    samples, updates = [], []
    for of_sample in ranks:
        total = {path: np.zeros((4, 6), np.float32) for path in ("a.to_q", "b.to_q")}
        adapters = []
        for rank in of_sample:
            down = rng.standard_normal((rank, 6)).astype(np.float32)
            up = rng.standard_normal((4, rank)).astype(np.float32)
            weight = float(rng.uniform(-2, 2))
            adapters.append((pack({"b.to_q": (down, up, 3.0)}, LAYOUT, dtype=np.float32), weight))
            total["b.to_q"] += weight * (3.0 / rank) * up @ down
        samples.append(adapters)
        updates.append(total)
    inputs = gather(samples, LAYOUT)
    for row, total in enumerate(updates):
        for index, path in enumerate(LAYOUT.groups[0].targets):
            made = inputs["up_6_4"][row, index] @ inputs["down_6_4"][row, index]
            np.testing.assert_allclose(made, total[path], atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    batches=st.lists(
        st.lists(
            st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, -0.5])), max_size=2),
            min_size=1,
            max_size=4,
        ),
        min_size=2,
        max_size=5,
    )
)
def test_what_a_batch_is_given_does_not_depend_on_those_before(batches):
    adapters = [packed(random_lora(LAYOUT, rank, rank), LAYOUT) for rank in (1, 2, 2, 5)]
    kept = BankInputs(LAYOUT)
    for batch in batches:
        samples = [[(adapters[index], weight) for index, weight in sample] for sample in batch]
        expected = gather(samples, LAYOUT)
        for name, array in kept.gather(samples).items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.flags.c_contiguous


def test_samples_that_stay_are_not_gathered_again():
    one, other = (packed(random_lora(LAYOUT, 3, seed), LAYOUT) for seed in (1, 2))
    kept = BankInputs(LAYOUT)
    before = kept.gather([[(one, 1.0)], [(one, 1.0)]])
    for array in before.values():
        array[0] = 7.0
    after = kept.gather([[(one, 1.0)], [(other, 1.0)]])
    expected = gather([[(other, 1.0)]], LAYOUT)
    for name in before:
        assert np.shares_memory(before[name], after[name])
        assert (after[name][0] == 7.0).all()
        np.testing.assert_array_equal(after[name][1], expected[name][0])


def test_a_packed_file_comes_back_as_it_was(tmp_path: Path):
    weights = random_lora(LAYOUT, 3, 7)
    adapter = packed(weights, LAYOUT, np.float16)
    adapter.save(tmp_path / "bank.safetensors", LAYOUT)
    back = PackedAdapter.load(tmp_path / "bank.safetensors", LAYOUT)
    assert back.rank == 3
    assert back.size_bytes == adapter.size_bytes == 3 * LAYOUT.bytes_per_rank()
    for name, array in adapter.arrays.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, back.arrays[name])


def test_what_the_bank_cannot_hold_is_refused(tmp_path: Path):
    down, up = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
    with pytest.raises(BankError, match="no target"):
        pack({"a.conv": (down, up, 2.0)}, LAYOUT)
    with pytest.raises(BankError, match="does not fit"):
        pack({"a.to_q": (down, up * 1e6, 2.0)}, LAYOUT)
    adapter = pack({"a.to_q": (down, up, 2.0)}, LAYOUT)
    with pytest.raises(BankError, match="add up to 6"):
        gather([[(adapter, 1.0)] * 3], LAYOUT, max_rank=4)
    adapter.save(tmp_path / "x", LAYOUT)
    with pytest.raises(BankError, match="other targets"):
        PackedAdapter.load(tmp_path / "x", BankLayout.of({"a": (1, 1)}))
    whole = (tmp_path / "x").read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:kept])
        with pytest.raises(BankError, match="not a packed adapter"):
            PackedAdapter.load(tmp_path / "x", LAYOUT)
    (tmp_path / "x").write_bytes(b"not a file")
    with pytest.raises(BankError, match="not a packed adapter"):
        PackedAdapter.load(tmp_path / "x", LAYOUT)
