"""Trainings that a file describes."""

from pathlib import Path

import pytest
import yaml

from servers.fake_services import World
from toile.cli.training_job import load_job
from toile.core.errors import InvalidArgumentError, NotFoundError

JOBS = Path(__file__).parents[3] / "training-jobs"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("model: style\ndataset: lace/2\nlora:\n  rank: 8\n  learning_rate: 1e-3\n")
    return path


@pytest.fixture
def lace(cli, world: World, photographs: Path) -> None:
    given = ("--name", "lace", "--trigger", "<lace>")
    assert cli("dataset", "import", photographs, *given).exit_code == 0
    assert cli("dataset", "build", "lace").exit_code == 0


@pytest.mark.usefixtures("lace")
def test_what_the_file_says_is_sent_and_followed(cli, world: World, job: Path) -> None:
    result = cli("train", "--job", job)
    assert result.exit_code == 0, result.stderr
    sent = world.trainings[-1]
    assert sent.model_id == "style"
    assert sent.dataset == "projects/default/datasets/lace/versions/2"
    assert sent.base == ""
    # Alpha is the rank's, and what the file does not say is the service's to fill in.
    said = {field.name: value for field, value in sent.lora.ListFields()}
    assert said == {"rank": 8, "alpha": 8.0, "learning_rate": 1e-3}
    assert "Model style/1: final loss" in result.stdout
    assert "--adapter style" in result.stdout


@pytest.mark.usefixtures("lace")
def test_a_job_can_be_left_alone(cli, world: World, job: Path) -> None:
    started = cli.json("train", "--job", job, "--detach")
    assert started["target"] == "projects/default/models/style/versions/1"


@pytest.mark.usefixtures("lace")
def test_a_controlnet_is_a_recipe_too(cli, world: World, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: lines\ndataset: lace\ncontrolnet:\n  control_kind: parts\n  steps: 9\n")
    result = cli("train", "--job", path)
    assert result.exit_code == 0, result.stderr
    sent = world.trainings[-1]
    assert sent.WhichOneof("recipe") == "controlnet"
    said = {field.name: value for field, value in sent.controlnet.ListFields()}
    assert said == {"control_kind": "parts", "steps": 9}
    assert "Model lines/1: final loss" in result.stdout
    assert "--adapter" not in result.stdout
    assert "controlnet" in cli("models", "show", "lines/1").stdout


@pytest.mark.parametrize("recipe", ["lora-lace", "controlnet-edges-lace"])
def test_the_samples_are_sound_and_say_no_more_than_there_is(recipe: str) -> None:
    sample = JOBS / f"{recipe}.yaml"
    loaded = load_job(sample)
    config = loaded.lora or loaded.controlnet
    assert config is not None
    assert recipe.startswith(f"{config.RECIPE}-")
    assert config.early_stopping_patience == 3
    lines = sample.read_text().splitlines()
    known = set(type(config).model_fields)
    shown = {line.strip("# ").split(":")[0] for line in lines if line.startswith("  ")}
    assert shown == known, "the sample shows every field of the recipe"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"lora": {"rank": 65}}, ["job.yaml:3: lora.rank: ", "less than or equal to 64"]),
        (
            {"lora": {"optimizer": "sgd"}},
            ["lora.optimizer: ", "'adamw8bit', 'adafactor' or 'prodigy'"],
        ),
        ({"lora": {"learning_rate": 1}}, ["job.yaml:3: lora.learning_rate: ", "equal to 0.1"]),
        ({"lora": {"epochs": 3}}, ["lora.epochs: there is no such field", "steps, batch_size"]),
        ({"lora": None}, ["job.yaml:2: lora: must be a mapping"]),
        ({"dataset": "La ce"}, ["dataset: must be a dataset, such as lace, or a version"]),
        ({"base": "tiny"}, ["base: must be a base, such as bases/sdxl"]),
        ({"model": "Lace"}, ["job.yaml:3: model: must be 1 to 63 lower-case"]),
        ({"lora": {"rank": 0, "steps": 0}}, ["lora.rank: ", "lora.steps: "]),
        ({"lora": {"early_stopping_patience": 1}}, ["needs a validation_share above 0"]),
        ({"lora": {"publish_weights": "best_samples"}}, ["needs a sample_interval_steps above 0"]),
        ({"controlnet": {"control_kind": "depth"}}, ["controlnet.control_kind: ", "'edges', "]),
        ({"controlnet": {"rank": 4}}, ["controlnet.rank: there is no such field", "control_kind"]),
        ({"lora": {"mixed_precision": True}}, ["lora.mixed_precision: ", "'fp16' or 'no'"]),
        ({"controlnet": None}, ["job.yaml:1: controlnet: must be a mapping"]),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(
    cli, tmp_path: Path, change: dict[str, object], messages: list[str]
) -> None:
    """There is no platform here, which would be the error if one were asked."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": "lace", "dataset": "lace", "lora": {}, **change}))
    result = cli("train", "--job", path)
    assert result.exit_code == 1
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the whole file: must be a mapping; there are model, dataset, base, budget, lora"),
        ("model: [", "is not YAML"),
        ("dataset: lace\nlora: {}", "model: is missing: Name of the model"),
        ("model: lace\ndataset: lace", "the whole file: needs one recipe: lora or controlnet"),
        (
            "model: lace\ndataset: lace\nlora: {}\ncontrolnet: {}",
            "the whole file: needs one recipe: lora or controlnet",
        ),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        load_job(path)
    assert message in caught.value.message
    assert caught.value.reason == "BAD_JOB"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no job file"):
        load_job(tmp_path / "none.yaml")


def test_a_file_and_a_recipe_exclude_each_other(cli, job: Path) -> None:
    both = cli("train", "--job", job, "lora", "--dataset", "lace", "--name", "lace")
    neither = cli("train", "--detach")
    assert (both.exit_code, neither.exit_code) == (2, 2)
