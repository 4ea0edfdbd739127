"""What the benchmark of training reads from the script's progress bar, and how it counts."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from train import arms

    return arms


def test_a_step_ends_when_its_bar_is_first_drawn(arms) -> None:
    run = arms.Run()
    for now, bar in (
        (1.0, b"Steps:   0%|          | 0/40 [00:00<?, ?it/s]"),
        (2.0, b"Steps:   2%|2         | 1/40 [00:02<01:18,  2.0s/it]"),
        (2.1, b"Steps:   2%|2         | 1/40 [00:02<01:18,  2.0s/it, lr=0.0001, step_loss=0.334]"),
        (2.2, b"Loading weights: 100%|####| 69/69 [00:00<00:00]"),
        (4.0, b"Steps:   5%|5         | 2/40 [00:04<01:16,  2.0s/it, lr=0.0001, step_loss=0.334]"),
        (4.1, b"Steps:   5%|5         | 2/40 [00:04<01:16,  2.0s/it, lr=0.0001, step_loss=5e-2]"),
    ):
        arms._read_bar(bar, now, run)
    assert run.ends == {1: 2.0, 2: 4.0}
    assert run.losses == {1: 0.334, 2: 0.05}


def test_the_warm_up_does_not_count(arms, tmp_path: Path) -> None:
    task = arms.Task(tmp_path, tmp_path, steps=4, warm_up=2, batch_size=8)
    run = arms.Run(ends={1: 10.0, 2: 11.0, 3: 13.0, 4: 15.0})
    assert run.images_per_second(task) == 4.0
