"""The LoRA recipe: matrices of low rank beside Linears of a frozen UNet and its text encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import DIFFUSERS_FILE, load_lora, write_lora
from toile.diffusion.bank import BankError, PackedAdapter
from toile.diffusion.banked_denoiser import BankedDenoiser
from toile.diffusion.banked_unet import TARGETS, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.conformance import check_lora, not_conformant
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.triton.packed import empty_unet, pack_adapter, packed_name
from toile.training.batches import compute_dtype, hold_frozen
from toile.training.buckets import BucketedCache, frames
from toile.training.cache_plans import CLASS_IMAGES, EXAMPLES
from toile.training.caches import Cache, places_by_size
from toile.training.class_images import joined
from toile.training.config import MASKS, LoraRecipeConfig
from toile.training.dropout import ImageDropout
from toile.training.masks import with_masks
from toile.training.noise_prediction import NoisePrediction
from toile.training.recipe import Materials, Recipe, Served, reload_frozen
from toile.training.texts import TEXT_ENCODER, ReadingUNet, caption_tokens

ADAPTER = "default"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Lora(Recipe):
    """A LoRA that is trained in the bundle's own UNet, and in its text encoders if wanted."""

    def __init__(
        self, bundle: Bundle, config: LoraRecipeConfig, targets: str = "attention"
    ) -> None:
        """Make a new one; `targets` is what engines take adapters for, by the settings' name."""
        self._bundle = bundle
        self._config = config
        self._empty = empty_unet(bundle.path)
        self._layout = bank_layout(self._empty, TARGETS[targets])
        self.network: nn.Module = bundle.unet
        if config.train_text_encoders:
            zeros = bundle.zeros_for_empty_negative
            empty = caption_tokens(bundle, "").to(bundle.device) if zeros else None
            self.network = with_text_encoders(bundle.unet, bundle.text_encoders, config, empty)
        else:
            add_adapter(bundle.unet, config)

    def finish(self) -> None:
        """Bring the UNet back to fp32, which engines draw in."""
        reload_frozen(self._bundle.unet, self._bundle.path)

    def trained(self, index: int) -> Mapping[str, Any]:  # noqa: ARG002 - the same for all
        """Nothing: the adapter sits in the networks."""
        if self._config.train_text_encoders:
            self._bundle.forget_prompts()
        return {}

    def export(self, folder: Path, card: AdapterCard) -> None:
        """Write it in diffusers' layout and in kohya's."""
        state = adapter_state(self.network)
        write_lora(folder, state, self._config.rank, self._config.alpha, card)

    def check(self, folder: Path) -> None:
        """Refuse files that differ from one another, or that other programs would not take."""
        check_lora(folder, self._empty)

    def pack(self, folder: Path, bank: Path) -> None:
        """Pack it for the engine of its base, so that the first drawing with it need not."""
        if self._config.use_dora:
            return  # no engine takes it
        weights = load_lora(folder)
        packed = pack_adapter(weights, self._layout, base_digest=self._bundle.digest)
        packed.save(bank / packed_name(self._layout), self._layout)

    def served(self, folder: Path, bank: Path, bundle: Bundle, index: int) -> Served:  # noqa: ARG002
        """The packed file in the graph that engines are exported from; of a DoRA peft."""
        file = bank / packed_name(self._layout)
        adapter = LoadedAdapter(str(folder), load_lora(folder))
        if self._config.use_dora:
            plain = TorchDenoiser(bundle, autocast=torch.float32)
            return Served(plain, {"adapters": [adapter]}, DIFFUSERS_FILE)
        try:
            packed = {adapter.key: PackedAdapter.load(file, self._layout)}
        except BankError as error:
            raise not_conformant(file.name, str(error)) from error
        denoiser = BankedDenoiser(bundle, self._layout, packed)
        return Served(denoiser, {"adapters": [adapter]}, f"{file.name}, packed of {DIFFUSERS_FILE}")


def make(config: LoraRecipeConfig, materials: Materials) -> tuple[Lora, NoisePrediction]:
    """Make the recipe, and what it learns."""
    recipe = Lora(materials.bundle, config, materials.targets)
    return recipe, materials.noise_prediction(_cache(config, materials), config)


def _cache(config: LoraRecipeConfig, materials: Materials) -> Cache | BucketedCache:
    """Encoded examples, in buckets unless they are squares."""
    examples, encoded, parts = materials.examples, materials.caches[EXAMPLES], []
    places = places_by_size(examples)
    for size, indices in places.items():
        cache = Cache(
            means=encoded[f"means{size}"],
            deviations=encoded[f"deviations{size}"],
            captions=encoded["captions"][indices],
            embeds=encoded["embeds"],
            pooled=encoded["pooled"],
        )
        if config.masked_loss:
            cache = with_masks(cache, materials.caches[MASKS][f"shares{size}"], config)
        parts.append(cache)
    if examples[0].frame is not None:
        return BucketedCache(parts, list(places.values()), frames(examples))
    (cache,) = parts
    if config.class_prompt:
        drawn = Cache(**materials.caches[CLASS_IMAGES])
        return joined(cache, drawn, config.prior_loss_weight)
    return cache


def add_adapter(unet: UNet2DConditionModel, config: LoraRecipeConfig) -> None:
    """Freeze the UNet and add a LoRA that changes nothing yet; the same one for the same seed."""
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(TARGETS[config.target_modules]),
                use_dora=config.use_dora,
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )
    if config.dropout:
        _drop_by_image(unet, config)
    hold_frozen(unet, compute_dtype(config, unet.device))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def with_text_encoders(
    unet: UNet2DConditionModel,
    text_encoders: Mapping[str, Any],
    config: LoraRecipeConfig,
    zero_tokens: Tensor | None,
) -> ReadingUNet:
    """Add LoRAs to a UNet and its text encoders, which then are trained as one.

    The first encoder is read at its last layer but one, and the last one, which nothing would
    train, has none. See `ReadingUNet` for the arguments.
    """
    add_adapter(unet, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for name, encoder in text_encoders.items():
            encoder.requires_grad_(False)
            depth = encoder.config.num_hidden_layers
            read = range(depth - 1) if name == TEXT_ENCODER else range(depth)
            encoder.add_adapter(
                LoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha,
                    lora_dropout=config.dropout,
                    target_modules=list(TEXT_TARGETS),
                    layers_to_transform=list(read),
                    layers_pattern="layers",
                    init_lora_weights="gaussian",
                ),
                adapter_name=ADAPTER,
            )
            if config.gradient_checkpointing:
                encoder.activation_checkpointing_enable()
    network = ReadingUNet(unet, text_encoders, zero_tokens)
    if config.dropout:
        _drop_by_image(network, config)
    return network


def _drop_by_image(network: nn.Module, config: LoraRecipeConfig) -> None:
    """Put our own dropout in the place of torch's."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        dropout = ImageDropout(config.dropout, seed=config.seed, layer=number)
        layer.lora_dropout[ADAPTER] = dropout


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, those of text encoders after the encoder's."""
    if isinstance(network, ReadingUNet):
        encoders = ("text_encoder", "text_encoder_2")
        states = {f"{name}.": adapter_state(network.get_submodule(name)) for name in encoders}
        of_text = {part + name: t for part, state in states.items() for name, t in state.items()}
        return {**adapter_state(network.unet), **of_text}
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}
