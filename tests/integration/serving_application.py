"""The application of the models on a Ray cluster, adapters for it, and how alike two images are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from toile.core.artifacts import ArtifactStore, publish_folder
from toile.core.settings import Settings

PATIENCE_SECONDS = 600.0


def serving_command(
    settings: Settings, ray_address: str, command: str, *options: str
) -> dict[str, Any]:
    """Run `python -m toile.serving`, and return its answer."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TOILE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "toile.serving", command, "--ray-address", ray_address, *options],
        env={
            **environment,
            **settings.environment(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        },
        stdout=subprocess.PIPE,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def publish_lora(
    store: ArtifactStore, artifact: str, folder: Path, bundle: Path, base_digest: str, seed: int = 0
) -> None:
    """Publish a random LoRA of rank 4 on a base's queries."""
    import torch

    from toile.diffusion.adapter_header import AdapterCard
    from toile.diffusion.adapters import linear_targets, write_lora
    from toile.diffusion.triton.packed import empty_unet

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, (inputs, outputs) in linear_targets(empty_unet(bundle)).items():
        if path.endswith("to_q"):
            state[f"{path}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            state[f"{path}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    card = AdapterCard("lace", "bases/tiny", base_digest, 128)
    write_lora(folder, state, 4, 4.0, card)
    publish_folder(store, artifact, folder)


def decibels(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio; infinite where they are equal."""
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
