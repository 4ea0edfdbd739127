"""What does not change from step to step, computed once: latents and text embeddings."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toile.core.prompts import CHUNK_TOKENS, escape
from toile.diffusion.bundle import Bundle
from toile.training.data import Example, load_example
from toile.training.texts import caption_tokens

_ENCODE_BATCH = 8

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cache:
    """Encoded examples.

    Attributes:
        means: Means of the latents, scaled as the UNet wants them, `[N, 4, h, w]`.
        deviations: Their standard deviations, `[N, 4, h, w]`.
        captions: Which text embedding is the example's, `[N]`.
        embeds: Text embeddings, one a caption, the empty caption's first, `[T, 77, C]`; where the
            text encoders are trained, tokens for both, `[T, 2, 77]`.
        pooled: Pooled text embeddings, `[T, P]`; beside tokens `[T, 0]`.
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


def encoded(bundle: Bundle, examples: Sequence[Example]) -> Cache:
    """Encode examples and keep them nowhere."""
    every = range(len(examples))
    return Cache(**encode(bundle, examples, every, lambda *_: None))


@torch.inference_mode()
def encode(
    bundle: Bundle,
    examples: Sequence[Example],
    places: range,
    on_progress: OnProgress,
    *,
    as_tokens: bool = False,
) -> dict[str, Tensor]:
    """Encode some of the examples: tensors of a `Cache` that `joined_shards` puts together.

    A caption is encoded with the first of the examples that has it. Equal shards are equal bit for
    bit wherever a processor computes them: in batches of the same images, on one thread.
    """
    latents: dict[str, list[Tensor]] = {}
    done = 0
    scale, shift = bundle.vae.config.scaling_factor, bundle.vae.config.shift_factor or 0.0
    with on_one_thread():
        captions = [example.caption for example in examples]
        tensors = _encode_captions(bundle, captions, places, as_tokens=as_tokens)
        for size, group in by_size(examples[places.start : places.stop]).items():
            for start in range(0, len(group), _ENCODE_BATCH):
                batch = group[start : start + _ENCODE_BATCH]
                pixels = torch.stack([load_example(one, bundle.native_size) for one in batch])
                found = bundle.vae.encode(pixels.to(bundle.vae.device)).latent_dist
                means, deviations = (found.mean - shift).float().cpu(), found.std.float().cpu()
                latents.setdefault(f"means{size}", []).append(means * scale)
                latents.setdefault(f"deviations{size}", []).append(deviations * scale)
                done += len(batch)
                on_progress(done, len(places))
    return {name: torch.cat(parts) for name, parts in latents.items()} | tensors


def places_by_size(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Group examples by buckets, under what is put behind the names of their tensors.

    That is nothing for squares, which are in none.
    """
    sized: dict[tuple[int, int], list[int]] = {}
    for place, example in enumerate(examples):
        sized.setdefault(example.frame.size if example.frame else (0, 0), []).append(place)
    return {
        f".{size[0]}x{size[1]}" if size[0] else "": places for size, places in sorted(sized.items())
    }


def by_size(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The same, with the examples themselves."""
    return {
        size: [examples[place] for place in places]
        for size, places in places_by_size(examples).items()
    }


def joined_shards(shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put tensors of all examples together; one that a shard has nothing for is not in it."""
    names = dict.fromkeys(name for shard in shards for name in shard)
    return {name: torch.cat([shard[name] for shard in shards if name in shard]) for name in names}


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute alike on machines of any number of cores: sums of parts depend on the parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encode_captions(
    bundle: Bundle, captions: Sequence[str], places: range, *, as_tokens: bool
) -> dict[str, Tensor]:
    """Which texts some examples have, and those that no example before them has.

    The first text of all is the empty caption.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions), start=1)}
    known = set(captions[: places.start])
    wanted: list[str | None] = [] if known else [None]
    wanted += [c for c in dict.fromkeys(captions[places.start : places.stop]) if c not in known]
    texts = [_encode_caption(bundle, caption, as_tokens=as_tokens) for caption in wanted]
    own = [numbers[caption] for caption in captions[places.start : places.stop]]
    tensors = {"captions": torch.tensor(own)}
    if texts:
        tensors["embeds"] = torch.cat([embeds for embeds, _ in texts])
        tensors["pooled"] = torch.cat([pooled for _, pooled in texts])
    return tensors


def _encode_caption(
    bundle: Bundle, caption: str | None, *, as_tokens: bool
) -> tuple[Tensor, Tensor]:
    """A caption as a `Cache` has it, pooled too; the empty one if it is None."""
    fitted = fit_caption(bundle, caption or "")
    if as_tokens:
        return caption_tokens(bundle, fitted)[None], torch.empty(1, 0)
    found = bundle.encode_prompt(escape(fitted))
    if caption is None:
        # What guidance will push away from: the empty prompt just as the pipelines embed it.
        return found.negative.float().cpu(), found.negative_pooled.float().cpu()
    return found.prompt.float().cpu(), found.pooled.float().cpu()


def fit_caption(bundle: Bundle, caption: str) -> str:
    """The caption without the last words that do not fit into one chunk."""
    words = caption.split()
    while words and bundle.count_tokens(" ".join(words)) > CHUNK_TOKENS:
        words.pop()
    return " ".join(words)
