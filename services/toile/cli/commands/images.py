"""`toile images` and `toile lineage`: the pictures of a project."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.tree import Tree

from toile.cli.commands.common import Session, session
from toile.cli.commands.sources import image_name, known_image
from toile.cli.names import short
from toile.cli.output import JsonFlag, size_text
from toile.core.errors import NotFoundError

app = typer.Typer(no_args_is_help=True, help="Images of the project.")

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="File or name of an image.")]


@app.command("list")
def list_images(
    most: Annotated[int, typer.Option("-n", "--most", min=1, help="Newest images to list.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List images, newest first."""
    from itertools import islice

    from toile.cli import operations
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        request = generate_pb2.ListImagesRequest(parent=s.names.project)
        pages = operations.pages(s.clients.generate.ListImages, request, "images")
        images = list(islice(pages, most))
        s.output.data([operations.as_data(image) for image in images])
        s.output.table(
            ("image", "made", "size", "bytes", "seed", "prompt"),
            [
                (
                    short(image.name),
                    f"{image.create_time.ToDatetime():%Y-%m-%d %H:%M}",
                    f"{image.width}x{image.height}",
                    size_text(image.size_bytes),
                    image.seed if image.HasField("seed") else "-",
                    image.prompt[:60],
                )
                for image in images
            ],
        )


@app.command("delete")
def delete_images(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files or names of images.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Delete images that nothing else was made from; files stay."""
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        names = [_known(s, image) for image in images]
        for name in names:
            s.clients.generate.DeleteImage(generate_pb2.DeleteImageRequest(name=name))
            s.output.say(f"{short(name)} is deleted")
        s.output.data({"deleted": names})


@app.command("link")
def link(
    image: Image,
    hours: Annotated[
        float, typer.Option(min=0.001, max=168, help="How long the link works, a week at most.")
    ] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Print a link from which anybody can read an image for a while."""
    from toile.cli import operations
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        request = generate_pb2.GetImageLinkRequest(
            name=_known(s, image), expires_seconds=max(1, round(hours * 3600))
        )
        answer = s.clients.generate.GetImageLink(request)
        s.output.data(operations.as_data(answer))
        s.output.say(escape(answer.url))


def lineage(image: Image, as_json: JsonFlag = False) -> None:
    """Follow an image back to the photographs that its style came from."""
    from toile.cli import operations
    from toile.v1 import common_pb2, generate_pb2

    with session(as_json=as_json) as s:
        request = generate_pb2.GetImageLineageRequest(name=_known(s, image))
        found = s.clients.generate.GetImageLineage(request)
        s.output.data(operations.as_data(found))
        root = Tree(f"[bold]{escape(short(found.images[0].name))}[/bold]")
        node, later = root, found.images[0]
        for earlier in found.images[1:]:
            refined = later.origin == common_pb2.IMAGE_ORIGIN_REFINED
            how = "refined" if refined else "redrawn"
            node, later = node.add(f"{how} from {escape(short(earlier.name))}"), earlier
        if found.base:
            node.add(f"base {escape(found.base)}")
        for adapter in found.adapters:
            style = node.add(
                f"adapter {escape(short(adapter.model_version))} at {adapter.weight:g}"
            )
            if adapter.imported_digest:
                style.add(f"imported from a file  {adapter.imported_digest[:12]}")
                continue
            data = style.add(
                f"dataset {escape(short(adapter.dataset_version))}  {adapter.dataset_digest[:12]}"
            )
            for photograph in adapter.photographs:
                data.add(f"{escape(photograph.file_name)}  [dim]{photograph.digest[:12]}[/dim]")
        if not s.output.as_json:
            s.output.console.print(root)


def _known(s: Session, image: str) -> str:
    """Return the name of an image that the platform has.

    Raises:
        NotFoundError: It is a file that the platform did not write, or that was changed since.
    """
    path = Path(image)
    name = known_image(s, path) if path.is_file() else image_name(s, image)
    if name is None:
        raise NotFoundError(f"the platform does not know {image}, or it was changed since")
    return name
