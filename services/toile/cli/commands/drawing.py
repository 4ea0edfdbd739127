"""What all commands that draw share: their options, the request, the files they write."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from toile.cli.commands.common import Session
from toile.cli.commands.sources import resolve_image
from toile.core.errors import InvalidArgumentError

if TYPE_CHECKING:
    from toile.v1 import common_pb2, generate_pb2

_PICTURE, _OUTPUT = "Picture", "Output"
_SUFFIXES = {"image/png": ".png", "image/webp": ".webp", "image/jpeg": ".jpg"}


class Repeat(StrEnum):
    """Lattices of a repeat."""

    STRAIGHT = "straight"
    HALF_DROP = "half-drop"
    BRICK = "brick"


class Format(StrEnum):
    """Formats of image files."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


Count = Annotated[int, typer.Option("-n", "--count", min=1, help="Images.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image; random if not given.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="NAME, NAME/VERSION or NAME:WEIGHT; may be repeated."),
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="IMAGE[,KEY=VALUE...]",
        help="Hold the structure of an image (file or name). kind: edges, parts, edges_parts or "
        "map; model: a ControlNet, the base's own if not given; scale: 0 to 2; start, end: shares "
        "of the noise schedule. May be repeated.",
        rich_help_panel=_PICTURE,
    ),
]
Negative = Annotated[str, typer.Option(help="What to avoid.")]
Steps = Annotated[int, typer.Option(min=0, help="Denoising steps; 20 if 0.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of the prompt.")]
Rescale = Annotated[
    float,
    typer.Option(
        "--guidance-rescale", help="Against burnt colours, 0 to 1.", rich_help_panel=_PICTURE
    ),
]
Scheduler = Annotated[str, typer.Option(help="Sampler, by diffusers' class name.")]
Base = Annotated[str, typer.Option(help="Base model; the platform's own if empty.")]
Strength = Annotated[float | None, typer.Option(help="Share of the schedule to redraw, to 1.")]
Width = Annotated[
    int, typer.Option(min=0, help="Pixels; the base's own if 0.", rich_help_panel=_PICTURE)
]
Height = Annotated[
    int, typer.Option(min=0, help="Pixels; the base's own if 0.", rich_help_panel=_PICTURE)
]
Aspect = Annotated[
    str, typer.Option(help="Such as 3:4, instead of width and height.", rich_help_panel=_PICTURE)
]
RepeatOption = Annotated[
    Repeat | None, typer.Option(help="Draw a tile that repeats.", rich_help_panel=_PICTURE)
]
Palette = Annotated[
    str,
    typer.Option(help="Colours to hold to: navy,#f0e0c0,dark red.", rich_help_panel=_PICTURE),
]
PaletteStrength = Annotated[
    float | None, typer.Option(help="How far, above 0 to 1.", rich_help_panel=_PICTURE)
]
Wildcards = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder of NAME.txt, a value a line, for __NAME__ in the prompt.",
        rich_help_panel=_PICTURE,
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Of the files.", rich_help_panel=_OUTPUT)
]
Quality = Annotated[
    int, typer.Option(min=0, help="1 to 100; 90 if 0; PNG has none.", rich_help_panel=_OUTPUT)
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write to.", rich_help_panel=_OUTPUT)
]

DESIGNS = Path("designs")


def adapter_weights(s: Session, texts: list[str] | None) -> "list[common_pb2.AdapterWeight]":
    """Read `--adapter` options."""
    from toile.v1 import common_pb2

    pairs = [s.names.adapter(text) for text in texts or ()]
    return [common_pb2.AdapterWeight(model=model, weight=weight) for model, weight in pairs]


def controls(s: Session, texts: list[str] | None) -> "list[generate_pb2.Control]":
    """Read `--control` options, such as `sketch.png,kind=map,model=lace-edges,scale=0.7`.

    Raises:
        InvalidArgumentError: One cannot be read.
    """
    return [_control(s, text) for text in texts or ()]


def _control(s: Session, text: str) -> "generate_pb2.Control":
    from toile.v1 import generate_pb2

    image, *settings = re.split(r",(?=\w+=)", text)
    control = generate_pb2.Control()
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            if key == "model":
                control.model = s.names.model(value)
            elif key == "kind":
                control.kind = generate_pb2.ControlKind.Value(f"CONTROL_KIND_{value.upper()}")
            elif key in ("scale", "start", "end"):
                setattr(control, key, float(value))
            else:
                raise ValueError
        except ValueError:
            raise InvalidArgumentError(
                "a control is IMAGE, with kind=edges, parts, edges_parts or map, model=NAME, "
                "scale, start or end behind it, such as sketch.png,kind=map,scale=0.7, not "
                f"{text!r}",
                field="control",
            ) from None
    control.image = resolve_image(s, image)
    return control


def picture(
    *,
    palette: str = "",
    palette_strength: float | None = None,
    image_format: Format = Format.PNG,
    quality: int = 0,
    repeat: Repeat | None = None,
    wildcards: Path | None = None,
) -> dict[str, Any]:
    """Return fields of a request by what the options of the same names say.

    Raises:
        InvalidArgumentError: Options do not go together.
    """
    from toile.v1 import common_pb2, generate_pb2

    fields: dict[str, Any] = {
        "output": generate_pb2.Output(
            format=generate_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image_format.name}"),
            quality=quality,
        )
    }
    if palette:
        colours = [colour.strip() for colour in palette.split(",")]
        fields["palette"] = generate_pb2.Palette(colours=colours, strength=palette_strength)
    elif palette_strength is not None:
        raise InvalidArgumentError("--palette-strength needs a --palette", field="palette")
    if repeat is not None:
        fields["repeat"] = common_pb2.Repeat.Value(f"REPEAT_{repeat.name}")
    if wildcards is not None:
        fields["wildcards"] = {
            name: generate_pb2.Wildcard(values=values)
            for name, values in read_wildcards(wildcards).items()
        }
    return fields


def read_wildcards(folder: Path) -> Mapping[str, list[str]]:
    """Read lists, one a file; empty lines and those that begin with # say nothing."""
    lists: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.txt")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lists[path.stem] = [line for line in lines if line and not line.startswith("#")]
    return lists


def draw(
    s: Session, request: "generate_pb2.GenerateRequest", out: Path, *, keep_structure: bool = False
) -> None:
    """Draw a request's images, write each as it comes, and say what was written.

    With `keep_structure` a redesign keeps its source's structure as `RedesignWithPrompt` does.
    """
    from toile.cli import operations
    from toile.cli.watching import bar

    written: list[Path] = []
    number, count = last_number(out), request.count or 1
    with bar(s.output, "generate", None) as line:

        def show(event: "generate_pb2.GenerateResponse") -> None:
            if event.HasField("step"):
                line.show_step(len(written), count, event.step)
            elif event.HasField("image"):
                path = out / f"{number + len(written) + 1:04d}{suffix_of(event.image)}"
                operations.download_image(s.clients, event.image, path)
                written.append(path)

        ask = operations.redesign_with_prompt if keep_structure else operations.generate
        generation = ask(s.clients, request, show)
    s.output.data({**operations.as_data(generation), "files": [str(p) for p in written]})
    for image, path in zip(generation.images, written, strict=False):
        seams = f", seams {image.seam_score:.2f}" if image.HasField("seam_score") else ""
        s.output.say(f"{escape(str(path))}  [dim]seed {image.seed}{seams}[/dim]")


def suffix_of(image: "common_pb2.Image") -> str:
    """Return what an image's file is called at its end."""
    return _SUFFIXES.get(image.media_type, "")


def last_number(folder: Path) -> int:
    """Return the highest number of an image in a folder, so that none is overwritten."""
    numbers = [
        int(path.stem)
        for path in folder.glob("[0-9][0-9][0-9][0-9].*")
        if path.suffix in _SUFFIXES.values() and path.stem.isdecimal()
    ]
    return max(numbers, default=0)
