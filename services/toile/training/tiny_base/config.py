"""Every number of the recipe."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StageConfig:
    """One stage's optimisation. `learning_rate` falls to nothing along a cosine after a warm-up."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError("steps, batch_size and learning_rate must be positive")


@dataclass(frozen=True)
class RecipeConfig:
    """The whole recipe; the defaults are what the shipped weights were trained with."""

    workdir: Path
    photos: Path | None = None
    bundle_path: Path | None = None
    threads: int = 2
    seed: int = 0
    render_shards: int = 24
    renders_per_shard: int = 1000
    photo_share_vae: float = 0.2
    photo_share_clip: float = 0.1
    photo_share_unet: float = 0.06
    condition_dropout: float = 0.1
    controls_caption_dropout: float = 0.5
    min_snr_gamma: float = 5.0
    refiner_max_timestep: int = 350
    checkpoint_seconds: float = 120.0
    vae: StageConfig = field(
        default_factory=lambda: StageConfig(
            1000, 8, 8.0e-4, warmup_steps=50, weight_decay=0.0, ema_decay=0.995
        )
    )
    decoder: StageConfig = field(
        default_factory=lambda: StageConfig(
            2400, 4, 5.0e-4, warmup_steps=50, weight_decay=0.0, ema_decay=0.995
        )
    )
    clip: StageConfig = field(
        default_factory=lambda: StageConfig(900, 96, 1.0e-3, weight_decay=0.05, ema_decay=0.995)
    )
    tower: StageConfig = field(
        default_factory=lambda: StageConfig(1000, 64, 8.0e-4, weight_decay=0.05, ema_decay=0.995)
    )
    segmenter: StageConfig = field(
        default_factory=lambda: StageConfig(600, 12, 3.0e-3, ema_decay=0.99)
    )
    classifier: StageConfig = field(
        default_factory=lambda: StageConfig(1000, 64, 2.0e-3, ema_decay=0.99)
    )
    unet: StageConfig = field(default_factory=lambda: StageConfig(10500, 32, 1.0e-3))
    refiner: StageConfig = field(default_factory=lambda: StageConfig(5000, 32, 1.0e-3))
    controls: StageConfig = field(default_factory=lambda: StageConfig(4000, 16, 5.0e-4))

    @property
    def bundle(self) -> Path:
        """Where the bundle is written."""
        return self.bundle_path or self.workdir / "bundle"
