"""`toile generate` and `toile batch`: pictures from prompts."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from toile.cli.commands import drawing
from toile.cli.commands.common import session
from toile.cli.output import JsonFlag
from toile.core.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from toile.v1 import generate_pb2

_REFINER = "Refiner"


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    count: drawing.Count = 1,
    seed: drawing.Seed = None,
    adapter: drawing.Adapters = None,
    negative: drawing.Negative = "",
    steps: drawing.Steps = 0,
    guidance: drawing.Guidance = None,
    scheduler: drawing.Scheduler = "",
    base: drawing.Base = "",
    width: drawing.Width = 0,
    height: drawing.Height = 0,
    aspect: drawing.Aspect = "",
    control: drawing.Controls = None,
    repeat: drawing.RepeatOption = None,
    palette: drawing.Palette = "",
    palette_strength: drawing.PaletteStrength = None,
    rescale: drawing.Rescale = 0.0,
    wildcards: drawing.Wildcards = None,
    refiner: Annotated[
        bool,
        typer.Option("--refiner", help="Add the refiner stage.", rich_help_panel=_REFINER),
    ] = False,
    refiner_strength: Annotated[
        float | None,
        typer.Option(
            help="Share of the schedule that the refiner redraws.", rich_help_panel=_REFINER
        ),
    ] = None,
    image_format: drawing.FormatOption = drawing.Format.PNG,
    quality: drawing.Quality = 0,
    out: drawing.Out = drawing.DESIGNS,
    as_json: JsonFlag = False,
) -> None:
    """Make images from a prompt and write them as files with their metadata."""
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
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
            guidance_rescale=rescale,
            width=width,
            height=height,
            aspect_ratio=aspect,
            adapters=drawing.adapter_weights(s, adapter),
            base=base,
            scheduler=scheduler,
            refiner=stage,
            controls=drawing.controls(s, control),
            **drawing.picture(
                palette=palette,
                palette_strength=palette_strength,
                image_format=image_format,
                quality=quality,
                repeat=repeat,
                wildcards=wildcards,
            ),
        )
        drawing.draw(s, request, out)


def batch(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, help="Prompts: .json, .csv or .yaml."
        ),
    ],
    adapter: drawing.Adapters = None,
    negative: drawing.Negative = "",
    steps: drawing.Steps = 0,
    base: drawing.Base = "",
    wildcards: drawing.Wildcards = None,
    image_format: drawing.FormatOption = drawing.Format.PNG,
    quality: drawing.Quality = 0,
    out: drawing.Out = drawing.DESIGNS,
    as_json: JsonFlag = False,
) -> None:
    """Draw every row of a file of prompts; run again, it goes on with what is missing.

    Options are what rows do not say. Image I of row R becomes OUT/R-I; another folder gives new
    pictures.
    """
    from toile.cli import operations
    from toile.cli.watching import bar
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        defaults = generate_pb2.GenerateRequest(
            parent=s.names.project,
            negative_prompt=negative,
            steps=steps,
            adapters=drawing.adapter_weights(s, adapter),
            base=base,
            **drawing.picture(image_format=image_format, quality=quality, wildcards=wildcards),
        )
        request = generate_pb2.GenerateBatchRequest(
            file=file.read_bytes(), format=_file_format(file), defaults=defaults
        )
        request.defaults.request_id = _batch_id(request, out)
        done: dict[int, dict[str, object]] = {}
        failed: dict[int, str] = {}
        with bar(s.output, "batch", None) as line:

            def show(event: generate_pb2.GenerateBatchResponse) -> None:
                if event.HasField("error"):
                    failed[event.row] = event.error.message
                    line.advance(event.error.message)
                elif event.event.HasField("generation"):
                    generation = event.event.generation
                    files = []
                    for index, image in enumerate(generation.images):
                        path = out / f"{event.row:04d}-{index:02d}{drawing.suffix_of(image)}"
                        operations.download_image(s.clients, image, path)
                        files.append(str(path))
                    done[event.row] = {**operations.as_data(generation), "files": files}
                    line.advance()

            operations.generate_batch(s.clients, request, show)
        s.output.data(
            [
                {"row": row, "error": failed[row]} if row in failed else {"row": row, **done[row]}
                for row in sorted({*done, *failed})
            ]
        )
        s.output.say(f"{len(done)} of {len(done) + len(failed)} rows drawn into {escape(str(out))}")
        for row in sorted(failed):
            s.output.note(escape(failed[row]))
        if failed:
            raise FailedPreconditionError(f"rows that were not drawn: {len(failed)}")


def _file_format(path: Path) -> "generate_pb2.PromptFileFormat.ValueType":
    from toile.v1 import generate_pb2

    formats = {
        ".json": generate_pb2.PROMPT_FILE_FORMAT_JSON,
        ".csv": generate_pb2.PROMPT_FILE_FORMAT_CSV,
        ".yaml": generate_pb2.PROMPT_FILE_FORMAT_YAML,
        ".yml": generate_pb2.PROMPT_FILE_FORMAT_YAML,
    }
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        raise InvalidArgumentError(
            f"{path} must end in .json, .csv or .yaml", field="file"
        ) from None


def _batch_id(request: "generate_pb2.GenerateBatchRequest", out: Path) -> str:
    """Return an id that the same file with the same options gets for the same folder."""
    content = request.SerializeToString(deterministic=True) + str(out.resolve()).encode()
    return f"batch-{hashlib.sha256(content).hexdigest()[:32]}"
