"""What a step does about answers of Triton that it cannot trust."""

from typing import Any

import numpy as np
import pytest
import torch

from toile.core.errors import ComputeUnavailableError
from toile.diffusion.bank import BankLayout
from toile.diffusion.triton.client import UNREADABLE, TritonClient, TritonRefusedError
from toile.diffusion.triton.denoiser import TritonDenoiser

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
}
ARGUMENTS = {
    "sample": torch.zeros(2, 4, 8, 8),
    "timestep": torch.tensor(1.0),
    "encoder_hidden_states": torch.zeros(2, 77, 8),
    "added_cond_kwargs": {"text_embeds": torch.zeros(2, 8), "time_ids": torch.zeros(2, 6)},
}


class Triton:
    """Answers with one after another: an error, or what it adds to the number of the request."""

    def __init__(self, *answers: "int | str") -> None:
        self.answers = list(answers)
        self.told: list[tuple[str, str]] = []

    def infer(self, client: TritonClient, model: str, inputs: Any, **options: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise TritonRefusedError(answer, 500)
        number = np.full((2, 1), int(options["identity"]) + answer)
        return {"prediction": np.full((2, 4, 8, 8), answer, np.float32), "request": number}

    def load(self, client: TritonClient, model: str, **options: Any) -> None:
        self.told.append(("load", model))

    def unload(self, client: TritonClient, model: str, **options: Any) -> None:
        self.told.append(("unload", model))


def predicted(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    for name in ("infer", "load", "unload"):
        method = getattr(triton, name)
        monkeypatch.setattr(TritonClient, name, lambda *a, _method=method, **k: _method(*a, **k))
    denoiser = TritonDenoiser(
        "127.0.0.1:9",
        unet_config=CONFIG,
        layout=BankLayout(()),
        link=lambda _: "",
        unet_model="unet-of-a-base",
    )
    with denoiser.session([]) as unet:
        sample: torch.Tensor = unet(**ARGUMENTS).sample
    return sample


@pytest.mark.parametrize(
    "unsound",
    [
        1,  # the answer to another request
        "Stub process 'unet_0_0' is not healthy.",
        "failed to reserve 5764607523034234880 bytes in output tensor buffer",
        f"{UNREADABLE}: KeyError('outputs')",
    ],
)
def test_a_front_that_the_server_lost_its_hold_on_is_opened_anew(
    unsound: "int | str", monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = Triton(unsound, unsound, 0)
    assert not predicted(triton, monkeypatch).any()
    assert triton.told == [("unload", "unet-of-a-base"), ("load", "unet-of-a-base")] * 2
    assert not triton.answers


def test_a_model_that_another_replica_closed_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other may have been ended between the two calls."""
    triton = Triton("Request for unknown model: 'unet-of-a-base' has no available versions", 0)
    assert not predicted(triton, monkeypatch).any()
    assert triton.told == [("load", "unet-of-a-base")]


def test_another_error_ends_the_drawing_and_opens_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = Triton("the engine failed: ValueError: so it goes", 0)
    with pytest.raises(ComputeUnavailableError, match="so it goes"):
        predicted(triton, monkeypatch)
    assert triton.told == []
