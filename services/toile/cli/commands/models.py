"""`toile models …`: what training made."""

from pathlib import Path
from typing import Annotated

import typer

from toile.cli.commands.common import session
from toile.cli.names import short
from toile.cli.output import JsonFlag, size_text
from toile.core.errors import DataLossError
from toile.core.names import ModelVersionName

app = typer.Typer(no_args_is_help=True, help="List and export trained models.")
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="NAME or NAME/VERSION.")]


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
            ("model", "newest version", "since"),
            [
                (short(m.name), short(m.latest_version), f"{m.create_time.ToDatetime():%Y-%m-%d}")
                for m in models
            ],
        )


@app.command()
def show(model: ModelArgument, as_json: JsonFlag = False) -> None:
    """Show a version of a model with its lineage."""
    from toile.cli.operations import as_data, model_version

    with session(as_json=as_json) as s:
        version = model_version(s.clients, s.names.model(model))
        s.output.data(as_data(version))
        s.output.table(
            ("", ""),
            [
                ("model", short(version.name)),
                ("adapter", version.adapter_type),
                ("base", version.base),
                ("dataset", f"{short(version.dataset_version)}  {version.dataset_digest[:12]}"),
                ("trigger word", version.trigger_word),
                ("final loss", f"{version.final_loss:.4f}"),
                ("reproduces within", f"{version.reproduction_difference:g} levels"),
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
