"""`toile redesign`, `toile inpaint` and `toile upscale`: pictures from a picture."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from toile.cli.commands import drawing
from toile.cli.commands.common import session
from toile.cli.commands.sources import resolve_image
from toile.cli.output import JsonFlag
from toile.core.errors import InvalidArgumentError

if TYPE_CHECKING:
    from toile.v1 import generate_pb2

Source = Annotated[str, typer.Argument(metavar="IMAGE", help="File or name of an image.")]
Prompt = Annotated[
    str, typer.Argument(metavar="[PROMPT]", help="The image's own, or its caption, if not given.")
]


class Preparation(StrEnum):
    """What is done to a region before it is drawn."""

    GREYSCALE = "greyscale"
    BLUR = "blur"
    FILL = "fill"


def redesign(
    image: Source,
    prompt: Prompt = "",
    strength: drawing.Strength = None,
    structure: Annotated[
        float | None,
        typer.Option(
            help="How far the image's edges hold, 0 to 2; with a prompt the platform's 0.7 if not "
            "given, where the base has a ControlNet for edges."
        ),
    ] = None,
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
    image_format: drawing.FormatOption = drawing.Format.PNG,
    quality: drawing.Quality = 0,
    out: drawing.Out = drawing.DESIGNS,
    as_json: JsonFlag = False,
) -> None:
    """Draw variations of an image, or redraw it by a prompt."""
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        holding = []
        if structure is not None:
            edges = generate_pb2.CONTROL_KIND_EDGES
            holding.append(generate_pb2.Control(kind=edges, scale=structure))
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
            aspect_ratio=aspect,
            adapters=drawing.adapter_weights(s, adapter),
            base=base,
            scheduler=scheduler,
            controls=holding + drawing.controls(s, control),
            redesign=generate_pb2.Redesign(image=resolve_image(s, image), strength=strength),
            **drawing.picture(
                palette=palette,
                palette_strength=palette_strength,
                image_format=image_format,
                quality=quality,
                repeat=repeat,
            ),
        )
        drawing.draw(s, request, out, keep_structure=bool(prompt.strip()))


def inpaint(
    image: Source,
    prompt: Prompt = "",
    mask: Annotated[
        str, typer.Option(help="Image of the same size, white where the drawing goes.")
    ] = "",
    expand: Annotated[
        str, typer.Option(metavar="L,T,R,B", help="Pixels to draw on beyond the edges.")
    ] = "",
    strength: drawing.Strength = None,
    blur: Annotated[
        float | None, typer.Option(help="Pixels over which the drawing fades in; 4 if not given.")
    ] = None,
    padding: Annotated[
        int | None, typer.Option(help="Draw only the region, with so many pixels around it.")
    ] = None,
    prepare: Annotated[
        Preparation | None, typer.Option(help="What is done to the region first.")
    ] = None,
    restore_colours: Annotated[
        bool, typer.Option("--restore-colours", help="Keep the region's colours.")
    ] = False,
    count: drawing.Count = 1,
    seed: drawing.Seed = None,
    adapter: drawing.Adapters = None,
    negative: drawing.Negative = "",
    steps: drawing.Steps = 0,
    guidance: drawing.Guidance = None,
    scheduler: drawing.Scheduler = "",
    base: drawing.Base = "",
    palette: drawing.Palette = "",
    palette_strength: drawing.PaletteStrength = None,
    image_format: drawing.FormatOption = drawing.Format.PNG,
    quality: drawing.Quality = 0,
    out: drawing.Out = drawing.DESIGNS,
    as_json: JsonFlag = False,
) -> None:
    """Redraw a part of an image, or draw on beyond its edges."""
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        preparation = f"INPAINT_PREPARATION_{prepare.name if prepare else 'UNSPECIFIED'}"
        part = generate_pb2.Inpaint(
            image=resolve_image(s, image),
            mask=resolve_image(s, mask) if mask else "",
            strength=strength,
            mask_blur=blur,
            padding=padding,
            preparation=generate_pb2.InpaintPreparation.Value(preparation),
            restore_colours=restore_colours,
            expansion=_expansion(expand) if expand else None,
        )
        request = generate_pb2.GenerateRequest(
            parent=s.names.project,
            prompt=prompt,
            negative_prompt=negative,
            count=count,
            seed=seed,
            steps=steps,
            guidance_scale=guidance,
            adapters=drawing.adapter_weights(s, adapter),
            base=base,
            scheduler=scheduler,
            inpaint=part,
            **drawing.picture(
                palette=palette,
                palette_strength=palette_strength,
                image_format=image_format,
                quality=quality,
            ),
        )
        drawing.draw(s, request, out)


def upscale(
    image: Source,
    prompt: Prompt = "",
    factor: Annotated[float | None, typer.Option(help="1 to 4; 2 if not given.")] = None,
    strength: drawing.Strength = None,
    overlap: Annotated[int | None, typer.Option(help="Pixels that tiles share.")] = None,
    seed: drawing.Seed = None,
    adapter: drawing.Adapters = None,
    negative: drawing.Negative = "",
    steps: drawing.Steps = 0,
    base: drawing.Base = "",
    repeat: drawing.RepeatOption = None,
    image_format: drawing.FormatOption = drawing.Format.PNG,
    quality: drawing.Quality = 0,
    out: drawing.Out = drawing.DESIGNS,
    as_json: JsonFlag = False,
) -> None:
    """Enlarge an image and draw its detail anew, tile by tile."""
    from toile.v1 import generate_pb2

    with session(as_json=as_json) as s:
        request = generate_pb2.GenerateRequest(
            parent=s.names.project,
            prompt=prompt,
            negative_prompt=negative,
            seed=seed,
            steps=steps,
            adapters=drawing.adapter_weights(s, adapter),
            base=base,
            upscale=generate_pb2.Upscale(
                image=resolve_image(s, image), factor=factor, strength=strength, overlap=overlap
            ),
            **drawing.picture(image_format=image_format, quality=quality, repeat=repeat),
        )
        drawing.draw(s, request, out)


def _expansion(text: str) -> "generate_pb2.Expansion":
    from toile.v1 import generate_pb2

    try:
        left, top, right, bottom = (int(side) for side in text.split(","))
    except ValueError:
        raise InvalidArgumentError(
            f"--expand takes left, top, right and bottom, such as 0,0,64,0, not {text!r}",
            field="expand",
        ) from None
    return generate_pb2.Expansion(left=left, top=top, right=right, bottom=bottom)
