import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from toile.core.errors import (
    CancelledError,
    ComputeUnavailableError,
    DeadlineError,
    InvalidArgumentError,
)
from toile.core.samplers import SCHEDULER_NAMES
from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import DIFFUSERS_FILE, AdapterWeights, write_adapter
from toile.diffusion.architecture import load_refiner
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.pipelines import DiffusionRequest, diffuse, draw_images
from toile.diffusion.request import RefinerMode, UpscaleTiles
from toile.diffusion.turns import Urgency
from unit.diffusion.doras import as_dora

SIDE = 64


@pytest.fixture(scope="module")
def denoiser(bundle: Bundle) -> TorchDenoiser:
    return TorchDenoiser(bundle, bfloat16=False)


@pytest.fixture(scope="module")
def stock(bundle: Bundle) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    return pipeline


def freeze(pipeline: Any) -> None:
    """Freeze its weights, as a bundle's are, and as peft freezes them once a LoRA is loaded.

    torch folds the batch of a matrix product whose weight wants gradients (`should_fold` in
    ATen's LinearAlgebra.cpp, also where none are computed) and not of others whose input is not
    contiguous, as each `proj_in`'s is: two kernels, which on some processors round differently.
    """
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)


def request(**fields: Any) -> DiffusionRequest:
    return DiffusionRequest(
        **{
            "prompt": "a red dress",
            "seeds": [1],
            "steps": 2,
            "width": SIDE,
            "height": SIDE,
            **fields,
        }
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def draw(bundle: Bundle, denoiser: TorchDenoiser, **fields: Any) -> np.ndarray:
    return pixels(next(diffuse(bundle, denoiser, request(**fields))))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_images_are_those_of_the_stock_pipeline(
    bundle: Bundle, denoiser: TorchDenoiser, stock: StableDiffusionXLPipeline, negative: str
) -> None:
    ours = draw(bundle, denoiser, negative_prompt=negative, guidance_scale=4.0)
    theirs = stock(
        "a red dress",
        negative_prompt=negative or None,
        width=SIDE,
        height=SIDE,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert difference(ours, pixels(theirs)) == 0


def test_refined_images_are_those_of_the_stock_pipelines(
    bundle: Bundle, denoiser: TorchDenoiser, stock: StableDiffusionXLPipeline
) -> None:
    generator = torch.Generator().manual_seed(1)
    common = {"num_inference_steps": 5, "guidance_scale": 5.0, "generator": generator}
    latents = stock(
        "a red dress",
        width=SIDE,
        height=SIDE,
        denoising_end=0.6,
        output_type="latent",
        **common,
    ).images
    refiner = load_refiner(bundle.path, stock)
    refiner.set_progress_bar_config(disable=True)
    freeze(refiner)
    theirs = refiner(
        "a red dress",
        image=latents,
        denoising_start=0.6,
        original_size=(SIDE, SIDE),
        target_size=(SIDE, SIDE),
        **common,
    ).images[0]
    ours = draw(bundle, denoiser, steps=5, refiner_strength=0.4)
    assert difference(ours, pixels(theirs)) == 0


def test_redrawn_images_are_those_of_the_stock_pipeline(
    bundle: Bundle, denoiser: TorchDenoiser, stock: StableDiffusionXLPipeline
) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red dress",
        image=start,
        strength=0.6,
        num_inference_steps=4,
        guidance_scale=5.0,
        guidance_rescale=0.7,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    fields = {"init_image": start, "strength": 0.6, "steps": 4}
    ours = draw(bundle, denoiser, guidance_rescale=0.7, **fields)
    assert difference(ours, pixels(theirs)) == 0
    assert difference(ours, draw(bundle, denoiser, **fields)) > 0


def test_the_refiner_may_redraw_the_whole_image(
    bundle: Bundle, denoiser: TorchDenoiser, stock: StableDiffusionXLPipeline
) -> None:
    generator = torch.Generator().manual_seed(1)
    common = {"num_inference_steps": 5, "guidance_scale": 5.0, "generator": generator}
    latents = stock("a red dress", width=SIDE, height=SIDE, output_type="latent", **common).images
    refiner = load_refiner(bundle.path, stock)
    refiner.set_progress_bar_config(disable=True)
    freeze(refiner)
    theirs = refiner("a red dress", image=latents, strength=0.4, **common).images[0]
    ours = draw(
        bundle, denoiser, steps=5, refiner_strength=0.4, refiner_mode=RefinerMode.IMAGE_TO_IMAGE
    )
    assert difference(ours, pixels(theirs)) == 0


def test_an_image_depends_on_its_seed_alone(bundle: Bundle, denoiser: TorchDenoiser) -> None:
    first, second = (pixels(i) for i in diffuse(bundle, denoiser, request(seeds=[1, 2])))
    assert difference(second, draw(bundle, denoiser, seeds=[2])) == 0
    assert difference(first, second) > 8


def test_the_native_size_is_the_default(bundle: Bundle, denoiser: TorchDenoiser) -> None:
    drawn = draw(bundle, denoiser, width=0, height=0, steps=1)
    assert drawn.shape == (bundle.native_size, bundle.native_size, 3)


def test_an_init_image_is_kept_the_more_the_lower_the_strength(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    start = Image.new("RGB", (SIDE, SIDE), "orange")
    encoded = torch.tensor(pixels(start)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        mean = bundle.vae.encode(encoded).latent_dist.mean
        same = bundle.vae.decode(mean).sample[0].permute(1, 2, 0)
    kept = ((same.numpy() / 2 + 0.5).clip(0, 1) * 255).round()
    weak, strong = (
        draw(bundle, denoiser, init_image=start, steps=4, strength=strength)
        for strength in (0.25, 1.0)
    )
    assert np.abs(weak - kept).mean() < np.abs(strong - kept).mean()


def test_inpainting_leaves_the_outside_to_the_pixel(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 16:48] = 255
    drawn = draw(
        bundle,
        denoiser,
        init_image=Image.fromarray(noise),
        mask_image=Image.fromarray(mask),
        strength=0.8,
        steps=3,
    )
    assert (drawn[mask == 0] == noise[mask == 0]).all()
    assert (drawn[mask == 255] != noise[mask == 255]).mean() > 0.9


@pytest.mark.parametrize("name", ["", *SCHEDULER_NAMES])
@pytest.mark.parametrize("mode", ["text", "image", "refined", "refined as an image"])
def test_every_scheduler_draws_and_counts_its_steps(
    bundle: Bundle, denoiser: TorchDenoiser, name: str, mode: str
) -> None:
    more = {
        "text": {},
        "image": {"init_image": Image.new("RGB", (SIDE, SIDE), "red"), "strength": 0.5},
        "refined": {"refiner_strength": 0.4},
        "refined as an image": {
            "refiner_strength": 0.4,
            "refiner_mode": RefinerMode.IMAGE_TO_IMAGE,
        },
    }[mode]
    seen: list[tuple[int, int, int]] = []
    images = diffuse(
        bundle,
        denoiser,
        request(scheduler=name, steps=4, **more),
        on_step=lambda *step: seen.append(step),
    )
    drawn = pixels(next(images))
    assert drawn.std() > 0
    total = seen[-1][2]
    assert seen == [(0, step, total) for step in range(1, total + 1)]


def test_an_unknown_scheduler_is_refused_with_the_valid_ones(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    with pytest.raises(InvalidArgumentError, match="EulerDiscreteScheduler") as caught:
        draw(bundle, denoiser, scheduler="Euler a")
    assert caught.value.reason == "UNKNOWN_SCHEDULER"


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_long_prompts_are_read_to_their_end_up_to_a_limit(
    bundle: Bundle, denoiser: TorchDenoiser, field: str
) -> None:
    red, blue = (
        draw(bundle, denoiser, **{field: " ".join(["red"] * 100 + [end])})
        for end in ("red", "blue")
    )
    assert difference(red, blue) > 0
    with pytest.raises(InvalidArgumentError, match=f"{field} takes 9 chunks") as caught:
        draw(bundle, denoiser, **{field: " ".join(["red"] * 601)})
    assert caught.value.reason == "PROMPT_TOO_LONG"


def test_emphasis_and_long_prompts_reach_the_refiner(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    long = "a red dress, " * 30
    plain, weighted = (
        draw(bundle, denoiser, prompt=prompt, steps=4, refiner_strength=0.5)
        for prompt in (long, f"({long}:1.5)")
    )
    assert difference(plain, weighted) > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 60},
        {"height": -64},
        {"steps": 0},
        {"guidance_scale": float("nan")},
        {"guidance_rescale": float("nan")},
        {"guidance_rescale": 1.1},
        {"guidance_rescale": -0.1},
        {"refiner_strength": 1.0},
        {"refiner_strength": float("nan")},
        {"refiner_strength": 0.4, "refiner_mode": RefinerMode.IMAGE_TO_IMAGE},
        {"preview_interval": -1},
        {"upscale": UpscaleTiles(16)},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "upscale": UpscaleTiles(-1)},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "upscale": UpscaleTiles(8), "width": 0},
        {
            "init_image": Image.new("RGB", (SIDE, SIDE)),
            "mask_image": Image.new("L", (SIDE, SIDE), 255),
            "upscale": UpscaleTiles(8),
        },
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "strength": float("nan")},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "strength": 1.1},
        {"mask_image": Image.new("L", (SIDE, SIDE), 255)},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "mask_image": Image.new("L", (8, 8), 255)},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "mask_image": Image.new("L", (SIDE, SIDE))},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "strength": 0.1},
        {"init_image": Image.new("RGB", (SIDE, SIDE)), "refiner_strength": 0.2},
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        request(**fields)


def test_cancelling_stops_within_one_step(bundle: Bundle, denoiser: TorchDenoiser) -> None:
    seen: list[int] = []
    images = diffuse(
        bundle,
        denoiser,
        request(steps=50, urgency=Urgency(cancelled=lambda: len(seen) == 2)),
        on_step=lambda _, step, total: seen.append(step),
    )
    with pytest.raises(CancelledError):
        next(images)
    assert seen == [1, 2]
    assert draw(bundle, denoiser).any()  # the denoiser is free again


def test_a_deadline_may_be_raised_from_the_question(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    def late() -> bool:
        raise DeadlineError("late")

    with pytest.raises(DeadlineError):
        next(diffuse(bundle, denoiser, request(urgency=Urgency(cancelled=late))))


def test_adapters_come_and_go_without_a_trace(
    bundle: Bundle, denoiser: TorchDenoiser, lora: AdapterWeights, other_lora: AdapterWeights
) -> None:
    one, other = LoadedAdapter("one", lora), LoadedAdapter("other", other_lora)
    plain = draw(bundle, denoiser)
    with_one = draw(bundle, denoiser, adapters=[one])
    both = draw(bundle, denoiser, adapters=[one, other])
    assert difference(plain, with_one) > 8
    assert difference(with_one, both) > 8
    assert difference(both, draw(bundle, denoiser, adapters=[other, one])) <= 1
    assert difference(with_one, draw(bundle, denoiser, adapters=[one])) == 0
    assert difference(plain, draw(bundle, denoiser)) == 0
    none = draw(bundle, denoiser, adapters=[LoadedAdapter("one", lora, 0.0)])
    assert difference(plain, none) <= 1


def test_adapter_weights_scale_the_update(
    bundle: Bundle, lora: AdapterWeights, denoiser: TorchDenoiser
) -> None:
    """At half the weight the UNet does what a UNet with half the update merged does."""
    reference = Bundle.load(bundle.path).unet
    for path, layer in lora.layers.items():
        update = 0.5 * layer.alpha / layer.rank * layer.up @ layer.down
        reference.get_submodule(path).weight.data += update
    merged = _Fixed(reference)
    expected = pixels(next(diffuse(bundle, merged, request())))
    have = draw(bundle, denoiser, adapters=[LoadedAdapter("one", lora, 0.5)])
    assert difference(expected, have) <= 1


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_a_dora_draws_as_diffusers_draws_it(
    tmp_path: Path, bundle: Bundle, lora: AdapterWeights, weight: float
) -> None:
    fresh = Bundle.load(bundle.path)
    dora = as_dora(lora, fresh)
    ours = draw(
        fresh,
        TorchDenoiser(fresh, bfloat16=False),
        adapters=[LoadedAdapter("dora", dora, weight)],
        guidance_scale=4.0,
    )
    card = AdapterCard(title="dora", base="", base_digest="", resolution=64)
    write_adapter(tmp_path, dora, card)
    stock = StableDiffusionXLPipeline.from_pretrained(bundle.path, local_files_only=True)
    stock.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE, adapter_name="dora")
    stock.set_adapters("dora", weight)
    theirs = stock(
        "a red dress",
        width=SIDE,
        height=SIDE,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert difference(ours, pixels(theirs)) == 0
    assert difference(ours, draw(fresh, TorchDenoiser(fresh), guidance_scale=4.0)) > 8


def test_little_used_adapters_make_room(
    bundle: Bundle, lora: AdapterWeights, other_lora: AdapterWeights
) -> None:
    denoiser = TorchDenoiser(
        Bundle.load(bundle.path), cache_bytes=lora.size_bytes + 1, bfloat16=False
    )
    for weights in (lora, other_lora, lora):
        with denoiser.session([LoadedAdapter(str(id(weights)), weights)]):
            pass
        assert denoiser.resident_bytes <= lora.size_bytes + 1
    first = draw(bundle, denoiser, adapters=[LoadedAdapter("again", lora)])
    fresh = TorchDenoiser(Bundle.load(bundle.path), bfloat16=False)
    assert difference(first, draw(bundle, fresh, adapters=[LoadedAdapter("x", lora)])) == 0


def test_an_adapter_of_another_base_is_refused(
    bundle: Bundle, denoiser: TorchDenoiser, lora: AdapterWeights
) -> None:
    stranger = AdapterWeights(lora.layers, {"toile.base_digest": "f" * 64})
    with pytest.raises(InvalidArgumentError) as caught:
        draw(bundle, denoiser, adapters=[LoadedAdapter("stranger", stranger)])
    assert caught.value.reason == "ADAPTER_MISMATCH"
    with pytest.raises(InvalidArgumentError) as caught:
        draw(bundle, denoiser, adapters=[LoadedAdapter("a", lora), LoadedAdapter("a", lora)])
    assert caught.value.reason == "DUPLICATE_ADAPTER"


def test_requests_with_different_adapters_do_not_mix(
    bundle: Bundle, denoiser: TorchDenoiser, lora: AdapterWeights, other_lora: AdapterWeights
) -> None:
    choices = [[], [LoadedAdapter("one", lora)], [LoadedAdapter("other", other_lora)]]
    alone = [draw(bundle, denoiser, adapters=adapters) for adapters in choices]
    together: dict[int, list[np.ndarray]] = {}

    def work(place: int) -> None:
        asked = request(adapters=choices[place], seeds=[1, 1])
        together[place] = [pixels(image) for image in diffuse(bundle, denoiser, asked)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, expected in enumerate(alone):
        assert len(together[place]) == 2
        assert all(difference(expected, image) == 0 for image in together[place])


def test_bfloat16_changes_little_and_leaves_the_unet_as_it_was(
    bundle: Bundle, denoiser: TorchDenoiser
) -> None:
    exact = draw(bundle, denoiser)
    rough = draw(bundle, TorchDenoiser(bundle, bfloat16=True))
    assert difference(exact, rough) > 0
    assert np.abs(exact - rough).mean() < 4
    assert "forward" not in vars(bundle.unet)


def test_a_base_without_refiner_says_so(bundle: Bundle, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in bundle.path.iterdir():
        if path.name != "refiner":
            (bare / path.name).symlink_to(path)
    base = Bundle.load(bare)
    assert not base.has_refiner
    with pytest.raises(Exception, match="no refiner") as caught:
        draw(base, TorchDenoiser(base, bfloat16=False), steps=5, refiner_strength=0.4)
    assert caught.value.reason == "NO_REFINER"  # type: ignore[attr-defined]


class _Fixed:
    """A denoiser of one UNet that takes no adapters: the interface asks for no more."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    @contextmanager
    def session(self, adapters: Any, urgency: Any, controls: Any) -> Iterator[Any]:
        assert not adapters
        assert not controls
        yield self._unet

    @contextmanager
    def refiner_session(self, urgency: Any) -> Iterator[Any]:
        yield self._unet

    def samples_at_once(self, height: int, width: int) -> int:
        return 1


class _Together(_Fixed):
    """Takes several samples, and counts the sessions that are open."""

    def __init__(self, unet: Any, samples: int, meeting: threading.Barrier | None = None) -> None:
        super().__init__(unet)
        self._samples, self._meeting = samples, meeting
        self._lock = threading.Lock()
        self.open = self.most = 0

    @contextmanager
    def session(self, adapters: Any, urgency: Any, controls: Any) -> Iterator[Any]:
        with self._lock:
            self.open += 1
            self.most = max(self.most, self.open)
        if self._meeting is not None:
            self._meeting.wait()
        yield self._unet
        with self._lock:
            self.open -= 1

    def samples_at_once(self, height: int, width: int) -> int:
        assert (height, width) == (SIDE // 8, SIDE // 8)
        return self._samples


@pytest.mark.parametrize(
    ("samples", "at_once", "guidance_scale", "together"),
    [(8, 8, 5.0, 4), (8, 2, 5.0, 2), (4, 8, 1.0, 4), (8, 8, 1.0, 4), (1, 8, 5.0, 1)],
)
def test_images_of_a_request_are_drawn_together(
    bundle: Bundle, samples: int, at_once: int, guidance_scale: float, together: int
) -> None:
    """They meet in their sessions, and are those that are drawn one by one."""
    wanted = request(seeds=[1, 2, 3, 4], guidance_scale=guidance_scale)
    denoiser = _Together(bundle.unet, samples, threading.Barrier(together, timeout=60))
    images: dict[int, Image.Image] = {}
    seen: dict[int, list[int]] = {}

    draw_images(
        bundle,
        denoiser,
        wanted,
        images.__setitem__,
        at_once=at_once,
        on_step=lambda index, step, total: seen.setdefault(index, []).append(step),
    )
    assert denoiser.most == together
    assert seen == {index: [1, 2] for index in range(4)}
    for index, alone in enumerate(diffuse(bundle, _Fixed(bundle.unet), wanted)):
        assert difference(pixels(images[index]), pixels(alone)) <= 1


def test_images_of_different_prompts_are_drawn_together(bundle: Bundle) -> None:
    prompts = ["a red dress", "a (blue:1.3) hat", "a red dress", "lace"]
    wanted = request(prompt="", prompts=prompts, seeds=[1, 2, 3, 4], refiner_strength=0.5)
    denoiser = _Together(bundle.unet, 8, threading.Barrier(4, timeout=60))
    denoiser.refiner_session = TorchDenoiser(bundle, bfloat16=False).refiner_session
    images: dict[int, Image.Image] = {}

    draw_images(bundle, denoiser, wanted, images.__setitem__, at_once=4)

    for index, (prompt, seed) in enumerate(zip(prompts, wanted.seeds, strict=True)):
        one = request(prompt=prompt, seeds=[seed], refiner_strength=0.5)
        (alone,) = diffuse(bundle, TorchDenoiser(bundle, bfloat16=False), one)
        assert difference(pixels(images[index]), pixels(alone)) <= 1
    other = request(prompt=prompts[1], seeds=[1], refiner_strength=0.5)
    (other_words,) = diffuse(bundle, TorchDenoiser(bundle, bfloat16=False), other)
    assert difference(pixels(images[0]), pixels(other_words)) > 1, "prompts change nothing"


def test_a_prompt_that_cannot_be_read_is_refused_before_any_image(bundle: Bundle) -> None:
    wanted = request(prompts=["a dress", "a (dress:x:1)" * 300], seeds=[1, 2])
    with pytest.raises(InvalidArgumentError):
        draw_images(bundle, _Together(bundle.unet, 8), wanted, lambda *_: None, at_once=4)
    with pytest.raises(InvalidArgumentError) as caught:
        request(prompts=["a dress"], seeds=[1, 2])
    assert caught.value.metadata["field"] == "prompts"


def test_an_image_that_fails_stops_the_others_within_a_step(bundle: Bundle) -> None:
    counts = [0] * 4
    started = threading.Barrier(4, timeout=60)

    def on_step(index: int, step: int, total: int) -> None:
        if step == 1:
            started.wait()
            if index == 2:
                raise ComputeUnavailableError("the engine is away")
        counts[index] = step

    drawn: list[int] = []
    with pytest.raises(ComputeUnavailableError):
        draw_images(
            bundle,
            _Together(bundle.unet, 8),
            request(seeds=list(range(12)), steps=500),
            lambda index, _: drawn.append(index),
            at_once=4,
            on_step=on_step,
        )
    assert not drawn
    assert max(counts) < 50


def test_a_cancellation_stops_all_images(bundle: Bundle) -> None:
    steps: list[int] = []
    urgency = Urgency(cancelled=lambda: len(steps) >= 10)
    with pytest.raises(CancelledError):
        draw_images(
            bundle,
            _Together(bundle.unet, 8),
            request(seeds=list(range(12)), steps=500, urgency=urgency),
            lambda *_: None,
            at_once=4,
            on_step=lambda index, step, total: steps.append(index),
        )
    assert 10 <= len(steps) < 10 + 4
