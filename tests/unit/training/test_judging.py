"""Which samples are the best."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from integration.training_platform import write_version
from toile.training.data import read_examples
from toile.training.judging import ImageScores, Judge, best_judged


def scored(*styles: float | None) -> list[ImageScores]:
    return [{"style": style, "prompt": 0.2} for style in styles]


def judge_all(judge: Judge, images: list[Image.Image], prompts: list[str]) -> list[ImageScores]:
    work = judge.scores(images, prompts)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return list(end.value)


@pytest.mark.parametrize(
    ("sets", "best"),
    [
        ({}, 0),
        ({10: scored(0.1)}, 10),
        ({10: scored(0.1), 20: scored(0.5), 30: scored(0.3)}, 20),
        ({10: scored(0.9, 0.1), 20: scored(0.6, 0.6)}, 20),
        ({20: scored(0.5), 10: scored(0.5)}, 10),
        ({10: scored(None), 20: scored(None)}, 10),
        ({10: scored(0.50), 20: scored(0.51)}, 20),
    ],
    ids=["none", "one", "three", "by the mean", "a tie", "nothing to say", "a little"],
)
def test_the_best_set(sets: dict[int, list[ImageScores]], best: int) -> None:
    assert best_judged(sets) == best


def test_one_scorer_that_gains_much_outweighs_one_that_loses_little() -> None:
    before: list[ImageScores] = [{"style": 0.2, "prompt": 0.30}]
    after: list[ImageScores] = [{"style": 0.6, "prompt": 0.29}]
    assert best_judged({10: before, 20: after}) == 20
    assert best_judged({10: after, 20: before}) == 10


def test_a_picture_that_is_trained_on_has_all_of_its_style(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    examples = read_examples(write_version(tmp_path / "version", count=1))
    judge = Judge(tiny_bundle, examples)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with Image.open(examples[0].path) as file:
        like = file.convert("RGB")
    prompts = ["<lace> a red dress", "<lace> a red dress"]
    first, second = judge_all(judge, [like, Image.fromarray(noise)], prompts)
    assert first.keys() == second.keys() == {"colour", "prompt", "sharpness", "style"}
    assert first["style"] == pytest.approx(1.0)
    assert second["style"] is not None
    assert second["style"] < 0.999
    assert judge_all(judge, [like], prompts[:1]) == [first], "the same scores every time"


def test_a_base_that_finds_no_garment_judges_by_what_it_sees(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "base"
    blind.mkdir()
    for part in tiny_bundle.iterdir():
        if part.name != "segmenter":
            (blind / part.name).symlink_to(part)
    judge = Judge(blind, read_examples(write_version(tmp_path / "version")))
    (scores,) = judge_all(judge, [Image.new("RGB", (64, 64), "red")], ["a dress"])
    assert scores.keys() == {"prompt", "style"}
