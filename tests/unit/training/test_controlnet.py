"""The loop with a ControlNet in it: it learns to read its map, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from toile.training import batches
from toile.training.batches import ControlBatch, loss_sum, make_batch
from toile.training.checkpoint import Checkpoint
from toile.training.controlnet import start_training
from toile.training.maps import ControlCache
from unit.training import runs
from unit.training.runs import CONTROL_CONFIG, Run
from unit.training.test_exact_resume import written_and_read

MakeUnet = Callable[[], UNet2DConditionModel]
VARIANTS: dict[str, dict[str, object]] = {
    "as it comes": {},
    "everything": {
        "optimizer": "adafactor",
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "ema_decay": 0.9,
        "validation_share": 0.25,
        "validation_interval_steps": 1,
        "noise_offset": 0.1,
        "huber_c": 0.1,
    },
}


@pytest.fixture
def maps() -> ControlCache:
    return runs.made_up_maps()


def loss_of(run: Run, cache: ControlCache, scheduler: DDPMScheduler) -> float:
    """Loss on draws that no training step makes, under these maps."""
    config = CONTROL_CONFIG.model_copy(update={"batch_size": 32, "caption_dropout": 1.0})
    batch = make_batch(cache, [i % 4 for i in range(32)], config, 10**6, scheduler)
    with torch.no_grad():
        time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
        return float(loss_sum(run.network, batch, scheduler, config, time_ids))


def test_it_learns_what_the_map_shows(
    make_unet: MakeUnet, maps: ControlCache, scheduler: DDPMScheduler
) -> None:
    # Latents are bright where the map is: no caption says so, for all are dropped.
    bright = (maps.planes[:, ::8, ::8] > 0).float() * 4.0
    cache = ControlCache(**{**vars(maps), "means": bright[:, None].expand(-1, 4, -1, -1)})
    learn = {"steps": 60, "batch_size": 4, "learning_rate": 4e-3, "caption_dropout": 1.0}
    config = CONTROL_CONFIG.model_copy(update=learn)
    run = Run(make_unet(), cache, scheduler, config)
    first, last = run.end.losses[:10], run.end.losses[-10:]
    assert sum(last) < 0.9 * sum(first)
    shuffled = ControlCache(**{**vars(cache), "planes": cache.planes.roll(1, 0)})
    assert loss_of(run, cache, scheduler) < 0.97 * loss_of(run, shuffled, scheduler)


def test_the_unet_stays_as_it_is(
    make_unet: MakeUnet, maps: ControlCache, scheduler: DDPMScheduler
) -> None:
    before = make_unet().state_dict()
    run = Run(make_unet(), maps, scheduler, CONTROL_CONFIG)
    after = run.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t.to(after[name].dtype), after[name]) for name, t in before.items())
    new = start_training(make_unet(), CONTROL_CONFIG).state_dict()
    trained = run.network.state_dict()
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, new[name])}
    assert {"controlnet.conv_in.weight", "controlnet.controlnet_mid_block.weight"} <= changed
    assert all(name.startswith("controlnet.") for name in run.end.weights)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_two_interruptions_change_nothing(
    make_unet: MakeUnet,
    maps: ControlCache,
    scheduler: DDPMScheduler,
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    config = CONTROL_CONFIG.model_copy(update={"checkpoint_interval_steps": 2, **changes})

    def run(start: Checkpoint | None) -> tuple[Run, dict[int, Checkpoint]]:
        kept: dict[int, Checkpoint] = {}

        def keep(point: Checkpoint) -> None:
            kept[point.step] = written_and_read(point, tmp_path)

        return Run(make_unet(), maps, scheduler, config, start, keep=keep), kept

    whole, first = run(None)
    _, second = run(first[2])
    rest, _ = run(second[4])
    assert [report.step for report in rest.reports] == [5, 6]
    assert whole.end.to_files() == rest.end.to_files()
    published, again = whole.network.state_dict(), rest.network.state_dict()
    assert all(torch.equal(published[name], again[name]) for name in published)


def test_little_memory_changes_no_result(
    make_unet: MakeUnet,
    maps: ControlCache,
    scheduler: DDPMScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "cpu_has_bfloat16", lambda: False)
    whole = CONTROL_CONFIG.model_copy(update={"learning_rate": 1e-4, "batch_size": 4})
    little = whole.model_copy(
        update={"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    )
    computed: list[int] = []

    def run(config: object) -> Checkpoint:
        unet = make_unet()
        unet.up_blocks[-1].resnets[0].register_forward_pre_hook(
            lambda _, inputs: computed.append(len(inputs[0]))
        )
        return Run(unet, maps, scheduler, config).end  # type: ignore[arg-type]

    one = run(whole)
    assert computed == [4] * 6
    computed.clear()
    two = run(little)
    assert computed == [2, 2] * 12, "in pieces, and each once more for its gradients"
    assert two.losses == pytest.approx(one.losses, abs=1e-6)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(two.weights[name], tensor, atol=1e-6, rtol=0.0)


def test_every_image_has_its_own_map_on_every_rank(
    maps: ControlCache, scheduler: DDPMScheduler
) -> None:
    whole = make_batch(maps, [2, 0, 3], CONTROL_CONFIG, 5, scheduler)
    odd = make_batch(maps, [2, 0, 3], CONTROL_CONFIG, 5, scheduler, rank=1, world_size=2)
    assert isinstance(whole, ControlBatch)
    assert isinstance(odd, ControlBatch)
    assert torch.equal(whole.maps, maps.maps([2, 0, 3]))
    assert torch.equal(odd.maps, maps.maps([0]))
    shown = whole.conditions(torch.zeros(1, 6))["maps"]
    assert (shown.shape, float(shown.min()), float(shown.max())) == ((3, 3, 128, 128), 0.0, 1.0)
    assert [len(piece.maps) for piece in whole.pieces(2)] == [2, 1]
