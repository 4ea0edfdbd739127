"""Prompts of any length, with emphasis, encoded for SDXL's UNets.

A prompt is cut into chunks of 75 tokens, each is encoded by itself, and the results stand in a
row along the tokens, as AUTOMATIC1111's web UI does it; the pooled embedding is the first
chunk's, as there and in diffusers' community pipeline `lpw_stable_diffusion_xl`. A prompt of one
chunk without emphasis is encoded as the stock pipelines' `encode_prompt` does, to the bit.

A token's weight multiplies its embedding. This is the web UI's emphasis mode "No norm", which it
recommends for SDXL (`modules/sd_emphasis.py`). Its older mode then scales the whole chunk until
its mean is back; the penultimate layers' mean is nearly zero, so that this factor is at the mercy
of rounding: a weight of 2 on two words made it up to 5.1 with the tiny base's encoders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import CLIPTokenizer

from toile.core.prompts import CHUNK_TOKENS, Span, parse_prompt

EncodedText: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""One text's embeddings `[1, 77 n, C]` and, pooled, `[1, P]`."""
Keep: TypeAlias = Callable[[tuple[str, int], Callable[[], EncodedText]], EncodedText]
"""Returns what was kept of a text and a number of chunks, or what encodes it now."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """A prompt and its negative, encoded: `[1, 77 n, C]` for n chunks and, pooled, `[1, P]`."""

    prompt: torch.Tensor
    negative: torch.Tensor
    pooled: torch.Tensor
    negative_pooled: torch.Tensor

    def arguments(self, images: int) -> dict[str, torch.Tensor]:
        """Return them as the arguments of diffusers' pipelines, for a batch of images."""
        return {
            "prompt_embeds": self.prompt.expand(images, -1, -1),
            "negative_prompt_embeds": self.negative.expand(images, -1, -1),
            "pooled_prompt_embeds": self.pooled.expand(images, -1),
            "negative_pooled_prompt_embeds": self.negative_pooled.expand(images, -1),
        }


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer; the last of a base has a pooled output."""

    tokenizer: CLIPTokenizer
    network: Any

    def chunks(self, sections: Sequence[Sequence[Span]]) -> list["_Chunk"]:
        """Cut a parsed prompt; each section begins a chunk of its own."""
        chunks: list[_Chunk] = []
        for spans in sections:
            tokens = [
                (token, span.weight)
                for span in spans
                for token in self.tokenizer(
                    span.text, add_special_tokens=False, verbose=False
                ).input_ids
            ]
            starts = range(0, len(tokens) or 1, CHUNK_TOKENS)
            chunks += [tokens[start : start + CHUNK_TOKENS] for start in starts]
        return chunks

    def token_ids(self, chunk: "_Chunk") -> list[int]:
        """Return a chunk's tokens, framed and padded: 77 of them."""
        tokenizer, room = self.tokenizer, CHUNK_TOKENS - len(chunk)
        ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        return ids + room * [tokenizer.pad_token_id]

    def encode(self, chunk: "_Chunk") -> tuple[torch.Tensor, torch.Tensor]:
        """Return a chunk's penultimate layer, weighted, `[1, 77, C]` and its first output."""
        room = CHUNK_TOKENS - len(chunk)
        ids = torch.tensor([self.token_ids(chunk)], device=self.network.device)
        found = self.network(ids, output_hidden_states=True)
        layer = found.hidden_states[-2]
        if any(weight != 1 for _, weight in chunk):
            weights = [1.0, *(weight for _, weight in chunk), *((room + 1) * [1.0])]
            layer = layer * layer.new_tensor(weights)[None, :, None]
        return layer, found[0]


_Chunk = list[tuple[int, float]]
"""Tokens with their weights, at most 75."""


@torch.inference_mode()
def encode_prompts(
    encoders: Sequence[TextEncoder],
    prompt: str,
    negative_prompt: str,
    *,
    zeros_for_empty_negative: bool,
    keep: Keep = lambda _, encode: encode(),
) -> PromptEmbeddings:
    """Encode a prompt and its negative to the same number of chunks, the shorter with empty ones.

    `keep` is asked for each of them by its text and its number of chunks.

    Raises:
        InvalidArgumentError: Emphasis means nothing (`BAD_EMPHASIS`).
    """
    positive = _cut(encoders, prompt, "prompt")
    negative = _cut(encoders, negative_prompt, "negative_prompt")
    length = max(len(chunks) for chunks in (*positive, *negative))
    embedded, pooled = keep((prompt, length), lambda: _encode(encoders, positive, length))
    if not negative_prompt and zeros_for_empty_negative:
        return PromptEmbeddings(
            embedded, torch.zeros_like(embedded), pooled, torch.zeros_like(pooled)
        )
    negative_embedded, negative_pooled = keep(
        (negative_prompt, length), lambda: _encode(encoders, negative, length)
    )
    return PromptEmbeddings(embedded, negative_embedded, pooled, negative_pooled)


def _cut(encoders: Sequence[TextEncoder], prompt: str, field: str) -> list[list[_Chunk]]:
    sections = parse_prompt(prompt, field)
    return [encoder.chunks(sections) for encoder in encoders]


def _encode(
    encoders: Sequence[TextEncoder], cut: Sequence[Sequence[_Chunk]], length: int
) -> EncodedText:
    columns: list[torch.Tensor] = []
    pooled = torch.empty(0)
    for encoder, chunks in zip(encoders, cut, strict=True):
        padded = [*chunks, *([[]] * (length - len(chunks)))]
        encoded = [encoder.encode(chunk) for chunk in padded]
        columns.append(torch.cat([layer for layer, _ in encoded], dim=1))
        pooled = encoded[0][1]
    network = encoders[-1].network
    embedded = torch.cat(columns, dim=-1)
    return embedded.to(dtype=network.dtype, device=network.device), pooled
