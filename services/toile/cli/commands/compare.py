"""`toile models compare`: two versions on the same prompts and seeds, side by side."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from toile.cli.commands import drawing
from toile.cli.commands.common import Session, session
from toile.cli.names import short
from toile.cli.output import JsonFlag
from toile.core.adapter_types import AdapterType
from toile.core.errors import InvalidArgumentError

if TYPE_CHECKING:
    from toile.v1 import common_pb2, rank_pb2, train_pb2

_CELL_PIXELS = 192


@dataclass(frozen=True)
class _Pair:
    """What two versions drew of one prompt with one seed."""

    prompt: str
    images: "tuple[common_pb2.Image, common_pb2.Image]"


def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="NAME/VERSION or NAME@ALIAS.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="NAME/VERSION or NAME@ALIAS.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt; may be repeated. The first version's samples' if none."),
    ] = None,
    count: drawing.Count = 2,
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first image.")] = 0,
    weight: Annotated[float, typer.Option(help="Strength of both.")] = 1.0,
    steps: drawing.Steps = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path(
        "comparison.png"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Draw the same prompts and seeds with two versions, score the images, and show them in pairs.

    Scores are those of `toile rank`, with the style of the first version's dataset.
    """
    from toile.cli import operations
    from toile.cli.watching import bar
    from toile.v1 import rank_pb2

    with session(as_json=as_json) as s:
        versions = [
            operations.model_version(s.clients, s.names.model(name)) for name in (first, second)
        ]
        prompts = _checked(versions, prompt)
        with bar(s.output, "draw", 2 * len(prompts)) as line:
            pairs: list[_Pair] = []
            for text in prompts:
                drawn = []
                for version in versions:
                    drawn.append(_drawn(s, version.name, text, count, seed, weight, steps))
                    line.advance()
                pairs += [_Pair(text, images) for images in zip(*drawn, strict=True)]
        images = [image.name for pair in pairs for image in pair.images]
        request = rank_pb2.RankImagesRequest(
            parent=s.names.project, images=images, dataset=versions[0].dataset_version
        )
        with bar(s.output, "rank", len(images)) as line:
            ranking = operations.rank(s.clients, request, lambda _: line.advance())
        ranked = {image.image: image for image in ranking.images}
        names = [short(version.name) for version in versions]
        _write_picture(s, pairs, ranked, names, out)
        means, wins = _means(pairs, ranked), _wins(pairs, ranked)
        s.output.data(
            {
                "versions": [version.name for version in versions],
                "wins": wins,
                "scores": {name: list(values) for name, values in means.items()},
                "pairs": [
                    {
                        "prompt": pair.prompt,
                        "seed": str(pair.images[0].seed),  # as protobuf's JSON has them
                        "images": [operations.as_data(ranked[image.name]) for image in pair.images],
                    }
                    for pair in pairs
                ],
                "ranking": ranking.name,
                "picture": str(out),
            }
        )
        s.output.table(
            ("", *names),
            [
                ("better of the pair", *(f"{won} of {len(pairs)}" for won in wins)),
                *((name, *(f"{value:.3f}" for value in values)) for name, values in means.items()),
                *_trained_rows(versions),
            ],
        )
        s.output.say(f"{len(pairs)} pairs in {escape(str(out))}")


def metric_rows(metrics: "train_pb2.VersionMetrics") -> list[tuple[str, str]]:
    """What was measured of a version when it was trained, as rows: what it is, and how much."""
    rows: list[tuple[str, str]] = []
    if metrics.steps:
        rows.append(("published step", f"{metrics.published_step} of {metrics.steps}"))
    if metrics.HasField("validation_loss"):
        rows.append(("validation loss", f"{metrics.validation_loss:.4f}"))
    rows += [(f"samples' {k}", f"{v:.3f}") for k, v in sorted(metrics.sample_scores.items())]
    for name in ("alignment", "silhouette_overlap"):
        if metrics.HasField(name):
            held, without = getattr(metrics, name), getattr(metrics, f"{name}_without_control")
            label = name.replace("_", " ")
            rows.append((label, f"{held:.3f}, without control {without:.3f}"))
    return rows


def _trained_rows(versions: "Sequence[train_pb2.ModelVersion]") -> list[tuple[str, str, str]]:
    """The same of two versions, where either has it."""
    first, second = (dict(metric_rows(version.metrics)) for version in versions)
    return [(name, first.get(name, ""), second.get(name, "")) for name in {**first, **second}]


def _checked(versions: "Sequence[train_pb2.ModelVersion]", prompts: list[str] | None) -> list[str]:
    """Return the prompts to draw.

    Raises:
        InvalidArgumentError: The two cannot be compared, or there is no prompt.
    """
    first, second = versions
    for version, field in ((first, "first"), (second, "second")):
        if version.adapter_type != AdapterType.LORA:
            raise InvalidArgumentError(
                f"{short(version.name)} is a {version.adapter_type}, which draws nothing by itself",
                field=field,
            )
    if first.base != second.base:
        raise InvalidArgumentError(
            f"{short(first.name)} is for {first.base}, {short(second.name)} for {second.base}",
            field="second",
        )
    found = prompts or list(first.config.sample_prompts)
    if not found:
        raise InvalidArgumentError(
            f"{short(first.name)} has no sample prompts; name some with --prompt", field="prompt"
        )
    return found


def _drawn(
    s: Session, version: str, prompt: str, count: int, seed: int, weight: float, steps: int
) -> "list[common_pb2.Image]":
    from toile.cli import operations
    from toile.v1 import common_pb2, generate_pb2

    request = generate_pb2.GenerateRequest(
        parent=s.names.project,
        prompt=prompt,
        count=count,
        seed=seed,
        steps=steps,
        adapters=[common_pb2.AdapterWeight(model=version, weight=weight)],
    )
    return list(operations.generate(s.clients, request).images)


def _write_picture(
    s: Session,
    pairs: Sequence[_Pair],
    ranked: "Mapping[str, rank_pb2.RankedImage]",
    names: Sequence[str],
    out: Path,
) -> None:
    """Write the pairs on one page, the better of each highlighted."""
    from PIL import Image

    from toile.cli import operations
    from toile.imaging.sheet import SheetItem, contact_sheet

    items: list[SheetItem] = []
    with tempfile.TemporaryDirectory(prefix="toile-compare-") as folder:
        for pair in pairs:
            totals = [ranked[image.name].total for image in pair.images]
            for image, name, total in zip(pair.images, names, totals, strict=True):
                path = Path(folder) / f"{len(items)}{drawing.suffix_of(image)}"
                operations.download_image(s.clients, image, path)
                with Image.open(path) as picture:
                    pixels = picture.convert("RGB")
                items.append(
                    SheetItem(
                        pixels,
                        caption=f"{name}: {pair.prompt}",
                        note=f"seed {image.seed}, score {total:.3f}",
                        highlighted=total == max(totals) and len(set(totals)) > 1,
                    )
                )
    page = contact_sheet(
        items,
        title=" and ".join(names),
        subtitle="The same prompts and seeds; the better of each pair is framed.",
        columns=4,
        cell_pixels=_CELL_PIXELS,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)


def _wins(pairs: Sequence[_Pair], ranked: "Mapping[str, rank_pb2.RankedImage]") -> list[int]:
    """How many pairs each version is the better of; a tie is nobody's."""
    wins = [0, 0]
    for pair in pairs:
        one, two = (ranked[image.name].total for image in pair.images)
        if one != two:
            wins[one < two] += 1
    return wins


def _means(
    pairs: Sequence[_Pair], ranked: "Mapping[str, rank_pb2.RankedImage]"
) -> dict[str, tuple[float, float]]:
    """Mean of each score over the images of each version, over the pairs that both have it of."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        one, two = (ranked[image.name] for image in pair.images)
        both = [{score.scorer: score.value for score in image.scores} for image in (one, two)]
        columns.setdefault("total", []).append((one.total, two.total))
        for name in both[0].keys() & both[1].keys():
            columns.setdefault(name, []).append((both[0][name], both[1][name]))
    return {
        name: (
            statistics.fmean(one for one, _ in values),
            statistics.fmean(two for _, two in values),
        )
        for name, values in sorted(columns.items())
    }
