"""What a loop made, fetched from the services and written to the output folder."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toile.cli import operations
from toile.cli.loop.config import LoopConfig
from toile.cli.loop.figures import Figures
from toile.cli.loop.steps import Result, generated_images
from toile.cli.names import short
from toile.core.rpc.client import Clients
from toile.v1 import (
    common_pb2,
    dataset_pb2,
    generate_pb2,
    job_pb2,
    rank_pb2,
    refine_pb2,
    train_pb2,
)

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Design:
    """One generated image with its place and scores."""

    image: common_pb2.Image
    generation: generate_pb2.Generation
    ranked: rank_pb2.RankedImage
    path: Path


@dataclass(frozen=True)
class LoopResults:
    """Everything that the report shows. Designs are in the order of their ranks."""

    config: LoopConfig
    dataset: dataset_pb2.Dataset
    version: dataset_pb2.DatasetVersion
    items: list[dataset_pb2.DatasetItem]
    model: train_pb2.ModelVersion
    history: list[job_pb2.JobEvent]
    designs: list[Design]
    ranking: rank_pb2.Ranking
    refinement: refine_pb2.Refinement
    refined_path: Path
    lineages: dict[str, generate_pb2.GetImageLineageResponse]

    @property
    def best(self) -> list[Design]:
        """The designs that are kept, best first."""
        return self.designs[: self.config.rank.keep]


def collect(config: LoopConfig, clients: Clients, results: Mapping[str, Result]) -> LoopResults:
    """Fetch everything, the image files included."""
    _remove_earlier(config.out)
    ranking = clients.rank.GetRanking(
        rank_pb2.GetRankingRequest(name=results["rank"]["ranking"])
    ).ranking
    designs = _designs(config, clients, results, ranking)
    refinement = clients.refine.GetRefinement(
        refine_pb2.GetRefinementRequest(name=results["refine"]["refinement"])
    ).refinement
    refined_path = config.out / "images" / f"refined-{short(refinement.image.name)}.png"
    operations.download_image(clients, refinement.image, refined_path)
    wanted = [d.image.name for d in designs[: config.rank.keep]] + [refinement.image.name]
    lineages = {
        name: clients.generate.GetImageLineage(generate_pb2.GetImageLineageRequest(name=name))
        for name in wanted
    }
    version_name = results["build"]["version"]
    return LoopResults(
        config=config,
        dataset=clients.dataset.GetDataset(
            dataset_pb2.GetDatasetRequest(name=results["import"]["dataset"])
        ).dataset,
        version=clients.dataset.GetDatasetVersion(
            dataset_pb2.GetDatasetVersionRequest(name=version_name)
        ).version,
        items=operations.dataset_items(clients, version_name),
        model=operations.model_version(clients, results["train"]["version"]),
        history=operations.job_history(clients, results["train"]["job"]),
        designs=designs,
        ranking=ranking,
        refinement=refinement,
        refined_path=refined_path,
        lineages=lineages,
    )


def write_pictures(found: LoopResults) -> None:
    """Write the best designs, the contact sheet, the loss curve and the refinement."""
    from toile.cli.loop.report import pictures

    out = found.config.out
    for path, design in zip(_best_paths(found), found.best, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(design.path.read_bytes())
    pictures.write_contact_sheet(found, out / "contact-sheet.png")
    pictures.write_loss_curve(found, out / "loss.png")
    pictures.write_refinement(found, out / "refinement.png")


def write_report(found: LoopResults, figures: Figures) -> None:
    """Write the page, then the summary, which names all the rest."""
    from toile.cli.loop.report.page import render_report

    page = render_report(found, figures)
    (found.config.out / "report.html").write_text(page, encoding="utf-8")
    _write_summary(found, figures)


def _best_paths(found: LoopResults) -> list[Path]:
    folder = found.config.out / "best"
    return [
        folder / f"{place}-{short(design.image.name)}.png"
        for place, design in enumerate(found.best, start=1)
    ]


def _designs(
    config: LoopConfig,
    clients: Clients,
    results: Mapping[str, Result],
    ranking: rank_pb2.Ranking,
) -> list[Design]:
    ranked = {image.image: image for image in ranking.images}
    generations = [
        clients.generate.GetGeneration(
            generate_pb2.GetGenerationRequest(name=result["generation"])
        ).generation
        for key, result in results.items()
        if key.startswith("generate-")
    ]
    made = {image.name: (image, g) for g in generations for image in g.images}
    designs = []
    for number, name in enumerate(generated_images(results), start=1):
        image, generation = made[name]
        path = config.out / "images" / f"{number:02d}-{short(name)}.png"
        operations.download_image(clients, image, path)
        designs.append(Design(image, generation, ranked[name], path))
    return sorted(designs, key=lambda design: design.ranked.rank)


def _write_summary(found: LoopResults, figures: Figures) -> None:
    out = found.config.out
    summary = {
        "title": found.config.title,
        "dataset_version": found.version.name,
        "dataset_digest": found.version.digest,
        "model_version": found.model.name,
        "ranking": found.ranking.name,
        "refinement": found.refinement.name,
        "designs": [
            {
                "image": design.image.name,
                "file": design.path.relative_to(out).as_posix(),
                "prompt": design.image.prompt,
                "seed": design.image.seed,
                "rank": design.ranked.rank,
                "total": design.ranked.total,
                "scores": {score.scorer: score.value for score in design.ranked.scores},
            }
            for design in found.designs
        ],
        "best": [path.relative_to(out).as_posix() for path in _best_paths(found)],
        "refined": {
            "image": found.refinement.image.name,
            "file": found.refined_path.relative_to(out).as_posix(),
            "instruction": found.refinement.instruction,
            "plan": operations.as_data(found.refinement.plan),
        },
        "figures": figures.as_data(out),
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (out / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def _remove_earlier(out: Path) -> None:
    """Remove the images that an earlier summary names; nothing else in the folder is ours."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        summary = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))
        names = [design["file"] for design in summary["designs"]]
        names += [*summary["best"], summary["refined"]["file"]]
        for name in names:
            path = (out / name).resolve()
            if path.is_relative_to(out.resolve()):
                path.unlink(missing_ok=True)
