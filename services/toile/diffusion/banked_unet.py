"""A UNet of SDXL's class whose LoRAs are inputs: what is exported and compiled once for all.

`BankedUNet` holds an ordinary `UNet2DConditionModel` whose targeted Linears and upsamplings were
replaced; the forward is diffusers' own. What goes in beside the stock inputs is in
`toile.diffusion.bank`. ControlNets may be part of it: their residuals, 54 MB a sample for SDXL at
1024 pixels in half precision, then stay where they are used.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D

from toile.diffusion.adapters import linear_targets
from toile.diffusion.bank import BankLayout

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the module paths that adapters of the field's trainers change."""
FEED_FORWARD_TARGETS = ("ff.net.0.proj", "ff.net.2")
"""Ends that some trainers add; a bank with them is two and a half times as large for SDXL."""
TRANSFORMER_TARGETS = (*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS, "proj_in", "proj_out")
"""Ends of every Linear of the UNet's transformers, which kohya's trainer changes unless it is told
otherwise (`UNET_TARGET_REPLACE_MODULE` of its `networks/lora.py`)."""
TARGETS = {"attention": ATTENTION_TARGETS, "transformer": TRANSFORMER_TARGETS}
"""By the names that the settings have for them."""

_DOWN, _MID = "down_block_additional_residuals", "mid_block_additional_residual"


def bank_layout(unet: UNet2DConditionModel, ends: Sequence[str] = ATTENTION_TARGETS) -> BankLayout:
    """Return the layout of a UNet whose Linears with these ends take adapters."""
    dotted = tuple("." + end for end in ends)
    return BankLayout.of(
        {path: shape for path, shape in linear_targets(unet).items() if path.endswith(dotted)}
    )


@dataclass(frozen=True, eq=False)
class Control:
    """What one ControlNet gets for a batch."""

    image: torch.Tensor
    """`[B, 3, H, W]`, 0 to 1, in the type of the UNet."""
    scale: torch.Tensor
    """`[B]`: how much of its residuals each sample takes; 0 for none."""


class BankedUNet(torch.nn.Module):
    """A UNet with adapter inputs.

    Attributes:
        layout: The groups of its bank inputs.
        controlnets: In the order in which `forward` takes their controls.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        layout: BankLayout,
        controlnets: Sequence[ControlNetModel] = (),
    ) -> None:
        """Wrap a UNet.

        Args:
            unet: Left as it is: modules are copied, weights are shared.
            layout: Which of its Linears take adapters.
            controlnets: Run with it; adapters do not change them.
        """
        super().__init__()
        self.layout = layout
        self.controlnets = torch.nn.ModuleList(controlnets)
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
        for path, module in list(self.unet.named_modules()):
            if isinstance(module, Upsample2D):
                owner, _, name = path.rpartition(".")
                self.unet.get_submodule(owner).register_module(name, _Upsample(module))

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
        controls: Sequence[Control] = (),
    ) -> torch.Tensor:
        """Predict, as the stock UNet does.

        Args:
            sample: Latents `[B, C, H/8, W/8]`.
            timestep: `[B]`; each sample may be at its own.
            encoder_hidden_states: `[B, tokens, D]`.
            text_embeds: Pooled, `[B, P]`.
            time_ids: `[B, 6]`, or 5 for a refiner.
            bank: By input name, down `[B, n, R, in]` and up `[B, n, out, R]`.
            controls: One for each of `controlnets`.

        Returns:
            `[B, C, H/8, W/8]`.
        """
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        residuals: dict[str, Any] = {}
        for net, control in zip(self.controlnets, controls, strict=True):
            down, mid = net(
                sample,
                timestep,
                encoder_hidden_states,
                controlnet_cond=control.image,
                conditioning_scale=control.scale.to(sample.dtype).view(-1, 1, 1, 1),
                added_cond_kwargs=conditions,
                return_dict=False,
            )
            if residuals:  # several add up, as in diffusers' MultiControlNetModel
                down = [a + b for a, b in zip(residuals[_DOWN], down, strict=True)]
                mid = residuals[_MID] + mid
            residuals = {_DOWN: down, _MID: mid}
        self._bank.tensors = bank
        try:
            out = self.unet(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=conditions,
                return_dict=False,
                **residuals,
            )
        finally:
            self._bank.tensors = {}
        result: torch.Tensor = out[0]
        return result


class _Bank:
    """Where the Linears find the tensors of the forward that is under way."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, torch.Tensor] = {}


class _Upsample(torch.nn.Module):
    """Diffusers' `Upsample2D` without its branches on how many values there are.

    In an export they are conditions on every size.
    """

    def __init__(self, stock: Upsample2D) -> None:
        super().__init__()
        if stock.norm is not None or stock.use_conv_transpose or not stock.use_conv:
            raise TypeError("an upsampling that is not of SDXL's kind")
        self.conv = stock.conv

    def forward(self, hidden: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, C, *size]`, or twice the size."""
        scale = 2.0 if size is None else None
        wider = torch.nn.functional.interpolate(hidden, size, scale, mode="nearest")
        convolved: torch.Tensor = self.conv(wider)
        return convolved


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
