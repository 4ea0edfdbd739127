"""Training the text encoders with the UNet: texts come as tokens, and are read in every step."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from toile.core.prompts import escape, parse_prompt
from toile.diffusion.bundle import Bundle

TEXT_ENCODER = "text_encoder"
"""Name of the first encoder, and what the names of both begin with in a `ReadingUNet`."""


def caption_tokens(bundle: Bundle, caption: str) -> Tensor:
    """A caption that fits into one chunk, as both encoders' tokens: `[2, 77]`."""
    sections = parse_prompt(escape(caption), "caption")
    return torch.tensor(
        [encoder.token_ids(encoder.chunks(sections)[0]) for encoder in bundle.tokenizing_encoders()]
    )


class ReadingUNet(nn.Module):
    """A UNet with the text encoders of its base, which are trained with it."""

    _zero_tokens: Tensor | None

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: Mapping[str, nn.Module],
        zero_tokens: Tensor | None,
    ) -> None:
        """Put them together.

        Args:
            unet: Whatever of it requires gradients is trained.
            text_encoders: Likewise; both, by name.
            zero_tokens: Tokens `[2, 77]` of a text that is embedded as zeros, as the pipelines of
                some bases embed the empty one.
        """
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = text_encoders.values()
        self.register_buffer("_zero_tokens", zero_tokens, persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor],
        return_dict: bool = False,
    ) -> Any:
        """Predict as the UNet does.

        Args:
            sample: Noised latents `[B, 4, h, w]`.
            timestep: `[B]`.
            encoder_hidden_states: Not embeddings but the tokens, `[B, 2, 77]`.
            added_cond_kwargs: `time_ids`, as the UNet takes them.
            return_dict: Whether to return it as the UNet does, not as a tuple.
        """
        embeds, pooled = self.read(encoder_hidden_states)
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=embeds,
            added_cond_kwargs={**added_cond_kwargs, "text_embeds": pooled},
            return_dict=return_dict,
        )

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text embeddings `[B, 77, C]`, pooled `[B, P]`, of tokens `[B, 2, 77]`.

        As the pipelines have them: the last layers but one of both, and the second's projection.
        """
        first = self.text_encoder(tokens[:, 0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[:, 1], output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled: Tensor = second[0]
        if self._zero_tokens is not None:
            read = tokens.ne(self._zero_tokens).flatten(1).any(dim=1)
            # Products, so that every parameter has a gradient, which ranks wait for.
            embeds = embeds * read[:, None, None]
            pooled = pooled * read[:, None]
        return embeds, pooled
