"""`toile rank`: score images and order them."""

from typing import TYPE_CHECKING, Annotated

import typer

from toile.cli.commands.common import session
from toile.cli.commands.sources import resolve_images
from toile.cli.output import JsonFlag
from toile.core.errors import InvalidArgumentError

if TYPE_CHECKING:
    from toile.v1 import rank_pb2


def rank(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, or names of images.")
    ],
    dataset: Annotated[str, typer.Option(help="Dataset whose style to compare with.")] = "",
    prompt: Annotated[
        str, typer.Option(help="Prompt to judge against; each image's own if empty.")
    ] = "",
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Scorer, as NAME or NAME:WEIGHT; may be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Show only the best; 0 shows all.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Score images and order them, best first. Files are uploaded first."""
    from toile.cli import operations
    from toile.cli.watching import bar
    from toile.v1 import rank_pb2

    with session(as_json=as_json) as s:
        sources = resolve_images(s, images, prompt)
        request = rank_pb2.RankImagesRequest(
            parent=s.names.project,
            images=list(sources),
            scorers=[_scorer(text) for text in scorer or ()],
            dataset=s.names.dataset_or_version(dataset) if dataset else "",
            prompt=prompt,
        )
        with bar(s.output, "rank", len(sources)) as line:
            ranking = operations.rank(s.clients, request, lambda _: line.advance())
        best = ranking.images[:top] if top else ranking.images
        data = operations.as_data(ranking)
        data["images"] = [
            {**operations.as_data(image), "source": sources.get(image.image, "")} for image in best
        ]
        s.output.data(data)
        names = sorted({score.scorer for image in best for score in image.scores})
        s.output.table(
            ("", "total", *names, "image"),
            [
                (image.rank, f"{image.total:.3f}", *_values(image, names), sources[image.image])
                for image in best
            ],
        )


def _scorer(text: str) -> "rank_pb2.ScorerWeight":
    from toile.v1 import rank_pb2

    name, colon, weight = text.partition(":")
    try:
        return rank_pb2.ScorerWeight(scorer=name, weight=float(weight) if colon else None)
    except ValueError:
        raise InvalidArgumentError(
            f"a scorer is NAME or NAME:WEIGHT, such as style:0.5, not {text!r}", field="scorer"
        ) from None


def _values(image: "rank_pb2.RankedImage", names: list[str]) -> list[str]:
    values = {score.scorer: score.value for score in image.scores}
    return [f"{values[name]:.3f}" if name in values else "-" for name in names]
