"""A UNet of SDXL's class whose LoRAs are inputs: what is exported and compiled once for all.

`BankedUNet` holds an ordinary `UNet2DConditionModel` whose targeted Linears were replaced; the
forward is diffusers' own. What goes in beside the stock inputs is in `toile.diffusion.bank`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from toile.diffusion.adapters import linear_targets
from toile.diffusion.bank import BankLayout

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the module paths that adapters of the field's trainers change."""
FEED_FORWARD_TARGETS = ("ff.net.0.proj", "ff.net.2")
"""Ends that some trainers add; a bank with them is two and a half times as large for SDXL."""


def bank_layout(unet: UNet2DConditionModel, ends: Sequence[str] = ATTENTION_TARGETS) -> BankLayout:
    """Return the layout of a UNet whose Linears with these ends take adapters."""
    dotted = tuple("." + end for end in ends)
    return BankLayout.of(
        {path: shape for path, shape in linear_targets(unet).items() if path.endswith(dotted)}
    )


class BankedUNet(torch.nn.Module):
    """A UNet with adapter inputs.

    Attributes:
        layout: The groups of its bank inputs.
    """

    def __init__(self, unet: UNet2DConditionModel, layout: BankLayout) -> None:
        """Wrap a UNet.

        Args:
            unet: Left as it is: modules are copied, weights are shared.
            layout: Which of its Linears take adapters.
        """
        super().__init__()
        self.layout = layout
        # Sharing through the memo keeps one copy of the weights, 5 GB of them for SDXL.
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self.unet = copy.deepcopy(unet, shared)
        self._bank = _Bank()
        for group in layout.groups:
            for index, path in enumerate(group.targets):
                owner, _, name = path.rpartition(".")
                parent = self.unet.get_submodule(owner)
                linear = parent.get_submodule(name)
                if not isinstance(linear, torch.nn.Linear):
                    raise TypeError(f"{path} is no Linear")
                parent.register_module(name, _BankedLinear(linear, self._bank, group.name, index))

    @property
    def config(self) -> Any:
        """Configuration of the UNet."""
        return self.unet.config

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        bank: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Predict, as the stock UNet does.

        Args:
            sample: Latents `[B, C, H/8, W/8]`.
            timestep: `[B]`; each sample may be at its own.
            encoder_hidden_states: `[B, tokens, D]`.
            text_embeds: Pooled, `[B, P]`.
            time_ids: `[B, 6]`, or 5 for a refiner.
            bank: By input name, down `[B, n, R, in]` and up `[B, n, out, R]`.

        Returns:
            `[B, C, H/8, W/8]`.
        """
        self._bank.tensors = bank
        try:
            out = self.unet(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
                return_dict=False,
            )
        finally:
            self._bank.tensors = {}
        result: torch.Tensor = out[0]
        return result


class _Bank:
    """Where the Linears find the tensors of the forward that is under way."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, torch.Tensor] = {}


class _BankedLinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, bank: _Bank, group: str, index: int) -> None:
        super().__init__()
        self.linear = linear
        self._bank = bank
        self._down, self._up, self._index = f"down_{group}", f"up_{group}", index

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[B, tokens, in]` to `[B, tokens, out]`."""
        down = self._bank.tensors[self._down][:, self._index]
        up = self._bank.tensors[self._up][:, self._index]
        inner = torch.bmm(hidden, down.transpose(1, 2))
        changed: torch.Tensor = self.linear(hidden) + torch.bmm(inner, up.transpose(1, 2))
        return changed
