"""`toile generate` and `toile lineage`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.tree import Tree

from toile.cli.commands.common import session
from toile.cli.names import short
from toile.cli.output import JsonFlag
from toile.core.errors import InvalidArgumentError, NotFoundError


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Images.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image; random if not given.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME, NAME/VERSION or NAME:WEIGHT; may be repeated."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    steps: Annotated[int, typer.Option(min=0, help="Denoising steps; 20 if 0.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Strength of the prompt.")] = None,
    width: Annotated[int, typer.Option(min=0, help="Pixels; the base's own if 0.")] = 0,
    height: Annotated[int, typer.Option(min=0, help="Pixels; the base's own if 0.")] = 0,
    scheduler: Annotated[str, typer.Option(help="Sampler, by diffusers' class name.")] = "",
    base: Annotated[str, typer.Option(help="Base model; the platform's own if empty.")] = "",
    refiner: Annotated[bool, typer.Option("--refiner", help="Add the refiner stage.")] = False,
    refiner_strength: Annotated[
        float | None, typer.Option(help="Share of the schedule that the refiner redraws.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("designs"),
    as_json: JsonFlag = False,
) -> None:
    """Make images from a prompt and write them as PNG files with their metadata."""
    from toile.cli import operations
    from toile.cli.watching import bar
    from toile.v1 import common_pb2, generate_pb2

    if count < 1:
        raise InvalidArgumentError("count must be at least 1", field="count")
    with session(as_json=as_json) as s:
        adapters = [s.names.adapter(text) for text in adapter or ()]
        stage = None
        if refiner or refiner_strength is not None:
            stage = generate_pb2.RefinerStage(strength=refiner_strength)
        request = generate_pb2.GenerateRequest(
            parent=s.names.project,
            prompt=prompt,
            negative_prompt=negative,
            count=count,
            seed=seed,
            steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            adapters=[common_pb2.AdapterWeight(model=m, weight=w) for m, w in adapters],
            base=base,
            scheduler=scheduler,
            refiner=stage,
        )
        written: list[Path] = []
        number = _last_number(out)
        with bar(s.output, "generate", None) as line:

            def show(event: generate_pb2.GenerateResponse) -> None:
                if event.HasField("step"):
                    line.show_step(len(written), count, event.step)
                elif event.HasField("image"):
                    path = out / f"{number + len(written) + 1:04d}.png"
                    operations.download_image(s.clients, event.image, path)
                    written.append(path)

            generation = operations.generate(s.clients, request, show)
        s.output.data({**operations.as_data(generation), "files": [str(p) for p in written]})
        for image, path in zip(generation.images, written, strict=False):
            s.output.say(f"{escape(str(path))}  [dim]seed {image.seed}[/dim]")


def lineage(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File or name of an image.")],
    as_json: JsonFlag = False,
) -> None:
    """Follow an image back to the photographs that its style came from."""
    from toile.cli import operations
    from toile.cli.commands.sources import image_name, known_image
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        path = Path(image)
        name = known_image(s, path) if path.is_file() else image_name(s, image)
        if name is None:
            raise NotFoundError(f"the platform does not know {image}, or it was changed since")
        request = generate_pb2.GetImageLineageRequest(name=name)
        found = s.clients.generate.GetImageLineage(request)
        s.output.data(operations.as_data(found))
        root = Tree(f"[bold]{escape(short(found.images[0].name))}[/bold]")
        node = root
        for earlier in found.images[1:]:
            node = node.add(f"refined from {escape(short(earlier.name))}")
        if found.base:
            node.add(f"base {escape(found.base)}")
        for adapter in found.adapters:
            style = node.add(
                f"adapter {escape(short(adapter.model_version))} at {adapter.weight:g}"
            )
            data = style.add(
                f"dataset {escape(short(adapter.dataset_version))}  {adapter.dataset_digest[:12]}"
            )
            for photograph in adapter.photographs:
                data.add(f"{escape(photograph.file_name)}  [dim]{photograph.digest[:12]}[/dim]")
        if not s.output.as_json:
            s.output.console.print(root)


def _last_number(folder: Path) -> int:
    """Return the highest number of an image in a folder, so that none is overwritten."""
    numbers = [int(p.stem) for p in folder.glob("[0-9][0-9][0-9][0-9].png") if p.stem.isdecimal()]
    return max(numbers, default=0)
