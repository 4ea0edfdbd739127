"""`toile dataset …`: photographs in, versions out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from toile.cli.commands import jobs
from toile.cli.commands.common import Session, session
from toile.cli.names import short
from toile.cli.output import JsonFlag
from toile.core.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from toile.v1 import dataset_pb2

app = typer.Typer(no_args_is_help=True, help="Import photographs and build dataset versions.")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the dataset.")]
_REJECTED_SHOWN = 20


class Rating(StrEnum):
    """For whom photographs are, by the API's names."""

    GENERAL = "general"
    RESTRICTED = "restricted"


class People(StrEnum):
    """Whether the people in photographs agreed, by the API's names."""

    NO_PEOPLE = "none"
    CONSENTED = "consented"
    NOT_CONSENTED = "not-consented"


RatingOption = Annotated[Rating | None, typer.Option(help="For whom the photographs are.")]
PeopleOption = Annotated[
    People | None,
    typer.Option(help="Whether people who can be recognised in them agreed to train on them."),
]


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of photographs.")],
    name: Annotated[str, typer.Option("--name", "-n", help="Dataset; made if not there.")],
    trigger: Annotated[
        str,
        typer.Option("--trigger", "-t", help='Word that calls the style, such as "<lace>".'),
    ] = "",
    license_text: Annotated[
        str, typer.Option("--license", help="Licence of the photographs.")
    ] = "",
    rating: RatingOption = None,
    people: PeopleOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Import the photographs of a folder. A .txt file beside a photograph is its caption."""
    from toile.cli.folder import read_folder
    from toile.cli.operations import as_data, ensure_dataset, import_photographs
    from toile.cli.watching import bar

    folder = read_folder(path)
    with session(as_json=as_json) as s:
        whole = s.names.dataset(name)
        if not trigger:
            _must_exist(s, whole)
        dataset = ensure_dataset(s.clients, whole, trigger_word=trigger, license_text=license_text)
        if trigger and dataset.trigger_word != trigger:
            raise InvalidArgumentError(
                f"dataset {name} exists with the trigger word {dataset.trigger_word}",
                field="trigger",
            )
        if rating or people:
            _update(s, whole, rating, people)
        with bar(s.output, "import", len(folder.photographs)) as line:
            answer = import_photographs(
                s.clients, whole, folder.photographs, lambda p: line.advance(p.name)
            )
        s.output.data({**as_data(answer), "skipped": list(folder.skipped)})
        _say_imported(s, answer, folder.skipped)
        if not answer.dataset.image_count:
            raise InvalidArgumentError(
                f"none of the {len(folder.photographs)} files can be used", field="path"
            )
        s.output.say(f"Next: toile dataset build {name}")


@app.command()
def update(
    name: NameArgument,
    rating: RatingOption = None,
    people: PeopleOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say for whom a dataset's photographs are, and whether the people in them agreed."""
    from toile.cli.operations import as_data

    if not (rating or people):
        raise typer.BadParameter("give --rating, --people, or both")
    with session(as_json=as_json) as s:
        dataset = _update(s, s.names.dataset(name), rating, people)
        s.output.data(as_data(dataset))
        s.output.say(f"{escape(short(dataset.name))}: {_rights(dataset)}")


@app.command()
def build(
    name: NameArgument,
    resolution: Annotated[
        int, typer.Option(min=0, help="Side of the crops in pixels; the base's own when 0.")
    ] = 0,
    aspect: Annotated[
        str, typer.Option(help="square: crop to squares. keep: keep images about their shape.")
    ] = "square",
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build the next version of a dataset: validated, cropped and captioned."""
    from toile.cli.operations import as_data
    from toile.v1 import dataset_pb2

    with session(as_json=as_json) as s:
        request = dataset_pb2.BuildDatasetVersionRequest(
            dataset=s.names.dataset(name), resolution=resolution, aspect=aspect
        )
        job = s.clients.dataset.BuildDatasetVersion(request).job
        if detach:
            s.output.data(as_data(job))
            s.output.say(
                f"Job {short(job.name)}. Follow it with: toile jobs watch {short(job.name)}"
            )
            return
        job = jobs.follow(s, job.name)
        version = s.clients.dataset.GetDatasetVersion(
            dataset_pb2.GetDatasetVersionRequest(name=job.target)
        ).version
        s.output.say(
            f"Version {short(version.name)}: {version.image_count} images of "
            f"{_size(version)}, digest {version.digest[:12]}"
        )
        _say_rejected(s, version.rejected)
        s.output.say(f"Next: toile train lora --dataset {name} --name {name}")


def _size(version: "dataset_pb2.DatasetVersion") -> str:
    about = "about " if version.aspect == "keep" else ""
    return f"{about}{version.resolution} x {version.resolution}"


@app.command()
def show(name: NameArgument, as_json: JsonFlag = False) -> None:
    """Show a dataset with its versions."""
    from toile.cli.operations import as_data
    from toile.v1 import dataset_pb2

    with session(as_json=as_json) as s:
        whole = s.names.dataset(name)
        dataset = s.clients.dataset.GetDataset(dataset_pb2.GetDatasetRequest(name=whole)).dataset
        versions = s.clients.dataset.ListDatasetVersions(
            dataset_pb2.ListDatasetVersionsRequest(parent=whole)
        ).versions
        s.output.data({**as_data(dataset), "versions": [as_data(v) for v in versions]})
        s.output.say(
            f"[bold]{escape(short(dataset.name))}[/bold]  trigger word "
            f"{escape(dataset.trigger_word)}  {dataset.image_count} photographs  "
            f"{escape(dataset.license)}"
        )
        s.output.say(_rights(dataset))
        s.output.table(
            ("version", "images", "side", "left out", "digest", "built"),
            [
                (
                    short(v.name),
                    v.image_count,
                    v.resolution,
                    len(v.rejected),
                    v.digest[:12],
                    f"{v.create_time.ToDatetime():%Y-%m-%d %H:%M}",
                )
                for v in versions
            ],
        )


@app.command("list")
def list_datasets(as_json: JsonFlag = False) -> None:
    """List the datasets of the project."""
    from toile.cli.operations import as_data, pages
    from toile.v1 import dataset_pb2

    with session(as_json=as_json) as s:
        request = dataset_pb2.ListDatasetsRequest(parent=s.names.project)
        datasets = list(pages(s.clients.dataset.ListDatasets, request, "datasets"))
        s.output.data([as_data(d) for d in datasets])
        s.output.table(
            ("dataset", "trigger word", "photographs", "newest version"),
            [
                (short(d.name), d.trigger_word, d.image_count, short(d.latest_version) or "-")
                for d in datasets
            ],
        )


def _update(
    s: Session, name: str, rating: Rating | None, people: People | None
) -> "dataset_pb2.Dataset":
    from toile.v1 import common_pb2, dataset_pb2

    request = dataset_pb2.UpdateDatasetRequest(name=name)
    if rating is not None:
        request.content_rating = common_pb2.ContentRating.Value(f"CONTENT_RATING_{rating.name}")
    if people is not None:
        request.people_consent = dataset_pb2.PeopleConsent.Value(f"PEOPLE_CONSENT_{people.name}")
    return s.clients.dataset.UpdateDataset(request).dataset


def _rights(dataset: "dataset_pb2.Dataset") -> str:
    """What is said of the photographs, for a person."""
    from toile.v1 import common_pb2, dataset_pb2

    rating = common_pb2.ContentRating.Name(dataset.content_rating)
    people = dataset_pb2.PeopleConsent.Name(dataset.people_consent)
    said = (rating.removeprefix("CONTENT_RATING_"), people.removeprefix("PEOPLE_CONSENT_"))
    words = [word.lower().replace("_", " ").replace("unspecified", "not said") for word in said]
    return f"rating: {words[0]}  people: {words[1]}"


def _must_exist(s: Session, name: str) -> None:
    from toile.v1 import dataset_pb2

    try:
        s.clients.dataset.GetDataset(dataset_pb2.GetDatasetRequest(name=name))
    except NotFoundError:
        raise InvalidArgumentError(
            f"dataset {short(name)} is new: give it a trigger word, such as "
            f'--trigger "<{short(name)}>"',
            field="trigger",
        ) from None


def _say_imported(s: Session, answer: Any, skipped: tuple[str, ...]) -> None:
    s.output.say(
        f"[green]{answer.imported_count} imported[/green], {answer.duplicate_count} already there, "
        f"{len(answer.rejected)} rejected; the dataset has {answer.dataset.image_count} photographs"
    )
    _say_rejected(s, answer.rejected)
    if skipped:
        s.output.say(
            f"[dim]files that are no photographs: {len(skipped)}, such as {escape(skipped[0])}[/]"
        )


def _say_rejected(s: Session, rejected: Any) -> None:
    if not rejected:
        return
    rows = [(r.file_name, r.reason, r.message) for r in rejected[:_REJECTED_SHOWN]]
    s.output.table(("rejected", "reason", ""), rows)
    if len(rejected) > _REJECTED_SHOWN:
        s.output.say(f"[dim]… and {len(rejected) - _REJECTED_SHOWN} more (--json lists all)[/dim]")
