"""Checkpoints come back as they were, whole or not at all."""

from pathlib import Path

import pytest
import torch

from toile.core.artifacts import delete_folder
from toile.core.artifacts.local import LocalStore
from toile.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def point(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={"unet.to_q.lora_A": torch.full((2, 3), float(step))},
        optimizer={0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, 3)}},
        losses=[0.1 + 0.2, 1e-9],
    )


def test_newest_comes_back_as_it_was(store: LocalStore, tmp_path: Path) -> None:
    for step in (9, 10):
        save_checkpoint(store, "job/checkpoints", point(step))
    back = load_checkpoint(store, "job/checkpoints", tmp_path / "cache")
    assert back is not None
    assert (back.step, back.losses) == (10, [0.1 + 0.2, 1e-9])
    assert torch.equal(back.weights["unet.to_q.lora_A"], torch.full((2, 3), 10.0))
    assert torch.equal(back.optimizer[0]["step"], torch.tensor(10.0))


def test_none_yet(store: LocalStore, tmp_path: Path) -> None:
    assert load_checkpoint(store, "job/checkpoints", tmp_path) is None


def test_only_the_newest_are_kept(store: LocalStore) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(store, "job/checkpoints", point(step))
    steps = {info.key.split("/")[2] for info in store.list("job/checkpoints/")}
    assert steps == {"00000003", "00000004"}


def test_half_a_checkpoint_does_not_count(store: LocalStore, tmp_path: Path) -> None:
    save_checkpoint(store, "job/checkpoints", point(1))
    save_checkpoint(store, "job/checkpoints", point(2))
    store.delete("job/checkpoints/00000002/manifest.json")
    back = load_checkpoint(store, "job/checkpoints", tmp_path / "cache")
    assert back is not None
    assert back.step == 1


def test_damaged_checkpoint_is_passed_over(store: LocalStore, tmp_path: Path) -> None:
    save_checkpoint(store, "job/checkpoints", point(1))
    save_checkpoint(store, "job/checkpoints", point(2))
    store.put("job/checkpoints/00000002/state.safetensors", b"damaged")
    back = load_checkpoint(store, "job/checkpoints", tmp_path / "cache")
    assert back is not None
    assert back.step == 1


def test_saved_again_by_a_rival_it_stays(store: LocalStore, tmp_path: Path) -> None:
    save_checkpoint(store, "job/checkpoints", point(1))
    save_checkpoint(store, "job/checkpoints", Checkpoint(1, {"w": torch.zeros(1)}, {}, []))
    back = load_checkpoint(store, "job/checkpoints", tmp_path / "cache")
    assert back is not None
    assert back.losses == [0.1 + 0.2, 1e-9]


def test_forgotten_whole(store: LocalStore) -> None:
    save_checkpoint(store, "job/checkpoints", point(1))
    delete_folder(store, "job/checkpoints")
    assert not list(store.list("job/"))
