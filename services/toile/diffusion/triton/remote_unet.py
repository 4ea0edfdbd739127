"""A UNet without weights whose forward is a call: what the stock pipelines take for theirs."""

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

Call = Callable[[dict[str, "np.ndarray[Any, Any]"]], "np.ndarray[Any, Any]"]
"""From a UNet's inputs by name, fp32, to its prediction `[B, C, h, w]`."""


class RemoteUNet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """A UNet without weights; what pipelines ask of one is its config, its type and its forward."""

    _call: Call

    @property
    def dtype(self) -> torch.dtype:
        """What pipelines are to bring their inputs to; the call brings them to fp32."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where it would be, had it weights."""
        return torch.device("cpu")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Call; tensors may be on any device, and the prediction comes back to the sample's.

        Raises:
            TypeError: A pipeline gives what a call does not take.
        """
        if foreign := [name for name, value in unused.items() if value is not None]:
            raise TypeError(f"the remote UNet does not take {', '.join(foreign)}")
        batch = sample.shape[0]
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1).expand(batch, 1)
        arrays = {
            "sample": sample,
            "timestep": times,
            "encoder_hidden_states": encoder_hidden_states,
            "text_embeds": added_cond_kwargs["text_embeds"],
            "time_ids": added_cond_kwargs["time_ids"],
        }
        predicted = torch.tensor(  # a copy: the answer's memory is the call's, and read-only
            self._call(
                {
                    name: np.ascontiguousarray(tensor.to("cpu", torch.float32).numpy())
                    for name, tensor in arrays.items()
                }
            ),
            device=sample.device,
        )
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


def without_weights(config: dict[str, Any]) -> RemoteUNet:
    """Return a UNet of a config, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.__class__ = RemoteUNet
    return cast("RemoteUNet", unet)


def remote(unet: RemoteUNet, call: Call) -> UNet2DConditionModel:
    """Return a UNet of its own for a session: making one of SDXL's size takes a second."""
    own = copy.copy(unet)
    own._call = call
    return own
