"""ControlNets in the graph give what diffusers' own give beside it, for each sample of a batch."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from tests.unit.diffusion.test_bank import (
    SDXL_IN_SMALL,
    model_inputs,
    packed,
    predicted,
    random_lora,
    with_peft,
)

from toile.diffusion.adapters import AdapterWeights
from toile.diffusion.bank import gather
from toile.diffusion.banked_unet import BankedUNet, Control, bank_layout
from toile.diffusion.shipped import shipped_bundle_path

SCALES = ((1.0, 0.5), (0.0, 1.0), (0.7, 0.0), (0.0, 0.0))
"""Of two ControlNets, by sample."""


def random_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet as strong as a trained one; a new one gives zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the layers that look at the map
        net = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(seed)
    zeros = (
        *net.controlnet_down_blocks,
        net.controlnet_mid_block,
        net.controlnet_cond_embedding.conv_out,
    )
    for layer in zeros:
        torch.nn.init.normal_(layer.weight, std=0.05, generator=generator)
    return net.float().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["tiny", "sdxl"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if request.param == "tiny":
        made = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / "unet")
    else:
        made = UNet2DConditionModel(**SDXL_IN_SMALL)
    return made.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets(unet: UNet2DConditionModel) -> list[ControlNetModel]:
    return [random_controlnet(unet, seed) for seed in (1, 2)]


def by_diffusers(
    unet: UNet2DConditionModel,
    nets: list[ControlNetModel],
    inputs: dict[str, torch.Tensor],
    row: int,
    images: list[torch.Tensor],
    adapters: list[tuple[AdapterWeights, float]],
) -> torch.Tensor:
    """What stock ControlNets and a UNet with peft predict for one sample."""
    own = with_peft(unet, adapters)
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    stock = {
        "sample": one["sample"],
        "timestep": one["timestep"],
        "encoder_hidden_states": one["encoder_hidden_states"],
        "added_cond_kwargs": {"text_embeds": one["text_embeds"], "time_ids": one["time_ids"]},
        "return_dict": False,
    }
    with torch.inference_mode():
        down, mid = MultiControlNetModel(nets)(
            controlnet_cond=[image[row : row + 1] for image in images],
            conditioning_scale=list(SCALES[row]),
            **stock,
        )
        return own(
            down_block_additional_residuals=down, mid_block_additional_residual=mid, **stock
        )[0][0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_each_sample_has_its_own_controls_and_adapters(unet, nets):
    layout = bank_layout(unet)
    lace, rose = random_lora(layout, 4, 1), random_lora(layout, 8, 2)
    samples = [[], [(lace, 1.0)], [(lace, 0.5), (rose, -1.0)], [(rose, 1.0)]]
    torch.manual_seed(5)
    inputs = model_inputs(unet, len(samples))
    images = [torch.rand(len(samples), 3, 128, 128) for _ in nets]
    arrays = gather([[(packed(w, layout), weight) for w, weight in one] for one in samples], layout)
    bank = {name: torch.from_numpy(array) for name, array in arrays.items()}
    controls = [
        Control(image, torch.tensor([scales[index] for scales in SCALES]))
        for index, image in enumerate(images)
    ]
    with torch.inference_mode():
        banked = BankedUNet(unet, layout, nets)(**inputs, bank=bank, controls=controls)
        free = BankedUNet(unet, layout)(**inputs, bank=bank)
    for row, adapters in enumerate(samples):
        expected = by_diffusers(unet, nets, inputs, row, images, adapters)
        assert (expected - banked[row]).abs().max() <= 1e-5, row
    changed = (banked - free).abs().amax(dim=(1, 2, 3))
    assert changed[:3].min() > 1e-2, "a ControlNet changes nothing"
    assert changed[3] <= 1e-5, "scales of 0 are no ControlNet"


def test_a_control_for_each_controlnet_is_needed(unet, nets):
    layout = bank_layout(unet)
    inputs = model_inputs(unet, 1)
    bank = {n: torch.from_numpy(a) for n, a in gather([[]], layout).items()}
    with pytest.raises(ValueError, match="zip"):
        BankedUNet(unet, layout, nets)(**inputs, bank=bank)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_weight_may_change_from_step_to_step(unet):
    """A schedule of weights is a bank for each call; nothing of a call stays for the next."""
    layout = bank_layout(unet)
    lace, rose = random_lora(layout, 4, 1), random_lora(layout, 8, 2)
    files = packed(lace, layout), packed(rose, layout)
    torch.manual_seed(5)
    inputs = model_inputs(unet, 2)
    banked, stock = BankedUNet(unet, layout), with_peft(unet, [(lace, 1.0), (rose, 1.0)])
    for first, second in ((1.0, 0.0), (0.25, 0.75), (0.0, 1.0), (0.0, 0.0)):
        arrays = gather([[(files[0], first), (files[1], second)], [(files[1], second)]], layout)
        with torch.inference_mode():
            got = banked(**inputs, bank={n: torch.from_numpy(a) for n, a in arrays.items()})
        stock.set_adapters(["a0", "a1"], [first, second])
        assert (predicted(stock, inputs, 0) - got[0]).abs().max() <= 1e-5, (first, second)
        stock.set_adapters(["a1"], [second])
        assert (predicted(stock, inputs, 1) - got[1]).abs().max() <= 1e-5
