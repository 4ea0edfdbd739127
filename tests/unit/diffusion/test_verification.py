import math

import pytest
import torch

from toile.diffusion.networks import Sizes, open_network
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.verification import LEAST_PSNR_DB, Parity, check, time_calls


def test_parity_is_the_difference_against_the_range():
    expected = torch.tensor([0.0, 10.0])
    found = Parity.of(torch.tensor([0.0, 9.0]), expected)
    assert found.max_abs_difference == 1.0
    assert found.psnr_db == pytest.approx(10 * math.log10(100 / 0.5))
    assert Parity.of(expected.half(), expected) == Parity(0.0, math.inf)


@pytest.mark.parametrize("got", [torch.tensor([0.0, math.nan]), torch.tensor([[0.0, 10.0]])])
def test_what_is_not_finite_or_of_another_shape_is_infinitely_far(got: torch.Tensor):
    assert Parity.of(got, torch.tensor([0.0, 10.0])) == Parity(math.inf, -math.inf)


def test_calls_are_timed_after_two_that_do_not_count():
    calls: list[int] = []
    timing = time_calls(lambda: calls.append(0), runs=5, device=torch.device("cpu"))
    assert len(calls) == 7
    assert 0 <= timing.least <= timing.median <= timing.most


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_copy_in_lower_precision_passes_and_a_broken_one_does_not(noise: float):
    base = shipped_bundle_path()
    network = open_network(base, "text_encoder_2", dtype=torch.bfloat16)
    reference = open_network(base, "text_encoder_2")

    def evaluate(inputs):
        return {n: t + noise * torch.randn_like(t) for n, t in network.run(inputs).items()}

    found = check(evaluate, network, reference, Sizes(batch=2), runs=1)
    assert set(found.parity) == {"hidden_states", "text_embeds"}
    assert (found.least_psnr_db >= LEAST_PSNR_DB["bf16"]) == (noise == 0)
