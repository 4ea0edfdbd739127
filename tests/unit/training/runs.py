"""Trainings of the small UNet."""

from collections.abc import Callable

from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.training import lora
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint
from toile.training.config import LoraRecipeConfig

NAMES = ["a.png", "b.png", "c.png", "d.png"]
CONFIG = LoraRecipeConfig(
    rank=4, alpha=4, steps=6, batch_size=2, checkpoint_interval_steps=3, learning_rate=5e-3
)


class Run:
    """A training of the small UNet, and all that it told."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cache: Cache,
        scheduler: DDPMScheduler,
        config: LoraRecipeConfig = CONFIG,
        start: Checkpoint | None = None,
        stop_at: int = -1,
        keep: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        self.unet = unet
        self.reports: list[lora.StepReport] = []
        lora.add_adapter(unet, config)
        self.end = lora.train(
            unet,
            cache,
            NAMES,
            scheduler,
            config,
            native_size=128,
            start=start,
            on_step=self.reports.append,
            on_checkpoint=keep,
            stopped=lambda: len(self.reports) == stop_at,
        )
