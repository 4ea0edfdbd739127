"""A run that is interrupted again and again ends bit for bit as one that is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.core.errors import CancelledError
from toile.training import lora
from toile.training.caches import Cache
from toile.training.checkpoint import Checkpoint
from unit.training.runs import CONFIG, Run, made_up_tokens

VARIANTS: dict[str, dict[str, object]] = {
    "as it comes": {},
    "adafactor": {"optimizer": "adafactor", "weight_decay": 0.1},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "learning_rate_schedule": "constant"},
    "8-bit": {"optimizer": "adamw8bit", "rank": 64, "alpha": 64.0, "weight_decay": 0.1},
    "noise offset and Huber": {"noise_offset": 0.1, "huber_c": 0.1},
    "little memory": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "average": {"ema_decay": 0.9},
    "validation": {"validation_share": 0.25, "validation_interval_steps": 1},
    "validated average": {
        "validation_share": 0.25,
        "validation_interval_steps": 3,
        "ema_decay": 0.9,
    },
    "dropout": {
        "dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "validation_share": 0.25,
        "validation_interval_steps": 3,
    },
    "fp16": {"mixed_precision": "fp16"},
    "fp32": {"mixed_precision": "no"},
    "whole transformers": {"target_modules": "transformer"},
    "DoRA": {
        "use_dora": True,
        "dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "ema_decay": 0.9,
    },
    "text encoders": {
        "train_text_encoders": True,
        "text_encoder_learning_rate": 2e-3,
        "dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "ema_decay": 0.9,
    },
    "betas": {"adam_beta1": 0.8, "adam_beta2": 0.99, "learning_rate_schedule": "linear"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_three_interruptions_change_nothing(
    make_unet: Callable[[], UNet2DConditionModel],
    cache: Cache,
    scheduler: DDPMScheduler,
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="the adamw8bit extra is not installed")
    config = CONFIG.model_copy(update=changes)
    kept: list[Checkpoint] = []

    def run(stop_at: int = -1) -> Run:
        start = kept[-1] if kept else None
        examples = made_up_tokens() if config.train_text_encoders else cache
        return Run(make_unet(), examples, scheduler, config, start, stop_at, keep=keep)

    def keep(point: Checkpoint) -> None:
        kept.append(written_and_read(point, tmp_path))

    whole = run()
    kept.clear()
    for steps in (2, 2, 1):
        with pytest.raises(CancelledError):
            run(stop_at=steps)
    assert kept[-1].step == 5
    rest = run()
    assert [report.step for report in rest.reports] == [6]
    assert rest.reports[-1].loss == whole.reports[-1].loss
    assert rest.reports[-1].learning_rate == whole.reports[-1].learning_rate
    assert whole.end.to_files() == rest.end.to_files()
    published, again = lora.adapter_state(whole.network), lora.adapter_state(rest.network)
    assert all(torch.equal(published[name], again[name]) for name in published)


def written_and_read(point: Checkpoint, folder: Path) -> Checkpoint:
    for name, content in point.to_files().items():
        (folder / name).write_bytes(content)
    return Checkpoint.from_folder(folder)
