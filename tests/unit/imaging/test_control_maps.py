"""Maps for ControlNets."""

import numpy as np

from toile.imaging.control_maps import ControlKind, edge_map, joint_map, palette, part_map
from toile.imaging.edges import canny


def test_edges_are_white_on_black() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = (200, 30, 30)
    found = edge_map(image)
    assert found.shape == (64, 64, 3)
    assert set(np.unique(found)) == {0, 255}
    assert found[:, 14:18].any()
    assert not found[24:40, 24:40].any()


def test_parts_have_the_colours_of_pascal_voc() -> None:
    labels = np.array([[0, 1, 2, 3], [4, 7, 8, 255]], np.uint8)
    assert part_map(labels).tolist() == [
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]],
        [[0, 0, 128], [128, 128, 128], [64, 0, 0], [224, 224, 192]],
    ]
    every = part_map(np.arange(256, dtype=np.uint8)[None])[0]
    assert len({tuple(colour) for colour in every.tolist()}) == 256


def test_a_palette_shows_what_the_maps_show() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(palette(ControlKind.EDGES)[canny(image)], edge_map(image))
    labels = image[..., 0]
    assert np.array_equal(palette(ControlKind.PARTS)[labels], part_map(labels))


def test_edges_lie_over_parts() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = (200, 30, 30)
    labels = np.ones((64, 64), np.uint8)
    shown = joint_map(image, labels)
    edges = canny(image) > 0
    assert (shown[edges] == 255).all()
    assert np.array_equal(shown[~edges], part_map(labels)[~edges])
    assert len(np.unique(palette(ControlKind.EDGES_PARTS), axis=0)) == 256


def test_kinds_have_names_for_folders() -> None:
    assert [kind.value for kind in ControlKind] == ["edges", "parts", "edges_parts", "given"]
