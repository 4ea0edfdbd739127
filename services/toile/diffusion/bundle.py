"""A base model bundle in a local folder: what draws, its parts loaded when first used.

The folder has diffusers' SDXL layout, with `toile.json` beside it and, if it has a refiner,
`refiner`. What sees, the image tower and the segmenter, is in `vision`.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from toile.core.bases import read_description
from toile.core.errors import FailedPreconditionError
from toile.core.kept import Kept
from toile.core.prompts import check_prompt
from toile.diffusion.adapter_fit import check_base
from toile.diffusion.controls import CONTROLNET_FOLDER
from toile.diffusion.loading import MAKING
from toile.diffusion.previews import Previewer
from toile.diffusion.prompts import EncodedText, PromptEmbeddings, TextEncoder, encode_prompts
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.text_encoders import TextAdapter, adapted

__all__ = ["Bundle", "PromptEmbeddings", "shipped_bundle_path"]

CPU = torch.device("cpu")
PROMPT_CACHE_ENTRIES = 128
"""Encoded prompts kept, and texts by themselves; one of SDXL's has 0.6 MB for each chunk."""

T = TypeVar("T")


class Bundle:
    """A base: networks are loaded on first use, once, and are shared by everything that draws.

    Attributes:
        path: The folder.
        dtype: What the weights are loaded as.
        digest: Digest of the bundle's manifest; empty when it did not come from a store.
        device: Where the networks are.
        info: The folder's `toile.json`.
    """

    def __init__(
        self,
        path: Path,
        info: Mapping[str, Any],
        dtype: torch.dtype,
        digest: str,
        device: torch.device,
    ) -> None:
        self.path = path
        self.info = info
        self.dtype = dtype
        self.digest = digest
        self.device = device
        self._parts: Kept[str, Any] = Kept()
        self._prompts: OrderedDict[tuple[Any, ...], PromptEmbeddings] = OrderedDict()
        self._texts: Kept[tuple[Any, ...], EncodedText] = Kept(PROMPT_CACHE_ENTRIES)
        self._encoding = threading.Lock()  # text encoders are one thread's at a time

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: torch.dtype = torch.float32,
        *,
        digest: str = "",
        device: torch.device = CPU,
    ) -> Self:
        """Open a bundle folder; networks come later.

        Raises:
            InvalidArgumentError: The folder is not a bundle (`BAD_BASE`).
        """
        return cls(path, read_description(path), dtype, digest, device)

    def unload(self) -> None:
        """Let go of all networks; what is used again is loaded again."""
        self._parts = Kept()
        self._prompts.clear()

    def unload_unets(self) -> None:
        """Let go of the UNet and the refiner's alone."""
        self._parts.drop("unet", "refiner/unet")

    @property
    def native_size(self) -> int:
        """Side of the square images it was trained for, pixels."""
        return int(self.info["native_size"])

    @property
    def has_refiner(self) -> bool:
        """Whether it comes with a refiner."""
        return (self.path / "refiner" / "unet").is_dir()

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """Tokenizer of the first text encoder."""
        return self._part("tokenizer", lambda p: CLIPTokenizer.from_pretrained(p))

    @property
    def tokenizer_2(self) -> CLIPTokenizer:
        """Tokenizer of the second text encoder."""
        return self._part("tokenizer_2", lambda p: CLIPTokenizer.from_pretrained(p))

    @property
    def text_encoder(self) -> CLIPTextModel:
        """First text encoder."""
        return self._network("text_encoder", CLIPTextModel, dtype=self.dtype)

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        """Second text encoder, with the projection that the image tower was trained against."""
        return self._network("text_encoder_2", CLIPTextModelWithProjection, dtype=self.dtype)

    @property
    def text_encoders(self) -> Mapping[str, Any]:
        """Both text encoders, by name."""
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @property
    def vae(self) -> AutoencoderKL:
        """Autoencoder, always in fp32: it overflows in half precision."""
        return self._network("vae", AutoencoderKL, torch_dtype=torch.float32)

    @property
    def unet(self) -> UNet2DConditionModel:
        """Denoising network."""
        return self._network("unet", UNet2DConditionModel, torch_dtype=self.dtype)

    @property
    def unet_config(self) -> dict[str, Any]:
        """Configuration of the denoising network, whose weights are not read for it."""
        return self._json("unet/config.json")

    @property
    def refiner_config(self) -> dict[str, Any]:
        """Configuration of the refiner's denoising network."""
        return self._json("refiner/unet/config.json")

    @property
    def previewer(self) -> Previewer:
        """Shows latents; fitted to the VAE on first use."""
        return cast("Previewer", self._parts.get("previewer", lambda: Previewer.fit(self.vae)))

    @property
    def refiner_unet(self) -> UNet2DConditionModel:
        """Denoising network of the refiner.

        Raises:
            FailedPreconditionError: The base has none (`NO_REFINER`).
        """
        self._check_refiner()
        return self._network("refiner/unet", UNet2DConditionModel, torch_dtype=self.dtype)

    @property
    def control_kinds(self) -> Sequence[str]:
        """What the ControlNets that come with it are shown, such as "edges"."""
        folders = (self.path / CONTROLNET_FOLDER).glob("*/config.json")
        return sorted(path.parent.name for path in folders)

    def controlnet(self, kind: str) -> ControlNetModel:
        """ControlNet that comes with the base.

        Raises:
            FailedPreconditionError: There is none of this kind (`BASE_LACKS_PART`).
        """
        return self._network(f"{CONTROLNET_FOLDER}/{kind}", ControlNetModel, torch_dtype=self.dtype)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of the base's own scheduler, `_class_name` included."""
        return self._json("scheduler/scheduler_config.json")

    @property
    def zeros_for_empty_negative(self) -> bool:
        """Whether an empty negative prompt is embedded as zeros, as SDXL's base wants it."""
        return bool(self._json("model_index.json").get("force_zeros_for_empty_prompt", True))

    def count_tokens(self, text: str) -> int:
        """Return a text's tokens, without the two that frame a chunk."""
        return max(
            len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )

    def tokenizing_encoders(self) -> Sequence[TextEncoder]:
        """Return both text encoders with their tokenizers; a refiner has the second alone."""
        return [
            TextEncoder(self.tokenizer, self.text_encoder),
            TextEncoder(self.tokenizer_2, self.text_encoder_2),
        ]

    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        refiner: bool = False,
        adapters: Sequence[TextAdapter] = (),
    ) -> PromptEmbeddings:
        """Encode a prompt for the base or for its refiner; recent texts come from a cache.

        Each is there by itself, so that a negative prompt that many share is encoded once.

        Raises:
            InvalidArgumentError: A prompt has too many tokens (`PROMPT_TOO_LONG`), emphasis that
                means nothing (`BAD_EMPHASIS`), or an adapter is of another base
                (`ADAPTER_MISMATCH`).
            FailedPreconditionError: The base has no refiner (`NO_REFINER`).
        """
        if refiner:
            self._check_refiner()
        by = (refiner, *((a.key, a.weight) for a in adapters))
        key = (prompt, negative_prompt, *by)
        with self._encoding:
            found = self._prompts.get(key)
            if found is None:
                check_prompt(prompt, self.count_tokens, "prompt")
                check_prompt(negative_prompt, self.count_tokens, "negative_prompt")
                for adapter in adapters:
                    check_base(adapter.weights, self.digest)
                encoders = self.tokenizing_encoders()[1 if refiner else 0 :]
                zeros = self._refiner_zeros if refiner else self.zeros_for_empty_negative
                with adapted(self.text_encoders, adapters):
                    found = encode_prompts(
                        encoders,
                        prompt,
                        negative_prompt,
                        zeros_for_empty_negative=zeros,
                        keep=lambda text, encode: self._texts.get((*text, *by), encode),
                    )
                self._prompts[key] = found
                if len(self._prompts) > PROMPT_CACHE_ENTRIES:
                    self._prompts.popitem(last=False)
            else:
                self._prompts.move_to_end(key)
            return found

    def forget_prompts(self) -> None:
        """Encode prompts anew from now on, for the text encoders have changed."""
        with self._encoding:
            self._prompts.clear()
            self._texts = Kept(PROMPT_CACHE_ENTRIES)

    @property
    def refiner_wants_aesthetics(self) -> bool:
        """Whether the refiner is conditioned on an aesthetics score in place of a target size."""
        return bool(self._json("refiner/model_index.json").get("requires_aesthetics_score", True))

    def _check_refiner(self) -> None:
        if not self.has_refiner:
            raise FailedPreconditionError("this base has no refiner", reason="NO_REFINER")

    @property
    def _refiner_zeros(self) -> bool:
        index = self._json("refiner/model_index.json")
        return bool(index.get("force_zeros_for_empty_prompt", False))

    def _network(self, name: str, cls: Any, **options: Any) -> Any:
        def load(path: Path) -> Any:
            with MAKING:
                network = cls.from_pretrained(path, **options)
            return network.eval().requires_grad_(False).to(self.device)

        return self._part(name, load)

    def _json(self, name: str) -> dict[str, Any]:
        return self._part(
            name, lambda path: cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        )

    def _part(self, name: str, load: Callable[[Path], T]) -> T:
        def load_path() -> T:
            path = self.path / name
            if not path.exists():
                raise FailedPreconditionError(
                    f"this base has no {name}",
                    reason="BASE_LACKS_PART",
                    metadata={"part": name},
                )
            return load(path)

        return cast("T", self._parts.get(name, load_path))
