"""What lies behind the garment."""

import numpy as np

from toile.imaging.renderer.geometry import Float32Array, smooth_noise
from toile.imaging.renderer.spec import Background


def draw_background(background: Background, size: int, light: float) -> Float32Array:
    """Pixels `[size, size, 3]` in 0..255."""
    rng = np.random.default_rng([background.seed, 2])
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    shade = 1.0 + 0.025 * light * x
    if background.kind == "gradient":
        shade = shade - 0.07 * y
    elif background.kind == "spot":
        shade = shade + 0.06 - 0.12 * np.clip(x**2 + y**2, 0, 1.6)
    elif background.kind == "paper":
        shade = (
            shade + 0.018 * smooth_noise(rng, size, 40, 40) + 0.02 * smooth_noise(rng, size, 4, 4)
        )
    elif background.kind == "floor":
        horizon = rng.uniform(0.55, 0.8)
        shade = shade - 0.09 * np.clip((y - horizon) / 0.04, 0, 1)
    pixels = np.asarray(background.colour, dtype=np.float32) * shade[..., None]
    return np.asarray(np.clip(pixels, 0, 255), dtype=np.float32)
