"""Trainings of the small UNet."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from toile.core.errors import CancelledError
from toile.core.jobs.samples import Sample, SampleSet
from toile.diffusion.architecture import SCHEDULER_CONFIG, UNET_CONFIG
from toile.training import batches, loop, lora
from toile.training.buckets import BucketedCache
from toile.training.caches import Cache, WeightedCache
from toile.training.checkpoint import Checkpoint
from toile.training.class_images import joined
from toile.training.config import ControlNetRecipeConfig, LoraRecipeConfig
from toile.training.controlnet import start_training
from toile.training.maps import ControlCache
from toile.training.noise_prediction import NoisePrediction

NAMES = ["a.png", "b.png", "c.png", "d.png"]
CONFIG = LoraRecipeConfig(
    rank=4, alpha=4, steps=6, batch_size=2, checkpoint_interval_steps=3, learning_rate=5e-3
)

CLASS_CONFIG = CONFIG.model_copy(update={"class_prompt": "a dress", "class_image_count": 3})

TEXT_CONFIG = CONFIG.model_copy(
    update={"train_text_encoders": True, "text_encoder_learning_rate": 2e-3}
)

CONTROL_CONFIG = ControlNetRecipeConfig(
    steps=6, batch_size=2, checkpoint_interval_steps=3, learning_rate=5e-3
)


def small_unet() -> UNet2DConditionModel:
    """The same small UNet of the tiny base's kind, again and again."""
    config = {
        **UNET_CONFIG,
        "block_out_channels": (16, 16, 32),
        "attention_head_dim": (2, 2, 2),
        "layers_per_block": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**config)


def small_text_encoders() -> dict[str, Any]:
    """The same small text encoders again and again, whose embeddings fit the small UNet."""
    width = UNET_CONFIG["cross_attention_dim"] // 2
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=64,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=18,
        eos_token_id=19,
        pad_token_id=19,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "text_encoder": CLIPTextModel(config),
            "text_encoder_2": CLIPTextModelWithProjection(config),
        }


def tokens_of(*words: int) -> Tensor:
    """A caption of these tokens, for both encoders."""
    return torch.tensor([[18, *words, *(76 - len(words)) * [19]]] * 2)


def made_up_tokens() -> Cache:
    """The made up examples, with captions as tokens, the empty one first."""
    captions = torch.stack([tokens_of(), tokens_of(3, 4), tokens_of(5)])
    return dataclasses.replace(made_up_cache(), embeds=captions, pooled=torch.empty(3, 0))


def made_up_cache() -> Cache:
    """Encoded examples, as many as there are names."""
    source = torch.Generator().manual_seed(0)
    count = len(NAMES)
    return Cache(
        means=torch.randn(count, 4, 16, 16, generator=source),
        deviations=torch.full((count, 4, 16, 16), 0.01),
        captions=torch.tensor([1, 2, 1, 2]),
        embeds=torch.randn(3, 77, UNET_CONFIG["cross_attention_dim"], generator=source),
        pooled=torch.randn(3, 128, generator=source),
    )


def with_class(cache: Cache, weight: float = 1.0) -> WeightedCache:
    """Examples, and behind them three of a class, which are darker."""
    source = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, *cache.embeds.shape[1:], generator=source)
    pooled = torch.randn(2, *cache.pooled.shape[1:], generator=source)
    drawn = Cache(
        means=torch.randn(3, 4, 16, 16, generator=source) - 2.0,
        deviations=torch.full((3, 4, 16, 16), 0.01),
        captions=torch.ones(3, dtype=torch.long),
        embeds=torch.cat([cache.embeds[:1], embeds[1:]]),
        pooled=torch.cat([cache.pooled[:1], pooled[1:]]),
    )
    return joined(cache, drawn, weight)


def cache_for(config: LoraRecipeConfig | ControlNetRecipeConfig) -> Cache:
    """Encoded examples of what a configuration trains on."""
    if isinstance(config, ControlNetRecipeConfig):
        return made_up_maps()
    if config.train_text_encoders:
        return made_up_tokens()
    return with_class(made_up_cache()) if config.class_prompt else made_up_cache()


def made_up_maps() -> ControlCache:
    """The same examples, each with a bar in a place of its own."""
    planes = torch.zeros(len(NAMES), 128, 128, dtype=torch.uint8)
    for index, plane in enumerate(planes):
        plane[:, 8 + 32 * index : 24 + 32 * index] = 255
    grey = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 3).contiguous()
    return ControlCache(**vars(made_up_cache()), planes=planes, colours=grey)


BUCKET_TIME_IDS = torch.tensor(
    [
        [533.0, 400, 0, 3, 160, 96],
        [128.0, 128, 0, 0, 128, 128],
        [800.0, 600, 2, 0, 160, 96],
        [300.0, 310, 0, 2, 128, 128],
    ]
)


def bucketed_cache() -> BucketedCache:
    """The same examples, two of them portraits."""
    square = made_up_cache()
    source = torch.Generator().manual_seed(2)
    portraits = replace(
        square,
        means=torch.randn(2, 4, 20, 12, generator=source),
        deviations=torch.full((2, 4, 20, 12), 0.01),
        captions=square.captions[[0, 2]],
    )
    squares = Cache(
        square.means[[1, 3]], square.deviations[[1, 3]], square.captions[[1, 3]],
        square.embeds, square.pooled,
    )  # fmt: skip
    return BucketedCache([portraits, squares], [[0, 2], [1, 3]], BUCKET_TIME_IDS)


def bucketed_rank(rank: int, world_size: int, config: LoraRecipeConfig, folder: Path) -> None:
    """The same as `run_as_rank`, on examples of two sizes."""
    _run_as_rank(rank, world_size, config, bucketed_cache(), folder)


def base_scheduler() -> DDPMScheduler:
    """The noise schedule of the tiny base."""
    config = {k: v for k, v in SCHEDULER_CONFIG.items() if k != "timestep_spacing"}
    return DDPMScheduler(**config)


class Run:
    """A training of the small UNet, and all that it told."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cache: Cache | BucketedCache,
        scheduler: DDPMScheduler,
        config: LoraRecipeConfig | ControlNetRecipeConfig = CONFIG,
        start: Checkpoint | None = None,
        stop_at: int = -1,
        keep: Callable[[Checkpoint], None] = lambda _: None,
        repeats: Sequence[int] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        samples: loop.Samples | None = None,
    ) -> None:
        self.unet = unet
        self.reports: list[loop.StepReport] = []
        self.network: nn.Module = unet
        if isinstance(config, LoraRecipeConfig) and config.train_text_encoders:
            self.network = lora.with_text_encoders(unet, small_text_encoders(), config, tokens_of())
        elif isinstance(config, LoraRecipeConfig):
            lora.add_adapter(unet, config)
        else:
            self.network = start_training(unet, config)
        self.end = loop.train(
            self.network,
            NoisePrediction(cache, scheduler, config, image_count=len(NAMES), native_size=128),
            NAMES,
            config,
            start=start,
            repeats=repeats,
            on_step=self.reports.append,
            on_checkpoint=keep,
            stopped=lambda: stopping() or len(self.reports) == stop_at,
            samples=samples,
        )


def run_as_rank(
    rank: int,
    world_size: int,
    config: LoraRecipeConfig | ControlNetRecipeConfig,
    folder: Path,
) -> None:
    """Train as one of several processes, in full precision; each leaves its checkpoint's files."""
    _run_as_rank(rank, world_size, config, cache_for(config), folder)


def _run_as_rank(
    rank: int,
    world_size: int,
    config: LoraRecipeConfig | ControlNetRecipeConfig,
    cache: Cache | BucketedCache,
    folder: Path,
) -> None:
    batches.cpu_has_bfloat16 = lambda: False
    with _meeting(rank, world_size, folder):
        run = Run(small_unet(), cache, base_scheduler(), config)
    mine = folder / str(rank)
    mine.mkdir()
    for name, content in run.end.to_files().items():
        (mine / name).write_bytes(content)


class SlowSamples:
    """Samples that take a while, in pieces."""

    def __init__(self, pieces: int, seconds: float) -> None:
        self.told: list[int] = []
        self._pieces = pieces
        self._seconds = seconds

    def wanted(self) -> bool:
        return False

    def draw(self, step: int, *, due: bool) -> Generator[None, None, SampleSet | None]:
        for _ in range(self._pieces):
            time.sleep(self._seconds)
            yield
        return SampleSet(step, [Sample("a dress", 0)])

    def tell(self, drawn: SampleSet, best_step: int) -> None:
        self.told.append(drawn.step)


def sample_as_rank(rank: int, world_size: int, folder: Path, timeout_seconds: float) -> None:
    """Train as one of several processes, of which the first draws samples."""
    config = CONFIG.model_copy(update={"steps": 2, "sample_interval_steps": 2})
    samples = SlowSamples(pieces=3, seconds=timeout_seconds / 2) if rank == 0 else None
    with _meeting(rank, world_size, folder, timeout_seconds):
        Run(small_unet(), made_up_cache(), base_scheduler(), config, samples=samples)
    told = samples.told if samples is not None else []
    (folder / f"told-{rank}").write_text(str(told))


def stop_as_rank(rank: int, world_size: int, folder: Path) -> None:
    """Train as one of several processes; the last is told to stop, and the first keeps slowly."""

    def keep(point: Checkpoint) -> None:
        if rank == 0:
            time.sleep(0.5)
            (folder / "kept").write_text(str(point.step))

    told = 2 if rank == world_size - 1 else -1
    with _meeting(rank, world_size, folder):
        try:
            Run(small_unet(), made_up_cache(), base_scheduler(), stop_at=told, keep=keep)
        except CancelledError:
            (folder / f"stopped-{rank}").write_text((folder / "kept").read_text())


@contextlib.contextmanager
def _meeting(
    rank: int, world_size: int, folder: Path, timeout_seconds: float = 300.0
) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
