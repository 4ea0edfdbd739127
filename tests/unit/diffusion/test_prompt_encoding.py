"""Encoded prompts: the stock pipelines' to the bit where those can encode them."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from toile.core.errors import InvalidArgumentError
from toile.diffusion.architecture import load_refiner
from toile.diffusion.bundle import Bundle

TOKENS = 77
LONG = " ".join(["red"] * 75)

Stock = StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline


@pytest.fixture(scope="module")
def stock(bundle: Bundle) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)


@pytest.fixture(scope="module")
def stock_refiner(
    bundle: Bundle, stock: StableDiffusionXLPipeline
) -> StableDiffusionXLImg2ImgPipeline:
    return load_refiner(bundle.path, stock)


@torch.inference_mode()
def by_stock(stock: Stock, prompt: str, negative: str) -> tuple[torch.Tensor, ...]:
    encoded: tuple[torch.Tensor, ...] = stock.encode_prompt(
        prompt=prompt, negative_prompt=negative or None, device="cpu"
    )
    return encoded


@pytest.mark.parametrize("refiner", [False, True])
@pytest.mark.parametrize("negative", ["", "blurry, low quality"])
@pytest.mark.parametrize(
    "prompt", ["", "a red dress", "Élégante  robe: 50% lace,\nno. 7!", LONG, "a <lace> dress"]
)
def test_a_plain_prompt_of_one_chunk_is_encoded_as_stock(
    bundle: Bundle,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    prompt: str,
    negative: str,
    refiner: bool,
) -> None:
    ours = bundle.encode_prompt(prompt, negative, refiner=refiner)
    theirs = by_stock(stock_refiner if refiner else stock, prompt, negative)
    for one, other in zip(vars(ours).values(), theirs, strict=True):
        assert torch.equal(one, other)


def test_escaped_brackets_are_encoded_as_stock_encodes_them(
    bundle: Bundle, stock: StableDiffusionXLPipeline
) -> None:
    ours = bundle.encode_prompt(r"a dress \(red\)")
    assert torch.equal(ours.prompt, by_stock(stock, "a dress (red)", "")[0])


def test_each_chunk_is_encoded_by_itself_and_the_first_is_pooled(bundle: Bundle) -> None:
    both = bundle.encode_prompt(f"{LONG} a blue hat", "blurry")
    first, second = bundle.encode_prompt(LONG), bundle.encode_prompt("a blue hat")
    assert torch.equal(both.prompt, torch.cat([first.prompt, second.prompt], dim=1))
    assert torch.equal(both.pooled, first.pooled)
    negative, empty = bundle.encode_prompt("blurry"), bundle.encode_prompt("")
    assert torch.equal(both.negative, torch.cat([negative.prompt, empty.prompt], dim=1))
    assert torch.equal(
        bundle.encode_prompt("one BREAK two").prompt,
        torch.cat([bundle.encode_prompt(p).prompt for p in ("one", "two")], dim=1),
    )


def test_a_prompt_is_as_long_as_its_longer_negative(bundle: Bundle) -> None:
    encoded = bundle.encode_prompt("red", LONG + " blue")
    assert encoded.prompt.shape == encoded.negative.shape
    assert encoded.prompt.shape[1] == 2 * TOKENS


def test_weights_multiply_the_words_own_embeddings(bundle: Bundle) -> None:
    plain = bundle.encode_prompt("a red dress")
    weighted = bundle.encode_prompt("a (red:1.5) dress")
    assert torch.equal(weighted.pooled, plain.pooled)
    words = [len(bundle.tokenizer(word).input_ids) - 2 for word in ("a", "red")]
    start = 1 + words[0]
    inside = slice(start, start + words[1])
    assert torch.equal(weighted.prompt[:, inside], plain.prompt[:, inside] * 1.5)
    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(weighted.prompt[:, outside], plain.prompt[:, outside])


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_emphasis_that_means_nothing_names_its_field(bundle: Bundle, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        bundle.encode_prompt(**{"prompt": "red", field: "(red:99)"})
    assert caught.value.reason == "BAD_EMPHASIS"
    assert caught.value.metadata["field"] == field


@pytest.fixture
def encoded(bundle: Bundle) -> Iterator[list[str]]:
    """What the text encoders were asked for since, an entry a chunk."""
    calls: list[str] = []
    hooks = [
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, network in bundle.text_encoders.items()
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_each_text_is_encoded_once(bundle: Bundle, encoded: list[str]) -> None:
    def chunks(*prompts: str) -> int:
        encoded.clear()
        bundle.encode_prompt(*prompts)
        assert encoded.count("text_encoder") == encoded.count("text_encoder_2")
        return encoded.count("text_encoder")

    assert chunks("one text", "its negative") == 2
    assert chunks("one text", "its negative") == 0
    assert chunks("another text", "its negative") == 1
    assert chunks("its negative", "one text") == 0
    assert chunks("a longer BREAK text", "its negative") == 4, "the negative has two chunks, too"
    bundle.forget_prompts()
    assert chunks("one text", "its negative") == 2


def test_a_refiner_does_not_take_the_bases_embeddings(bundle: Bundle) -> None:
    widths = [
        bundle.encode_prompt("both draw it", refiner=r).prompt.shape[2] for r in (False, True)
    ]
    assert widths[0] > widths[1]
