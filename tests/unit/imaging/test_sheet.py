import numpy as np
import pytest
from PIL import Image

from toile.imaging.sheet import SheetItem, contact_sheet
from unit.imaging.files import picture


def colours_in(sheet: Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(int(v) for v in c) for c in np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_every_picture_is_on_the_sheet(count: int) -> None:
    colours = [(200, 10 * i, 30) for i in range(count)]
    items = [SheetItem(Image.new("RGB", (50, 50), colour)) for colour in colours]
    sheet = contact_sheet(items, title="Lace", columns=4, cell_pixels=64)
    assert set(colours) <= colours_in(sheet)


def test_words_stay_within_their_cell() -> None:
    plain = contact_sheet([SheetItem(picture())], title="T", columns=1, cell_pixels=120)
    wordy = contact_sheet(
        [SheetItem(picture(), caption="word " * 60, note="n" * 90, badge="1", highlighted=True)],
        title="a very long title " * 9,
        subtitle="s " * 200,
        columns=1,
        cell_pixels=120,
    )
    assert wordy.width == plain.width
    margin = np.asarray(wordy)[:, -20:]
    assert (margin == margin[0, 0]).all(), "nothing is written over the edge"
    assert not np.array_equal(np.asarray(wordy)[: plain.height], np.asarray(plain))


def test_shapes_are_kept() -> None:
    wide = SheetItem(Image.new("RGB", (200, 50), (10, 200, 30)))
    sheet = np.asarray(contact_sheet([wide], title="T", columns=1, cell_pixels=100))
    rows, columns = np.nonzero((sheet == (10, 200, 30)).all(axis=2))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (100, 25)
