"""Commands against services without models, over real gRPC."""

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from servers.fake_services import World, press_ctrl_c
from toile.core.errors import UnavailableError
from toile.v1 import common_pb2, dataset_pb2


def prepare(cli, photographs: Path) -> None:
    new = ("--name", "lace", "--trigger", "<lace>")
    assert cli("dataset", "import", photographs, *new).exit_code == 0
    assert cli("dataset", "build", "lace").exit_code == 0
    assert cli("train", "lora", "--dataset", "lace", "--name", "lace").exit_code == 0


def test_without_a_platform_a_command_says_how_to_start_one(cli) -> None:
    result = cli("dataset", "list")
    assert result.exit_code == 3
    assert "no platform is running; start one with: toile up" in result.stderr
    assert "Traceback" not in result.output


def test_debug_shows_the_trace_of_an_error(cli) -> None:
    result = cli("--debug", "dataset", "list")
    assert type(result.exception).__name__ == "NoPlatformError"


def test_status_and_down_without_a_platform(cli) -> None:
    assert cli("status").exit_code == 3
    result = cli("down", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"stopped": False}


def test_importing_a_folder_sends_its_images_with_the_captions_beside_them(
    cli, world: World, photographs: Path
) -> None:
    (photographs / "broken.png").touch()
    answer = cli.json("dataset", "import", photographs, "--name", "lace", "--trigger", "<lace>")
    assert answer["imported_count"] == "6"
    assert answer["skipped"] == ["notes.md"]
    assert [r["reason"] for r in answer["rejected"]] == ["EMPTY_FILE"]
    sent = world.photographs["projects/default/datasets/lace"]
    assert sent[0][:2] == ("0.jpg", "ivory lace over burgundy")
    again = cli("dataset", "import", photographs, "--name", "lace")
    assert "0 imported, 6 already there" in again.stdout
    assert "Next: toile dataset build lace" in again.stdout


def test_what_is_said_of_photographs_is_sent_and_shown(
    cli, world: World, photographs: Path
) -> None:
    new = ("--name", "lace", "--trigger", "<lace>", "--people", "not-consented")
    assert cli("dataset", "import", photographs, *new).exit_code == 0
    assert "people: not consented" in cli("dataset", "show", "lace").stdout
    said = cli("dataset", "update", "lace", "--people", "none", "--rating", "restricted")
    assert "rating: restricted  people: no people" in said.stdout
    dataset = world.datasets["projects/default/datasets/lace"]
    assert dataset.content_rating == common_pb2.CONTENT_RATING_RESTRICTED
    assert dataset.people_consent == dataset_pb2.PEOPLE_CONSENT_NO_PEOPLE
    assert cli("dataset", "import", photographs, "--name", "lace").exit_code == 0
    assert dataset.content_rating == common_pb2.CONTENT_RATING_RESTRICTED
    assert cli("dataset", "update", "lace").exit_code == 2


def test_folders_that_cannot_be_imported(cli, world: World, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = cli("dataset", "import", empty, "--name", "lace", "--trigger", "<lace>")
    assert result.exit_code == 1
    assert "no image files are in" in result.stderr
    absent = cli("dataset", "import", tmp_path / "absent", "--name", "lace", "--trigger", "<lace>")
    assert "there is no folder" in absent.stderr
    assert world.datasets == {}


def test_a_new_dataset_needs_a_trigger_word(cli, world: World, photographs: Path) -> None:
    result = cli("dataset", "import", photographs, "--name", "lace")
    assert result.exit_code == 1
    assert "give it a trigger word" in result.stderr


def test_a_build_can_keep_the_shape_of_images(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    result = cli("dataset", "build", "lace", "--aspect", "keep")
    assert result.exit_code == 0, result.stderr
    assert list(world.aspects.values()) == ["square", "keep"]
    assert "images of about 64 x 64" in result.stdout


def test_from_photographs_to_a_refined_design(
    cli, world: World, photographs: Path, tmp_path: Path
) -> None:
    prepare(cli, photographs)
    out = tmp_path / "designs"
    made = cli.json(
        "generate", "<lace>, a dress", "-n", 3, "--seed", 7, "--adapter", "lace:0.8", "--out", out
    )
    assert [image["seed"] for image in made["images"]] == ["7", "8", "9"]
    assert [Path(f).parent for f in made["files"]] == [out] * 3
    with Image.open(made["files"][0]) as image:
        assert image.size == (64, 64)
    asked = next(iter(world.generations.values())).request.adapters[0]
    assert (asked.model, asked.weight) == ("projects/default/models/lace", 0.8)

    names = [image["name"] for image in made["images"]]
    ranking = cli.json("rank", *names, "--dataset", "lace", "--top", 2)
    assert [image["rank"] for image in ranking["images"]] == [1, 2]

    refined = tmp_path / "blue.png"
    answer = cli.json("refine", names[0], "make it blue", "--out", refined)
    assert answer["plan"]["value"] == "blue"
    assert refined.is_file()
    lineage = cli.json("lineage", answer["image"]["name"])
    assert [image["name"] for image in lineage["images"]][1] == names[0]
    assert len(lineage["adapters"][0]["photographs"]) == 6


def test_what_a_training_would_take_is_said_and_nothing_started(
    cli, world: World, photographs: Path
) -> None:
    lora = ("train", "lora", "--dataset", "lace", "--name", "lace", "--steps", 10)
    assert "nothing is known" in cli(*lora, "--estimate").stdout
    prepare(cli, photographs)
    said = cli(*lora, "--estimate").stdout
    assert "CPU 1 min 30 s, GPU 1 min" in said
    assert "1.50 EUR" in said
    assert len(world.trainings) == 1
    assert cli(*lora, "--budget", 2.5).exit_code == 0
    assert world.trainings[-1].budget == 2.5


def test_two_versions_are_compared_on_the_same_prompts_and_seeds(
    cli, world: World, photographs: Path, tmp_path: Path
) -> None:
    prepare(cli, photographs)
    assert cli("train", "lora", "--dataset", "lace", "--name", "lace").exit_code == 0
    out = tmp_path / "pages" / "comparison.png"
    two = ("--prompt", "a dress", "--prompt", "a shirt", "--seed", 5, "--out", out)
    answer = cli.json("models", "compare", "lace/1", "lace/2", *two)
    asked = [generation.request for generation in world.generations.values()]
    assert [(r.prompt, r.adapters[0].model[-1], r.seed, r.count) for r in asked] == [
        ("a dress", "1", 5, 2),
        ("a dress", "2", 5, 2),
        ("a shirt", "1", 5, 2),
        ("a shirt", "2", 5, 2),
    ]
    assert [(pair["prompt"], pair["seed"]) for pair in answer["pairs"]] == [
        ("a dress", "5"),
        ("a dress", "6"),
        ("a shirt", "5"),
        ("a shirt", "6"),
    ]
    # The services of the test place images the last first, so the second of each pair is better.
    assert answer["wins"] == [0, 4]
    one, other = answer["scores"]["total"]
    assert one < other
    with Image.open(out) as page:
        assert page.width > 4 * 192
    shown = cli("models", "compare", "lace/1", "lace/2", *two)
    assert "better of the pair" in shown.stdout
    assert "4 of 4" in shown.stdout
    assert shown.stdout.count("7 of 10") == 2, "the published steps"


def test_what_cannot_be_compared(cli, world: World, photographs: Path, tmp_path: Path) -> None:
    prepare(cli, photographs)
    nothing_to_draw = cli("models", "compare", "lace/1", "lace/1")
    assert "name some with --prompt" in nothing_to_draw.stderr
    other = world.models["projects/default/models/lace/versions/1"]
    for field, value, said in (
        ("base", "bases/other", "is for"),
        ("adapter_type", "controlnet", "draws nothing"),
    ):
        world.models["projects/default/models/other/versions/1"] = type(other)()
        changed = world.models["projects/default/models/other/versions/1"]
        changed.CopyFrom(other)
        changed.name = "projects/default/models/other/versions/1"
        setattr(changed, field, value)
        refused = cli("models", "compare", "lace/1", "other/1", "--prompt", "a dress")
        assert refused.exit_code == 1
        assert said in refused.stderr
    assert not world.generations


def test_files_are_uploaded_before_they_are_ranked_or_refined(
    cli, world: World, photographs: Path, tmp_path: Path
) -> None:
    ranking = cli.json("rank", photographs)
    assert world.calls["UploadImage"] == 6
    assert {Path(image["source"]).suffix for image in ranking["images"]} == {".jpg"}
    cli.json("refine", photographs / "0.jpg", "make it blue", "--out", tmp_path / "blue.png")
    assert world.calls["UploadImage"] == 7
    result = cli("refine", "No Such Thing", "make it blue", "--out", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "neither a file nor the name of an image" in result.stderr


def test_a_file_that_the_platform_wrote_keeps_its_lineage(
    cli, world: World, tmp_path: Path
) -> None:
    out = tmp_path / "designs"
    first = cli.json("generate", "a dress", "-n", 2, "--out", out)
    second = cli.json("generate", "a dress", "--out", out)
    names = [Path(f).name for f in first["files"] + second["files"]]
    assert names == ["0001.png", "0002.png", "0003.png"]
    refined = cli.json("refine", out / "0002.png", "make it blue", "--out", tmp_path / "blue.png")
    assert refined["source_image"] == first["images"][1]["name"]
    assert world.calls["UploadImage"] == 0
    lineage = cli.json("lineage", tmp_path / "blue.png")
    assert [i["name"] for i in lineage["images"]][1] == first["images"][1]["name"]

    with Image.open(out / "0002.png") as image:
        image.rotate(90).save(out / "0002.png")
    cli.json("rank", out / "0002.png")
    assert world.calls["UploadImage"] == 1
    assert cli("lineage", out / "0002.png").exit_code == 1


def test_training_names_what_the_service_says_is_wrong(cli, world: World) -> None:
    result = cli("train", "lora", "--dataset", "lace", "--name", "lace")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: the dataset is not built"


def test_only_what_was_given_is_sent_to_the_recipe(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    given = ("--steps", 30, "--learning-rate", 0.01)
    cli.json("train", "lora", "--dataset", "lace/1", "--name", "b", "--detach", *given)
    sent = world.trainings[-1]
    assert sent.dataset == "projects/default/datasets/lace/versions/1"
    assert {f.name: v for f, v in sent.lora.ListFields()} == {"steps": 30, "learning_rate": 0.01}


def test_a_prompt_and_adapters_that_cannot_be(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    assert cli("generate", "x" * 10_000).exit_code == 1
    assert cli("generate", "x", "--adapter", "unknown").stderr.startswith("error: there is no")
    assert cli("generate", "x", "--adapter", "lace:much").exit_code == 1


def test_jobs_are_listed_shown_and_cancelled(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    started = cli.json("train", "lora", "--dataset", "lace", "--name", "lace", "--detach")
    listed = cli.json("jobs", "list")
    assert listed[0]["name"] == started["name"]
    cancelled = cli.json("jobs", "cancel", started["name"].rpartition("/")[2])
    assert cancelled["state"] == "JOB_STATE_CANCELLED"
    watched = cli("jobs", "watch", started["name"])
    assert watched.exit_code == 1
    assert "the job was cancelled" in watched.stderr
    assert "JOB" not in cli("jobs", "show", started["name"]).stdout


def test_a_training_is_paused_and_resumed(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    started = cli.json("train", "lora", "--dataset", "lace", "--name", "lace", "--detach")
    job = started["name"].rpartition("/")[2]
    assert f"Go on with: toile jobs resume {job}" in cli("jobs", "pause", job).stdout
    assert "paused" in cli("jobs", "list").stdout
    assert f"Job {job} is queued, no. 3." in cli("jobs", "resume", job).stdout
    cli("jobs", "pause", job)
    timer = threading.Timer(0.5, setattr, (world.jobs[started["name"]], "state", 1))  # queued
    timer.start()
    watched = cli("jobs", "watch", job)
    timer.join()
    assert watched.exit_code == 0, "a pause is waited out"
    assert watched.stdout.strip().endswith(f"Job {job} succeeded: lace/2")
    assert f"toile jobs resume {job}" in " ".join(watched.stderr.split())
    refused = cli("jobs", "resume", job)
    assert refused.exit_code == 1
    assert "the job is not paused" in refused.stderr
    assert "is paused" not in cli("jobs", "watch", job).stderr, "it was, and is not any more"


def test_samples_of_a_training_are_asked_for_and_written(
    cli, world: World, photographs: Path, tmp_path: Path
) -> None:
    prepare(cli, photographs)
    started = cli.json("train", "lora", "--dataset", "lace", "--name", "lace", "--detach")
    job = started["name"].rpartition("/")[2]
    assert cli("jobs", "sample", job).stdout == f"Job {job} was asked for samples.\n"
    assert cli.json("jobs", "sample", job, "--wait")["step"] == "7"
    written = cli.json("jobs", "sample", job, "--out", tmp_path / "samples")
    assert [Path(path).name for path in written["files"]] == [
        "step-000007-00.png",
        "step-000007-01.png",
    ]
    assert Path(written["files"][1]).read_bytes() == b"sample 1 of step 7"


def test_samples_that_do_not_come(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    started = cli.json("train", "lora", "--dataset", "lace", "--name", "lace", "--detach")
    job = started["name"].rpartition("/")[2]
    world.before["WatchJob-train"] = world.sampled.clear  # it ends before it has drawn them
    ended = cli("jobs", "sample", job, "--wait")
    assert ended.exit_code == 1
    assert "the job ended before it drew them" in ended.stderr
    refused = cli("jobs", "sample", job)
    assert refused.exit_code == 1
    assert "the job does not run" in refused.stderr


def test_logs_are_written_as_they_were_printed(cli, world: World, photographs: Path) -> None:
    prepare(cli, photographs)
    whole = cli("jobs", "logs", "job-1")
    assert whole.stdout == "step 1\n[red]step 2\nstep 3\n"
    assert "Attempt 2" in whole.stderr
    assert cli("jobs", "logs", "job-1", "--tail", 1).stdout == "step 3\n"
    assert cli("jobs", "logs", "job-9").exit_code == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take Ctrl-C also where the tests run in the background, which shells start deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_watching_and_not_the_job(cli, world: World, photographs: Path) -> None:
    cli("dataset", "import", photographs, "--name", "lace", "--trigger", "<lace>")
    world.during["WatchJob-build"] = press_ctrl_c
    result = cli("dataset", "build", "lace")
    assert result.exit_code == 130
    assert "toile jobs cancel job-1" in " ".join(result.stderr.split())
    assert world.calls["CancelJob"] == 0


def test_a_model_is_exported_whole_or_not_at_all(
    cli, world: World, photographs: Path, tmp_path: Path
) -> None:
    prepare(cli, photographs)
    out = tmp_path / "export"
    answer = cli.json("models", "export", "lace", "--out", out)
    path = out / "diffusers" / "pytorch_lora_weights.safetensors"
    assert answer["files"] == [str(path)]
    assert path.read_bytes() == b"weights"
    (key,) = world.files
    world.files[key] = b"weightz"
    path.unlink()
    damaged = cli("models", "export", "lace", "--out", out)
    assert damaged.exit_code == 1
    assert "came damaged" in damaged.stderr
    assert list(path.parent.iterdir()) == []
    shown = cli.json("models", "show", "lace")
    assert shown["dataset_version"] == "projects/default/datasets/lace/versions/1"


def test_a_service_that_is_away_is_one_clear_line(cli, world: World) -> None:
    def away() -> None:
        raise UnavailableError("the models are away")

    world.before["Generate"] = away
    result = cli("generate", "a dress")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


def test_the_command_starts_without_loading_what_it_does_not_need() -> None:
    code = (
        "import sys; import toile.cli.main; "
        "print([m for m in ('torch', 'ray', 'google.protobuf', 'PIL', 'matplotlib', 'sqlalchemy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(cli) -> None:
    result = cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("toile 0.")


def test_pictures_keep_their_metadata(cli, world: World, tmp_path: Path) -> None:
    made = cli.json("generate", "a dress", "--out", tmp_path)
    _, stored = world.images[made["images"][0]["name"]]
    assert Path(made["files"][0]).read_bytes() == stored
    assert Image.open(io.BytesIO(stored)).format == "PNG"
