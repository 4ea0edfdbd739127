"""Numbers that every base of SDXL's class has in common."""

PIXELS_PER_LATENT = 8
"""Side of the pixels that one latent stands for."""
TRAINED_TIMESTEPS = 1000
"""Of the noise schedule that it was trained on."""
