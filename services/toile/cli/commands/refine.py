"""`toile refine`: change an image by an instruction."""

from pathlib import Path
from typing import Annotated

import typer

from toile.cli.commands.common import session
from toile.cli.commands.sources import resolve_images
from toile.cli.output import JsonFlag


def refine(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File or name of an image.")],
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", help='What to do, such as "make it blue".')
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    strength: Annotated[
        float | None, typer.Option(help="How far the region may move, above 0 to 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; drawn at random if not given.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Denoising steps; 20 if 0.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Edit an image within the region that the instruction names."""
    from toile.cli import operations
    from toile.cli.watching import bar
    from toile.v1 import refine_pb2

    with session(as_json=as_json) as s:
        (name,) = resolve_images(s, [image])
        request = refine_pb2.RefineImageRequest(
            image=name, instruction=instruction, strength=strength, seed=seed, steps=steps
        )
        with bar(s.output, "refine", None) as line:

            def show(event: refine_pb2.RefineImageResponse) -> None:
                if event.HasField("step"):
                    line.show_step(0, 1, event.step)

            refinement = operations.refine(s.clients, request, show)
        operations.download_image(s.clients, refinement.image, out)
        s.output.data({**operations.as_data(refinement), "file": str(out)})
        plan = refinement.plan
        s.output.say(
            f"{plan.operation} of {plan.region} → {plan.value}, "
            f"{plan.region_share:.0%} of the image; written to {out}"
        )
