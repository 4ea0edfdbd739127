"""Commands that draw, and those for the images they made."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from servers.fake_services import World
from toile.v1 import common_pb2, generate_pb2


def asked(world: World) -> generate_pb2.GenerateRequest:
    """The newest request."""
    return list(world.generations.values())[-1].request


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.jpg"
    Image.new("RGB", (80, 60), (9, 120, 90)).save(path)
    return path


def test_options_of_a_picture(cli, world: World, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "cloth.txt").write_text("lace\n\n# a comment\n silk \n", encoding="utf-8")
    options = ["--aspect", "3:4", "--guidance-rescale", 0.7, "--repeat", "half-drop"]
    options += ["--palette", "navy, #f0e0c0,dark red", "--palette-strength", 0.8]
    options += ["--format", "webp", "--quality", 80, "--wildcards", lists]
    result = cli("generate", "__cloth__", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "seams 1.00" in result.stdout
    request = asked(world)
    assert (request.aspect_ratio, request.guidance_rescale) == ("3:4", 0.7)
    assert request.repeat == common_pb2.REPEAT_HALF_DROP
    assert list(request.palette.colours) == ["navy", "#f0e0c0", "dark red"]
    assert request.palette.strength == 0.8
    assert request.output.format == generate_pb2.IMAGE_FORMAT_WEBP
    assert request.output.quality == 80
    assert {k: list(v.values) for k, v in request.wildcards.items()} == {"cloth": ["lace", "silk"]}


def test_options_that_do_not_go_together(cli, world: World, photograph: Path) -> None:
    assert cli("generate", "x", "--palette-strength", 0.5).exit_code == 1
    assert cli("generate", "x", "-n", 0).exit_code == 2
    result = cli("inpaint", photograph, "x", "--expand", "1,2")
    assert "left, top, right and bottom" in result.stderr
    assert not world.generations


def test_files_are_numbered_on_from_those_of_any_format(cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "0007.webp").touch()
    (tmp_path / "0009.txt").touch()
    made = cli.json("generate", "x", "--out", tmp_path)
    assert [Path(f).name for f in made["files"]] == ["0008.png"]


def test_a_file_is_uploaded_and_redrawn(
    cli, world: World, photograph: Path, tmp_path: Path
) -> None:
    made = cli.json("redesign", photograph, "-n", 2, "--strength", 0.4, "--out", tmp_path)
    assert world.calls["UploadImage"] == 1
    request = asked(world)
    assert not request.prompt
    assert request.redesign.image in world.images
    assert request.redesign.strength == pytest.approx(0.4)
    assert [i["parent_image"] for i in made["images"]] == [request.redesign.image] * 2
    again = cli.json("redesign", made["files"][0], "in blue", "--out", tmp_path)
    assert world.calls["UploadImage"] == 1
    assert asked(world).prompt == "in blue"
    tree = cli("lineage", again["files"][0]).stdout
    assert tree.count("redrawn from") == 2


def test_a_redesign_by_a_prompt_keeps_the_structure(
    cli, world: World, photograph: Path, tmp_path: Path
) -> None:
    """How far is the platform's to say, unless an option does."""
    made = cli.json("redesign", photograph, "in blue", "--out", tmp_path)
    assert world.calls["RedesignWithPrompt"] == 1
    assert len(made["files"]) == 1
    assert not asked(world).controls
    cli.json("redesign", photograph, "in blue", "--structure", 0, "--out", tmp_path)
    (control,) = asked(world).controls
    assert control.kind == generate_pb2.CONTROL_KIND_EDGES
    assert control.HasField("scale")
    assert (control.scale, control.image) == (0.0, "")
    cli.json("redesign", photograph, "--structure", 1.2, "--out", tmp_path)
    assert world.calls["RedesignWithPrompt"] == 2
    assert [control.scale for control in asked(world).controls] == [1.2]


def test_controls_are_read_from_options(
    cli, world: World, photograph: Path, tmp_path: Path
) -> None:
    settings = "kind=map,model=lace@best,scale=0.7,start=0.1,end=0.8"
    options = ["--control", photograph, "--control", f"{photograph},{settings}"]
    cli.json("generate", "a dress", *options, "--out", tmp_path / "out")
    edges, own = asked(world).controls
    assert edges.image in world.images
    assert not edges.HasField("scale")
    assert not edges.model
    assert own.kind == generate_pb2.CONTROL_KIND_MAP
    assert own.model.endswith("/models/lace@best")
    assert (own.scale, own.start, own.end) == (0.7, 0.1, 0.8)


@pytest.mark.parametrize("setting", ["kind=depth", "scale=much", "weight=1"])
def test_a_control_that_cannot_be_read_is_told(
    cli, world: World, photograph: Path, setting: str
) -> None:
    result = cli("generate", "a dress", "--control", f"{photograph},{setting}")
    assert result.exit_code == 1
    assert "a control is IMAGE" in result.stderr
    assert not world.calls["UploadImage"]
    assert not world.generations


def test_a_folder_is_no_image(cli, world: World, photographs: Path) -> None:
    commands = (("redesign", photographs), ("generate", "a dress", "--control", photographs))
    for command in commands:
        result = cli(*command)
        assert result.exit_code == 1
        assert "is a folder" in result.stderr
    assert not world.generations


def test_a_part_is_drawn_within_a_mask(cli, world: World, photograph: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (80, 60), 255).save(mask)
    options = ["--mask", mask, "--blur", 8, "--padding", 16, "--prepare", "fill"]
    options += ["--restore-colours", "--expand", "1,2,3,4", "--strength", 0.9]
    cli.json("inpaint", photograph, "a collar", *options, "--out", tmp_path / "out")
    assert world.calls["UploadImage"] == 2
    part = asked(world).inpaint
    assert part.image != part.mask
    assert (part.mask_blur, part.padding, part.restore_colours) == (8, 16, True)
    assert part.strength == pytest.approx(0.9)
    assert part.preparation == generate_pb2.INPAINT_PREPARATION_FILL
    sides = part.expansion
    assert (sides.left, sides.top, sides.right, sides.bottom) == (1, 2, 3, 4)
    cli.json("inpaint", photograph, "--expand", "0,0,8,0", "--out", tmp_path / "out")
    assert not asked(world).inpaint.mask
    assert not asked(world).inpaint.HasField("padding")


def test_an_image_is_enlarged(cli, world: World, photograph: Path, tmp_path: Path) -> None:
    options = ["--factor", 3, "--overlap", 16, "--repeat", "brick"]
    cli.json("upscale", photograph, *options, "--out", tmp_path)
    request = asked(world)
    assert request.repeat == common_pb2.REPEAT_BRICK
    assert (request.upscale.factor, request.upscale.overlap) == (3, 16)
    assert not request.upscale.HasField("strength")


def rows_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_of_prompts_is_drawn_row_by_row(cli, world: World, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.json", tmp_path / "out"
    file.write_text(json.dumps(["a dress", "a coat"]), encoding="utf-8")
    told: Any = cli.json("batch", file, "--steps", 4, "--out", out)
    assert [row["row"] for row in told] == [0, 1]
    assert rows_of(out) == ["0000-00.png", "0001-00.png"]
    request = world.batches[0]
    assert request.format == generate_pb2.PROMPT_FILE_FORMAT_JSON
    assert request.defaults.steps == 4

    cli.json("batch", file, "--steps", 4, "--out", out)
    cli.json("batch", file, "--steps", 4, "--out", tmp_path / "other")
    ids = [batch.defaults.request_id for batch in world.batches]
    assert ids[0] == ids[1] != ids[2]


def test_rows_that_fail_are_told_and_the_others_drawn(cli, world: World, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.json", tmp_path / "out"
    file.write_text(json.dumps(["a dress", "", "a coat"]), encoding="utf-8")
    result = cli("batch", file, "--out", out)
    assert result.exit_code == 1
    assert "2 of 3 rows" in result.stdout
    assert "row 1" in result.stderr
    assert rows_of(out) == ["0000-00.png", "0002-00.png"]
    other = tmp_path / "prompts.txt"
    other.write_text("a dress")
    assert "must end in .json, .csv or .yaml" in cli("batch", other).stderr


def test_images_are_listed_linked_and_deleted(cli, world: World, tmp_path: Path) -> None:
    made = cli.json("generate", "a dress", "-n", 3, "--out", tmp_path)
    names = [image["name"] for image in made["images"]]
    listed = cli.json("images", "list", "-n", 2)
    assert [image["name"] for image in listed] == [names[2], names[1]]
    assert "a dress" in cli("images", "list").stdout
    link = cli("images", "link", made["files"][0], "--hours", 2)
    assert link.stdout.strip() == f"https://store/{names[0]}?for=7200"
    cli.json("redesign", names[0], "--out", tmp_path)
    kept = cli("images", "delete", names[0])
    assert kept.exit_code == 1
    assert "is kept" in kept.stderr
    short = names[1].rpartition("/")[2]
    assert cli.json("images", "delete", short, made["files"][2]) == {"deleted": names[1:]}
    assert Path(made["files"][2]).is_file()
    unknown = tmp_path / "unknown.png"
    Image.new("RGB", (8, 8)).save(unknown)
    assert cli("images", "delete", unknown).exit_code == 1
