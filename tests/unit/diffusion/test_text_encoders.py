"""The part of a LoRA that changes the text encoders, from the encoders to the image."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from toile.core.clock import now
from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import AdapterWeights, LoraLayer, write_adapter
from toile.diffusion.bank import gather
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.drawing import encode_prompts
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.prompts import PromptEmbeddings
from toile.diffusion.text_encoders import TextAdapter, adapted, text_targets
from toile.diffusion.triton.packed import pack_adapter
from toile.diffusion.triton.remote_unet import remote, without_weights

PROMPT, NEGATIVE = "a red dress", "blurry"
FIRST = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def of_text(bundle: Bundle, *, seed: int = 2, alpha: float = 2.0) -> dict[str, LoraLayer]:
    """A strong adapter of rank 4 on every Linear of both text encoders."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraLayer(
            0.1 * torch.randn(4, inputs, generator=generator),
            0.1 * torch.randn(outputs, 4, generator=generator),
            alpha,
        )
        for path, (inputs, outputs) in text_targets(bundle.text_encoders).items()
    }


@pytest.fixture
def whole(bundle: Bundle, lora: AdapterWeights) -> AdapterWeights:
    """An adapter of the UNet and of both text encoders."""
    return AdapterWeights(lora.layers, text_layers=of_text(bundle))


def encode(bundle: Bundle, *adapters: LoadedAdapter) -> PromptEmbeddings:
    request = DiffusionRequest(PROMPT, [1], negative_prompt=NEGATIVE, adapters=adapters)
    return encode_prompts(bundle, request)


def merged(bundle: Bundle, *parts: tuple[AdapterWeights, float]) -> Bundle:
    """The base with the text encoders' part of adapters in its weights."""
    reference = Bundle.load(bundle.path)
    for weights, weight in parts:
        for path, layer in weights.text_layers.items():
            part, _, rest = path.partition(".")
            encoder = reference.text_encoders[part]
            if not hasattr(encoder, "text_model"):
                rest = rest.removeprefix("text_model.")
            update = weight * layer.alpha / layer.rank * layer.up @ layer.down
            encoder.get_submodule(rest).weight.data += update
    return reference


def assert_equal(one: PromptEmbeddings, other: PromptEmbeddings, *, within: float = 1e-5) -> None:
    for name, tensor in vars(one).items():
        assert (tensor - vars(other)[name]).abs().max() <= within, name


def test_prompts_are_encoded_as_with_merged_weights(bundle: Bundle, whole: AdapterWeights) -> None:
    plain = encode(bundle)
    other = AdapterWeights(whole.layers, text_layers=of_text(bundle, seed=5, alpha=8.0))
    have = encode(bundle, LoadedAdapter("a", whole, 0.5), LoadedAdapter("b", other, -1.0))
    assert_equal(have, encode(merged(bundle, (whole, 0.5), (other, -1.0))))
    for name, tensor in vars(plain).items():
        assert (tensor - vars(have)[name]).abs().max() > 0.05, name
    bundle.forget_prompts()
    assert_equal(plain, encode(bundle), within=0.0)


def test_what_is_remembered_is_of_the_same_adapters_at_the_same_weights(
    bundle: Bundle, whole: AdapterWeights
) -> None:
    adapters = [
        (),
        (LoadedAdapter("a", whole),),
        (LoadedAdapter("a", whole, 0.5),),
        (LoadedAdapter("b", whole), LoadedAdapter("a", whole)),
    ]
    first = [encode(bundle, *chosen) for chosen in adapters]
    for chosen, known in zip(adapters, first, strict=True):
        assert encode(bundle, *chosen) is known
    assert len({float(known.pooled[0, 0]) for known in first}) == 4
    # Nothing of the text, or no strength of it, is nothing to the encoders.
    unet_alone = LoadedAdapter("c", AdapterWeights(whole.layers))
    assert encode(bundle, unet_alone, LoadedAdapter("a", whole, 0.0)) is first[0]


@pytest.mark.parametrize(
    ("schedule", "mean"),
    [
        ([(0.25, 0.0), (0.75, 2.0)], 1.0),
        ([(0.0, 0.0), (0.3, 0.0), (0.6, 1.0)], 0.55),
        ([(0.5, 0.8)], 0.8),
    ],
)
def test_a_schedule_counts_with_its_mean(
    whole: AdapterWeights, schedule: list[tuple[float, float]], mean: float
) -> None:
    adapter = LoadedAdapter("a", whole, 7.0, schedule).text_adapter
    assert adapter is not None
    assert adapter.weight == pytest.approx(mean)


def test_a_refiner_stays_as_it_is(tmp_path: Path, bundle: Bundle, whole: AdapterWeights) -> None:
    if not bundle.has_refiner:
        pytest.skip("the base has no refiner")
    request = DiffusionRequest(PROMPT, [1], adapters=[LoadedAdapter("a", whole)])
    plain = DiffusionRequest(PROMPT, [1])
    assert encode_prompts(bundle, request, refiner=True) is encode_prompts(
        bundle, plain, refiner=True
    )


def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(
    bundle: Bundle, whole: AdapterWeights
) -> None:
    plain = encode(bundle)
    outputs = text_targets(bundle.text_encoders)[FIRST][1]
    nowhere = FIRST.replace("layers.0", "layers.40")
    for layers, says in (
        ({nowhere: whole.text_layers[FIRST]}, "no Linear text_encoder.text_model.*40"),
        ({FIRST: LoraLayer(torch.ones(2, 3), torch.ones(outputs, 2), 1)}, "is 3 to"),
    ):
        wrong = AdapterWeights(whole.layers, text_layers={**whole.text_layers, **layers})
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            encode(bundle, LoadedAdapter("wrong", wrong))
        assert caught.value.reason == "ADAPTER_MISMATCH"
    stranger = AdapterWeights(whole.layers, {"toile.base_digest": "f" * 64}, whole.text_layers)
    with pytest.raises(InvalidArgumentError, match="another base"):
        encode(bundle, LoadedAdapter("stranger", stranger))
    bundle.forget_prompts()
    assert_equal(plain, encode(bundle), within=0.0)


def test_an_error_while_encoding_leaves_nothing_behind(
    bundle: Bundle, whole: AdapterWeights
) -> None:
    with (
        pytest.raises(RuntimeError),
        adapted(bundle.text_encoders, [TextAdapter("a", whole, 1.0)]),
    ):
        raise RuntimeError
    hooks = [
        module._forward_hooks
        for encoder in bundle.text_encoders.values()
        for _, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert hooks
    assert not any(hooks)


def test_requests_in_other_threads_keep_their_own(bundle: Bundle, whole: AdapterWeights) -> None:
    choices: list[list[LoadedAdapter]] = [
        [],
        [LoadedAdapter("a", whole)],
        [LoadedAdapter("a", whole, 0.5)],
    ]
    expected = [encode(bundle, *chosen) for chosen in choices]
    bundle.forget_prompts()
    found: dict[int, PromptEmbeddings] = {}

    def run(place: int) -> None:
        found[place] = encode(bundle, *choices[place % 3])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, embeddings in found.items():
        assert_equal(embeddings, expected[place % 3], within=0.0)


class Banked:
    """A denoiser as Triton's is: adapters are inputs, and the UNet of the pipelines is a call."""

    def __init__(self, bundle: Bundle) -> None:
        self._layout = bank_layout(bundle.unet)
        self._banked = BankedUNet(bundle.unet, self._layout)
        self._unet = without_weights(dict(bundle.unet.config))

    @contextlib.contextmanager
    def session(
        self, adapters: Sequence[LoadedAdapter], *_: object
    ) -> Iterator[UNet2DConditionModel]:
        sample = [(pack_adapter(a.weights, self._layout), a.weight) for a in adapters]

        def call(arrays: dict[str, np.ndarray]) -> np.ndarray:
            bank = gather([sample] * len(arrays["sample"]), self._layout)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            tensors["timestep"] = tensors["timestep"].flatten()
            made = {name: torch.from_numpy(array) for name, array in bank.items()}
            predicted: np.ndarray = self._banked(**tensors, bank=made).numpy()
            return predicted

        yield remote(self._unet, call)

    refiner_session = session


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def test_all_draw_what_diffusers_draws(
    bundle: Bundle, whole: AdapterWeights, tmp_path: Path
) -> None:
    weight = 0.6
    card = AdapterCard("lace", "bases/tiny", bundle.digest, 128, created=now())
    write_adapter(tmp_path, whole, card)
    stock: DiffusionPipeline = StableDiffusionXLPipeline.from_pretrained(
        bundle.path, local_files_only=True
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    stock.set_adapters(stock.get_active_adapters(), [weight])
    size = bundle.native_size
    theirs = np.asarray(
        stock(
            PROMPT,
            negative_prompt=NEGATIVE,
            width=size,
            height=size,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(7),
        ).images[0]
    )
    mine = Bundle.load(bundle.path, digest=bundle.digest)  # adapters would stay in the shared one

    def draw(weights: AdapterWeights, denoiser: TorchDenoiser | Banked) -> np.ndarray:
        adapter = LoadedAdapter("with text" if weights.text_layers else "without", weights, weight)
        request = DiffusionRequest(
            PROMPT, [7], negative_prompt=NEGATIVE, steps=4, adapters=[adapter]
        )
        return np.asarray(next(diffuse(mine, denoiser, request)))

    banked, here = Banked(mine), TorchDenoiser(mine, bfloat16=False)
    assert decibels(draw(whole, banked), theirs) >= 50
    assert decibels(draw(whole, here), theirs) >= 50
    assert decibels(draw(AdapterWeights(whole.layers), here), theirs) < 35
