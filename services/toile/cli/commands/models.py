"""`toile models …`: what training made, and what was imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toile.cli.commands.common import Session, session
from toile.cli.commands.compare import compare, metric_rows
from toile.cli.commands.jobs import cost_text
from toile.cli.names import short
from toile.cli.output import JsonFlag, size_text
from toile.core.context import new_id
from toile.core.errors import DataLossError, InvalidArgumentError
from toile.core.names import ModelAliasName, ModelName, ModelVersionName, check_id

if TYPE_CHECKING:
    from toile.v1 import train_pb2

app = typer.Typer(no_args_is_help=True, help="List, compare, export, promote and delete models.")
app.command()(compare)
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME, NAME/VERSION or NAME@ALIAS.")
]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="NAME/VERSION.")]


@app.command("list")
def list_models(as_json: JsonFlag = False) -> None:
    """List the models of the project."""
    from toile.cli.operations import as_data, pages
    from toile.v1 import train_pb2

    with session(as_json=as_json) as s:
        request = train_pb2.ListModelsRequest(parent=s.names.project)
        models = list(pages(s.clients.train.ListModels, request, "models"))
        s.output.data([as_data(m) for m in models])
        s.output.table(
            ("model", "newest version", "aliases", "since", "trainings took"),
            [
                (
                    short(m.name),
                    short(m.latest_version) if m.latest_version else "all deprecated",
                    ", ".join(f"{_alias(a.name)} = {short(a.version)}" for a in m.aliases),
                    f"{m.create_time.ToDatetime():%Y-%m-%d}",
                    cost_text(m.cost),
                )
                for m in models
            ],
        )


@app.command()
def versions(
    model: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")],
    as_json: JsonFlag = False,
) -> None:
    """List the versions of a model, newest first."""
    from toile.cli.operations import as_data, pages
    from toile.v1 import train_pb2

    with session(as_json=as_json) as s:
        request = train_pb2.ListModelVersionsRequest(parent=s.names.model(model))
        found = list(pages(s.clients.train.ListModelVersions, request, "versions"))
        s.output.data([as_data(v) for v in found])
        s.output.table(
            ("version", "type", "aliases", "from", "since", "deprecated"),
            [
                (
                    short(v.name),
                    v.adapter_type,
                    ", ".join(_alias(name) for name in v.aliases),
                    _source(v),
                    f"{v.create_time.ToDatetime():%Y-%m-%d}",
                    v.deprecation_reason,
                )
                for v in found
            ],
        )


@app.command()
def show(model: ModelArgument, as_json: JsonFlag = False) -> None:
    """Show a version of a model with its lineage."""
    from toile.cli.operations import as_data, model_version

    with session(as_json=as_json) as s:
        version = model_version(s.clients, s.names.model(model))
        s.output.data(as_data(version))
        deprecated = version.HasField("deprecate_time")
        trained = [
            ("final loss", f"{version.final_loss:.4f}"),
            *metric_rows(version.metrics),
            ("reproduces within", f"{version.reproduction_difference:g} levels"),
        ]
        s.output.table(
            ("", ""),
            [
                ("model", short(version.name)),
                *(("alias", _alias(name)) for name in version.aliases),
                *([("deprecated", version.deprecation_reason)] if deprecated else []),
                ("adapter", version.adapter_type),
                ("base", version.base),
                ("from", _source(version)),
                ("trigger word", version.trigger_word),
                *([] if version.imported_digest else trained),
                ("code", version.code_version),
                *(("file", f"{f.path}  {size_text(f.size_bytes)}") for f in version.files),
            ],
        )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    as_json: JsonFlag = False,
) -> None:
    """Write the files of a version to a folder, for use in other programs."""
    from toile.cli.operations import download_model_file, model_version

    with session(as_json=as_json) as s:
        version = model_version(s.clients, s.names.model(model))
        written = []
        for file in version.files:
            path = out / file.path
            if not path.resolve().is_relative_to(out.resolve()):
                raise DataLossError(f"the version names a file outside its folder: {file.path}")
            download_model_file(s.clients, version.name, file, path)
            written.append(str(path))
        s.output.data({"version": version.name, "files": written})
        number = ModelVersionName.parse(version.name).version
        s.output.say(f"Version {number}: {len(written)} files in {out}")


@app.command("import")
def import_model(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, help="A LoRA as .safetensors, or the folder of a ControlNet of diffusers."
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Model that it becomes a version of.")],
    base: Annotated[str, typer.Option("--base", help="Base that it is for.")] = "",
    trigger_word: Annotated[str, typer.Option(help="Word that calls its style.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Import a LoRA that was trained elsewhere, or a ControlNet.

    A LoRA is in kohya's layout or in diffusers'. A ControlNet's folder has config.json and
    diffusion_pytorch_model.safetensors.
    """
    from toile.cli.operations import as_data, import_model_version
    from toile.v1 import train_pb2

    config = ""
    if file.is_dir():
        file, config = _controlnet_files(file)
    with session(as_json=as_json) as s:
        header = train_pb2.ImportModelVersionHeader(
            parent=s.names.project,
            model_id=name,
            base=f"bases/{base}" if base and "/" not in base else base,
            trigger_word=trigger_word,
            request_id=new_id(),
            controlnet_config=config,
        )
        version = import_model_version(s.clients, header, file)
        s.output.data(as_data(version))
        s.output.say(f"{short(version.name)} is {file.name}")


def _controlnet_files(folder: Path) -> tuple[Path, str]:
    """Return the weights' file of a ControlNet's folder, and the text of its configuration."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    try:
        config = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{folder}: no config.json of a ControlNet") from error
    if not weights.is_file():
        raise InvalidArgumentError(f"{folder}: no {weights.name}")
    return weights, config


@app.command()
def promote(
    version: VersionArgument,
    alias: Annotated[str, typer.Option("--as", help="Alias to point to it, such as production.")],
    as_json: JsonFlag = False,
) -> None:
    """Point an alias of a model to a version; it is NAME@ALIAS from now on."""
    from toile.cli.operations import as_data
    from toile.v1 import train_pb2

    with session(as_json=as_json) as s:
        name = _version_name(s, version)
        pointed = ModelAliasName(name.project, name.model, check_id(alias, "alias"))
        request = train_pb2.SetModelAliasRequest(name=str(pointed), version=str(name))
        made = s.clients.train.SetModelAlias(request).alias
        s.output.data(as_data(made))
        s.output.say(f"{short(made.name)} is {short(made.version)}")


@app.command()
def deprecate(
    version: VersionArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why, for those who use it.")],
    as_json: JsonFlag = False,
) -> None:
    """Advise against a version: it still works by its name, and is never the newest."""
    from toile.cli.operations import as_data
    from toile.v1 import train_pb2

    with session(as_json=as_json) as s:
        name = _version_name(s, version)
        request = train_pb2.DeprecateModelVersionRequest(name=str(name), reason=reason)
        found = s.clients.train.DeprecateModelVersion(request).version
        s.output.data(as_data(found))
        s.output.say(f"{short(found.name)} is deprecated")


@app.command()
def delete(model: ModelArgument, as_json: JsonFlag = False) -> None:
    """Delete an alias, a version that nothing refers to, or a model without versions."""
    from toile.v1 import train_pb2

    with session(as_json=as_json) as s:
        name = s.names.model(model)
        if ModelAliasName.matches(name):
            s.clients.train.DeleteModelAlias(train_pb2.DeleteModelAliasRequest(name=name))
        elif ModelName.matches(name):
            s.clients.train.DeleteModel(train_pb2.DeleteModelRequest(name=name))
        else:
            s.clients.train.DeleteModelVersion(train_pb2.DeleteModelVersionRequest(name=name))
        s.output.data({"deleted": name})
        s.output.say(f"Deleted {short(name)}")


def _version_name(s: Session, text: str) -> ModelVersionName:
    return ModelVersionName.parse(s.names.model(text), "version")


def _alias(name: str) -> str:
    return ModelAliasName.parse(name).alias


def _source(version: "train_pb2.ModelVersion") -> str:
    """Say what a version came from."""
    if version.imported_digest:
        return f"imported  {version.imported_digest[:12]}"
    return f"{short(version.dataset_version)}  {version.dataset_digest[:12]}"
