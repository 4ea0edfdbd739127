"""The report: one HTML page that holds all that it shows."""

import base64
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from toile.cli.loop.figures import Figures
from toile.cli.loop.report.pictures import loss_curve, losses, refinement_pictures
from toile.cli.loop.results import Design, LoopResults
from toile.cli.names import short
from toile.cli.output import duration_text, size_text

_STRIP_PHOTOGRAPHS = 10
_STRIP_PIXELS = 320
_THUMBNAIL_PIXELS = 96
_LINEAGE_PHOTOGRAPHS = 18
_QUALITY = 90


def render_report(found: LoopResults, figures: Figures) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("toile.cli.loop", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(_view(found, figures))


@dataclass(frozen=True)
class _Scale:
    """Smallest and largest value of a scorer over all designs, to draw bars with."""

    low: float
    high: float

    def share(self, value: float) -> float:
        return 1.0 if self.high <= self.low else (value - self.low) / (self.high - self.low)


def _view(found: LoopResults, figures: Figures) -> dict[str, Any]:
    config, model = found.config, found.model
    scales = _scales(found)
    before, region, _ = refinement_pictures(found)
    points = losses(found)
    return {
        "title": config.title,
        "date": f"{datetime.now(UTC):%-d %B %Y}",
        "version": metadata.version("toile"),
        "hero": [_png(design.path) for design in found.best],
        "cards": _cards(found, figures),
        "dataset": {
            "name": short(found.dataset.name),
            "trigger": found.version.trigger_word,
            "license": found.dataset.license,
            "images": found.version.image_count,
            "resolution": found.version.resolution,
            "aspect": found.version.aspect,
            "digest": found.version.digest,
            "version": short(found.version.name),
            "rejected": [(r.file_name, r.message) for r in found.version.rejected],
        },
        "photographs": _photographs(found),
        "training": {
            "model": short(model.name),
            "base": model.base,
            "facts": _training_facts(found),
            "curve": loss_curve(points, "svg").decode() if points else "",
            "files": [(f.path, size_text(f.size_bytes), f.digest[:12]) for f in model.files],
        },
        "designs": [_design(design, scales, config.rank.keep) for design in found.designs],
        "best": [_design(design, scales, config.rank.keep) for design in found.best],
        "scorers": [(weight.scorer, weight.weight) for weight in found.ranking.scorers],
        "refinement": {
            "instruction": found.refinement.instruction,
            "plan": found.refinement.plan,
            "before": _embedded(before),
            "region": _embedded(region),
            "after": _png(found.refined_path),
            "image": short(found.refinement.image.name),
        },
        "lineages": _lineages(found),
        "steps": _steps(figures),
        "targets": figures.against_targets(),
        "taken_up": figures.taken_up,
    }


def _cards(found: LoopResults, figures: Figures) -> list[tuple[str, str]]:
    cards = [
        (str(found.version.image_count), "photographs"),
        (str(len(found.designs)), "designs"),
        (duration_text(figures.total_seconds), "from folder to report"),
    ]
    if figures.peak_memory_bytes is not None:
        cards.append((size_text(figures.peak_memory_bytes), "peak memory"))
    if figures.up_seconds is not None:
        cards.append((duration_text(figures.up_seconds), "platform ready"))
    return cards


def _photographs(found: LoopResults) -> list[dict[str, str]]:
    """Return a sample of the photographs that is spread over the whole dataset."""
    items = found.items
    step = max(1, len(items) // _STRIP_PHOTOGRAPHS)
    shown = []
    for item in items[::step][:_STRIP_PHOTOGRAPHS]:
        path = found.config.dataset.folder / item.source_file_name
        if path.is_file():
            picture = _thumbnail(path, _STRIP_PIXELS)
            shown.append({"picture": picture, "caption": item.caption, "name": path.name})
    return shown


def _training_facts(found: LoopResults) -> list[tuple[str, str]]:
    model, config = found.model, found.model.config
    facts = [
        ("Steps", str(config.steps)),
        ("Images in a step", str(config.batch_size)),
        ("Rank and alpha", f"{config.rank} and {config.alpha:g}"),
        ("Learning rate", f"{config.learning_rate:g}"),
        ("Seed", str(config.seed)),
        ("Final loss", f"{model.final_loss:.4f}"),
        ("Reproduced by the server within", f"{model.reproduction_difference:g} of 255 levels"),
        ("Code", model.code_version),
    ]
    speeds = [
        event.progress.images_per_second
        for event in found.history
        if event.HasField("progress") and event.progress.HasField("images_per_second")
    ]
    if speeds:
        facts.insert(6, ("Speed", f"{sorted(speeds)[len(speeds) // 2]:.1f} images/s"))
    return facts


def _scales(found: LoopResults) -> dict[str, _Scale]:
    values: dict[str, list[float]] = {}
    for design in found.designs:
        for score in design.ranked.scores:
            values.setdefault(score.scorer, []).append(score.value)
    return {name: _Scale(min(held), max(held)) for name, held in values.items()}


def _design(design: Design, scales: dict[str, _Scale], keep: int) -> dict[str, Any]:
    request, image = design.generation.request, design.image
    facts = [
        ("Seed", str(image.seed)),
        ("Steps", str(request.steps)),
        ("Guidance", f"{request.guidance_scale:g}"),
        ("Size", f"{image.width} x {image.height}"),
        *(("Adapter", f"{short(a.model)} at {a.weight:g}") for a in request.adapters),
        ("Digest", image.digest[:12]),
    ]
    if request.HasField("refiner"):
        facts.insert(3, ("Refiner", f"{request.refiner.strength:g} of the schedule"))
    return {
        "id": short(image.name),
        "picture": _png(design.path),
        "prompt": image.prompt,
        "rank": design.ranked.rank,
        "kept": design.ranked.rank <= keep,
        "total": design.ranked.total,
        "scores": [
            {"name": s.scorer, "value": s.value, "share": scales[s.scorer].share(s.value)}
            for s in design.ranked.scores
        ],
        "facts": facts,
        "file": f"images/{design.path.name}",
    }


def _lineages(found: LoopResults) -> list[dict[str, Any]]:
    folder = found.config.dataset.folder
    names = [design.image.name for design in found.best] + [found.refinement.image.name]
    paths = {design.image.name: design.path for design in found.designs}
    paths[found.refinement.image.name] = found.refined_path
    shown = []
    for name in names:
        lineage = found.lineages[name]
        adapters = [
            {
                "model": short(adapter.model_version),
                "weight": adapter.weight,
                "dataset": short(adapter.dataset_version),
                "digest": adapter.dataset_digest[:12],
                "count": len(adapter.photographs),
                "photographs": [
                    {
                        "name": p.file_name,
                        "picture": _thumbnail(folder / p.file_name, _THUMBNAIL_PIXELS),
                    }
                    for p in adapter.photographs[:_LINEAGE_PHOTOGRAPHS]
                    if (folder / p.file_name).is_file()
                ],
            }
            for adapter in lineage.adapters
        ]
        chain = [
            {
                "id": short(image.name),
                "producer": short(image.producer),
                "picture": _thumbnail(paths[image.name], _THUMBNAIL_PIXELS * 2)
                if image.name in paths
                else "",
            }
            for image in lineage.images
        ]
        shown.append({"chain": chain, "base": lineage.base, "adapters": adapters})
    return shown


def _steps(figures: Figures) -> list[dict[str, Any]]:
    """Return the steps with their share of the time; the prompts' generations are one."""
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    if figures.up_seconds is not None:
        seconds["start"] = figures.up_seconds
    for step in figures.steps:
        name = step.name.partition("-")[0]
        seconds[name] = seconds.get(name, 0.0) + step.seconds
        memory[name] = max(memory.get(name, 0), step.peak_memory_bytes)
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {
            "name": name,
            "time": duration_text(taken),
            "share": taken / longest,
            "memory": size_text(memory[name]) if memory.get(name) else "-",
        }
        for name, taken in seconds.items()
    ]


def _png(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _embedded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@lru_cache(maxsize=512)
def _thumbnail(path: Path, side: int) -> str:
    """Return a square JPEG of a picture; nothing when it cannot be read."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except OSError:
        return ""
    square = ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
