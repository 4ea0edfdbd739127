"""A base's networks with named inputs and outputs: what is exported, compiled and verified.

Each takes one mapping of tensors and returns a tuple, so that exporting, running an engine and
comparing the two are written once. Which axes of an input stay open is `engines.open_axes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from toile.core.errors import InvalidArgumentError
from toile.diffusion.bank import BankLayout
from toile.diffusion.banked_unet import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    BankedUNet,
    Control,
    bank_layout,
)
from toile.diffusion.sdxl import PIXELS_PER_LATENT

PROMPT_TOKENS = 77
BASE_TIME_IDS = 6
"""SDXL's base takes original size, crop and target size."""
REFINER_TIME_IDS = 5
"""Its refiner original size, crop and an aesthetics score."""

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Of the weights and of what is computed, by the name that scripts take."""

MODEL_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
"""A UNet's inputs beside the bank's and the ControlNets'; all fp32 but `sample` and
`encoder_hidden_states`, which have the UNet's own type: TensorRT does not concatenate half with
float, as the time embedding would."""

UNET, UNET_CONTROL, REFINER = "unet", "unet_control", "refiner"
VAE, TEXT_ENCODER, TEXT_ENCODER_2 = "vae", "text_encoder", "text_encoder_2"
PARTS = (UNET, UNET_CONTROL, REFINER, VAE, TEXT_ENCODER, TEXT_ENCODER_2)


@dataclass(frozen=True)
class Sizes:
    """Sizes of random inputs."""

    batch: int = 2
    rank: int = 4
    """Sum of the ranks of a sample's adapters."""
    latent_size: int = 0
    """Side of the latents; the network's own when 0."""
    tokens: int = PROMPT_TOKENS


class NamedNetwork(torch.nn.Module, ABC):
    """A network that takes its inputs by name.

    Attributes:
        output_names: Of what `forward` returns, in order.
        layout: Of its bank inputs; None when it takes no adapters.
    """

    output_names: tuple[str, ...]
    layout: BankLayout | None = None

    @abstractmethod
    def example_inputs(self, sizes: Sizes | None = None) -> dict[str, torch.Tensor]:
        """Return random inputs by name, in the order of the exported graph's."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Evaluate."""

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluate without gradients, and return the outputs by name."""
        with torch.inference_mode():
            return dict(zip(self.output_names, self(inputs), strict=True))

    def _like(self) -> dict[str, Any]:
        weight = next(self.parameters())
        return {"dtype": weight.dtype, "device": weight.device}


class DenoisingNetwork(NamedNetwork):
    """A UNet with its bank and its ControlNets.

    Inputs: `MODEL_INPUTS`, the bank's, and for each ControlNet i `control_image_{i}`
    `[B, 3, 8h, 8w]` and, fp32, `control_scale_{i}` `[B]`.
    """

    output_names = ("prediction",)

    def __init__(self, banked: BankedUNet, time_ids: int = BASE_TIME_IDS) -> None:
        """Wrap a UNet whose time ids are 6, or 5 for a refiner."""
        super().__init__()
        self.banked, self.layout, self._time_ids = banked, banked.layout, time_ids

    def example_inputs(self, sizes: Sizes | None = None) -> dict[str, torch.Tensor]:
        """Return noise, and adapters that change the prediction visibly, a different one a sample.

        Of several samples the first has none, and the others' ranks rise to `sizes.rank`.
        """
        sizes = sizes or Sizes()
        config, like = self.banked.config, self._like()
        full: dict[str, Any] = {**like, "dtype": torch.float32}
        batch, side = sizes.batch, sizes.latent_size or int(config.sample_size)
        # The config has the width of both together only.
        pooled = (
            config.projection_class_embeddings_input_dim
            - self._time_ids * config.addition_time_embed_dim
        )
        inputs = {
            "sample": torch.randn(batch, config.in_channels, side, side, **like),
            "timestep": torch.rand(batch, **full) * 999,
            "encoder_hidden_states": torch.randn(
                batch, sizes.tokens, config.cross_attention_dim, **like
            ),
            "text_embeds": torch.randn(batch, pooled, **full),
            "time_ids": torch.full(
                (batch, self._time_ids), float(PIXELS_PER_LATENT * side), **full
            ),
        }
        for group in self.banked.layout.groups:
            count = len(group.targets)
            down = torch.randn(batch, count, sizes.rank, group.in_features, **like)
            up = torch.randn(batch, count, group.out_features, sizes.rank, **like)
            for row in range(batch - 1):
                up[row, ..., -(-sizes.rank * row // (batch - 1)) :] = 0
            inputs[f"down_{group.name}"] = down / group.in_features**0.5
            inputs[f"up_{group.name}"] = 0.1 * up / sizes.rank
        pixels = PIXELS_PER_LATENT * side
        for index in range(len(self.banked.controlnets)):
            inputs[f"control_image_{index}"] = torch.rand(batch, 3, pixels, pixels, **like)
            inputs[f"control_scale_{index}"] = torch.rand(batch, **full)
        return inputs

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Predict `[B, C, h, w]`."""
        controls = [
            Control(inputs[f"control_image_{index}"], inputs[f"control_scale_{index}"])
            for index in range(len(self.banked.controlnets))
        ]
        bank = {name: inputs[name] for name in self.banked.layout.input_names}
        model = {name: inputs[name] for name in MODEL_INPUTS}
        return (self.banked(**model, bank=bank, controls=controls),)


class DecodingNetwork(NamedNetwork):
    """The decoder of an autoencoder.

    `latents` `[B, C, h, w]`, with the scaling factor taken out as the pipelines do, to `image`
    `[B, 3, 8h, 8w]` of about -1 to 1.
    """

    output_names = ("image",)

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def example_inputs(self, sizes: Sizes | None = None) -> dict[str, torch.Tensor]:
        """Return noise as strong as latents are."""
        sizes = sizes or Sizes()
        config = self.vae.config
        side = sizes.latent_size or int(config.sample_size) // PIXELS_PER_LATENT
        noise = torch.randn(sizes.batch, config.latent_channels, side, side, **self._like())
        return {"latents": noise / config.scaling_factor}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Decode."""
        image: torch.Tensor = self.vae.decode(inputs["latents"], return_dict=False)[0]
        return (image,)


class TextNetwork(NamedNetwork):
    """A text encoder: `input_ids` `[B, 77]` int64 to what SDXL's pipelines take of it.

    `hidden_states` `[B, 77, D]` come from the layer before the last, without its final norm. An
    encoder with a projection gives `text_embeds` `[B, P]`, too; of one without, no pipeline takes
    the pooled output, so its last layer is not in the graph. (`clip_skip` needs torch.)
    """

    def __init__(self, encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.encoder = encoder
        self._projects = isinstance(encoder, CLIPTextModelWithProjection)
        self.output_names = ("hidden_states", "text_embeds")[: 1 + self._projects]

    def example_inputs(self, sizes: Sizes | None = None) -> dict[str, torch.Tensor]:
        """Return random words, framed and padded as a tokenizer does."""
        sizes = sizes or Sizes()
        config = self.encoder.config
        end = int(config.vocab_size) - 1 if config.eos_token_id == 2 else int(config.eos_token_id)
        length = int(config.max_position_embeddings)
        ids = torch.randint(0, end - 1, (sizes.batch, length), device=self._like()["device"])
        ids[:, 0] = end - 1
        for row in range(sizes.batch):
            ids[row, 2 + row % (length - 2) :] = end
        return {"input_ids": ids}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Encode."""
        encoded = self.encoder(inputs["input_ids"], output_hidden_states=True)
        hidden: torch.Tensor = encoded.hidden_states[-2]
        return (hidden, encoded.text_embeds) if self._projects else (hidden,)


def open_network(
    base: Path,
    part: str,
    *,
    dtype: torch.dtype = torch.float32,
    feed_forward: bool = False,
    controlnets: Sequence[Path] = (),
) -> NamedNetwork:
    """Load a part of a bundle.

    Args:
        base: The bundle's folder.
        part: One of `PARTS`.
        dtype: Of the weights. SDXL's own autoencoder overflows in float16.
        feed_forward: Whether feed-forward layers take adapters, too.
        controlnets: Folders, for `unet_control`; in the order of its inputs.

    Raises:
        InvalidArgumentError: There is no such part, or ControlNets do not go with it.
    """
    if part not in PARTS:
        raise InvalidArgumentError(
            f"there is no part {part!r}; there are {', '.join(PARTS)}", field="part"
        )
    if bool(controlnets) != (part == UNET_CONTROL):
        raise InvalidArgumentError(
            f"{UNET_CONTROL} has ControlNets, and nothing else has", field="controlnet"
        )
    if part in (TEXT_ENCODER, TEXT_ENCODER_2):
        kind = CLIPTextModelWithProjection if part == TEXT_ENCODER_2 else CLIPTextModel
        return _frozen(TextNetwork(kind.from_pretrained(base / part, dtype=dtype)))
    if part == VAE:
        vae = AutoencoderKL.from_pretrained(base / VAE, torch_dtype=dtype)
        return _frozen(DecodingNetwork(vae))
    folder = base / ("refiner/unet" if part == REFINER else "unet")
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
    ends = ATTENTION_TARGETS + (FEED_FORWARD_TARGETS if feed_forward else ())
    nets = [ControlNetModel.from_pretrained(path, torch_dtype=dtype) for path in controlnets]
    banked = BankedUNet(unet, bank_layout(unet, ends), nets)
    return _frozen(DenoisingNetwork(banked, REFINER_TIME_IDS if part == REFINER else BASE_TIME_IDS))


def _frozen(network: NamedNetwork) -> NamedNetwork:
    network.eval().requires_grad_(requires_grad=False)
    return network
