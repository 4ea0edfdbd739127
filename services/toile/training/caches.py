"""What does not change from step to step, computed once: latents and text embeddings."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toile.core.prompts import CHUNK_TOKENS, escape
from toile.diffusion.bundle import Bundle
from toile.training.data import Example, load_image

_ENCODE_BATCH = 8
_VERSION = "1"  # of what is cached; a change makes old caches be computed again

_log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cache:
    """Encoded examples.

    Attributes:
        means: Means of the latents, scaled as the UNet wants them, `[N, 4, h, w]`.
        deviations: Their standard deviations, `[N, 4, h, w]`.
        captions: Which text embedding is the example's, `[N]`.
        embeds: Text embeddings, one a caption, the empty caption's first, `[T, 77, C]`.
        pooled: Pooled text embeddings, `[T, P]`.
    """

    means: Tensor
    deviations: Tensor
    captions: Tensor
    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.means)


@dataclass(frozen=True)
class WeightedCache(Cache):
    """Encoded examples, and what their loss weighs.

    Attributes:
        weights: Of each place, `[N, 1, h, w]`, or of each image, `[N, 1, 1, 1]`.
    """

    weights: Tensor


def build_cache(
    bundle: Bundle,
    examples: Sequence[Example],
    folder: Path,
    *,
    dataset_digest: str,
    on_progress: OnProgress,
) -> Cache:
    """Encode the examples, or take from `folder` what an earlier run of the same left there."""
    return encoded(bundle, lambda: examples, folder, digest=dataset_digest, on_progress=on_progress)


def encoded(
    bundle: Bundle,
    load: Callable[[], Sequence[Example]],
    folder: Path,
    *,
    digest: str,
    on_progress: OnProgress,
) -> Cache:
    """The same, of examples that are loaded only if they have to be encoded."""
    facts = (_VERSION, digest, bundle.digest, str(bundle.native_size))
    found = remembered(
        folder, "encoded", facts, lambda: dict(vars(_encode(bundle, load(), on_progress)))
    )
    return Cache(**found)


def remembered(
    folder: Path, name: str, facts: Sequence[str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Compute tensors, or take from `folder` those that follow from the same facts.

    Where a fact is empty they are computed every time: only published data has a digest.
    """
    if not all(facts):
        return compute()
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    file = folder / f"{name}-{key[:24]}.safetensors"
    if file.is_file():
        try:
            found: dict[str, Tensor] = load_file(file)
            return found
        except (SafetensorError, OSError):
            file.unlink(missing_ok=True)  # damaged
    tensors = compute()
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, part)
        part.replace(file)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        _log.warning("%s is not kept for the next time: %s", file.name, error)
    return tensors


@torch.inference_mode()
def _encode(bundle: Bundle, examples: Sequence[Example], on_progress: OnProgress) -> Cache:
    texts, captions = _encode_captions(bundle, [example.caption for example in examples])
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    scale, shift = bundle.vae.config.scaling_factor, bundle.vae.config.shift_factor or 0.0
    for start in range(0, len(examples), _ENCODE_BATCH):
        batch = examples[start : start + _ENCODE_BATCH]
        pixels = torch.stack([load_image(one.path, bundle.native_size) for one in batch])
        latents = bundle.vae.encode(pixels.to(bundle.vae.device)).latent_dist
        means.append((latents.mean - shift).float().cpu() * scale)
        deviations.append(latents.std.float().cpu() * scale)
        on_progress(start + len(batch), len(examples))
    return Cache(
        means=torch.cat(means),
        deviations=torch.cat(deviations),
        captions=torch.tensor(captions),
        embeds=torch.cat([embeds for embeds, _ in texts]),
        pooled=torch.cat([pooled for _, pooled in texts]),
    )


def _encode_captions(
    bundle: Bundle, captions: Sequence[str]
) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Embeddings of the distinct captions, the empty one's first, and each caption's place."""
    places: dict[str, int] = {}
    texts: list[tuple[Tensor, Tensor]] = []
    for caption in captions:
        if caption in places:
            continue
        encoded = bundle.encode_prompt(escape(fit_caption(bundle, caption)))
        if not texts:
            # What guidance will push away from: the empty prompt just as the pipelines embed it.
            texts.append((encoded.negative.float().cpu(), encoded.negative_pooled.float().cpu()))
        places[caption] = len(texts)
        texts.append((encoded.prompt.float().cpu(), encoded.pooled.float().cpu()))
    return texts, [places[caption] for caption in captions]


def fit_caption(bundle: Bundle, caption: str) -> str:
    """The caption without the last words that do not fit into one chunk."""
    words = caption.split()
    while words and bundle.count_tokens(" ".join(words)) > CHUNK_TOKENS:
        words.pop()
    return " ".join(words)
