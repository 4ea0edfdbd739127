"""A dataset version's folder as the trainer reads it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from toile.core.errors import DataLossError
from toile.training.data import generator, load_image, read_examples


def test_examples_keep_their_order(tmp_path: Path) -> None:
    entries = [
        {"file_name": "images/000001.png", "text": "<lace> dress", "source_file_name": "a/b.jpg"},
        {"file_name": "images/000000.png", "text": "<lace> skirt"},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "metadata.jsonl").write_text(lines)
    first, second = read_examples(tmp_path)
    assert (first.file_name, first.caption) == ("images/000001.png", "<lace> dress")
    assert second.path == tmp_path / "images/000000.png"
    assert (first.source_name, second.source_name) == ("a/b.jpg", "images/000000.png")


@pytest.mark.parametrize("content", [None, "", "{", "[]\n", '{"text": "no file"}\n'])
def test_folder_that_is_no_version(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataLossError):
        read_examples(tmp_path)


def test_image_is_scaled_and_centred(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20), "black")
    image.paste((255, 255, 255), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png", 8)
    assert pixels.shape == (3, 8, 8)
    assert torch.equal(pixels, torch.ones(3, 8, 8))


def test_damaged_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataLossError, match=r"a\.png"):
        load_image(tmp_path / "a.png", 8)


def test_draws_depend_on_their_place_alone() -> None:
    drawn = [torch.randn(4, generator=generator(*place)) for place in [(1, 2, 3), (1, 2, 3)]]
    assert torch.equal(*drawn)
    others = [(1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3)]
    assert not any(torch.equal(drawn[0], torch.randn(4, generator=generator(*o))) for o in others)
