"""The pictures beside the report: contact sheet, loss curve, before and after."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from toile.cli.loop.results import LoopResults
from toile.cli.names import short
from toile.imaging.sheet import SheetItem, contact_sheet

PAPER, INK, ACCENT, FAINT = "#faf9f6", "#22222a", "#b07e26", "#7a7874"
# A sum over the channels below this is what PNG or rounding may move, not an edit.
_CHANGED_LEVELS = 6


def write_contact_sheet(found: LoopResults, path: Path) -> None:
    """Write all designs, best first, with ranks and scores."""
    items = [
        SheetItem(
            image=Image.open(design.path).convert("RGB"),
            caption=design.image.prompt,
            note=" · ".join(
                [f"total {design.ranked.total:.2f}"]
                + [f"{score.scorer} {score.value:.2f}" for score in design.ranked.scores]
            ),
            badge=str(design.ranked.rank),
            highlighted=design.ranked.rank <= found.config.rank.keep,
        )
        for design in found.designs
    ]
    subtitle = f"{len(items)} designs by {short(found.model.name)}, best first"
    sheet = contact_sheet(items, title=found.config.title, subtitle=subtitle, columns=6)
    sheet.save(path)


def write_loss_curve(found: LoopResults, path: Path) -> None:
    """Write the loss over the steps as PNG."""
    path.write_bytes(loss_curve(losses(found), "png"))


def losses(found: LoopResults) -> list[tuple[int, float]]:
    """Return (step, loss) of the training, as its job reported them."""
    points = {
        int(event.progress.step): float(event.progress.loss)
        for event in found.history
        if event.HasField("progress") and event.progress.HasField("loss")
    }
    return sorted(points.items())


def loss_curve(points: Sequence[tuple[int, float]], kind: str) -> bytes:
    """Draw losses, which the job has smoothed, as "png" or "svg"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=160, facecolor="none", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    axes.plot(steps, values, color=ACCENT, linewidth=2.2)
    if points:
        axes.annotate(
            f"{values[-1]:.4f}",
            (steps[-1], values[-1]),
            xytext=(0, 10),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
    axes.set_xlabel("step", color=FAINT)
    axes.set_ylabel("loss", color=FAINT)
    axes.tick_params(colors=FAINT, length=0)
    axes.grid(axis="y", color="#dedad2", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#dedad2")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def write_refinement(found: LoopResults, path: Path) -> None:
    """Write before, the changed region, and after, side by side."""
    before, region, after = refinement_pictures(found)
    items = [
        SheetItem(before, caption="before"),
        SheetItem(region, caption="the region that changed"),
        SheetItem(after, caption="after"),
    ]
    plan = found.refinement.plan
    subtitle = f"{plan.operation} of {plan.region} to {plan.value}, {plan.region_share:.0%}"
    title = f"“{found.refinement.instruction}”"
    contact_sheet(items, title=title, subtitle=subtitle, columns=3, cell_pixels=384).save(path)


def refinement_pictures(
    found: LoopResults,
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return before, before with all but the changed region faded, and after."""
    source = next(d for d in found.designs if d.image.name == found.refinement.source_image)
    before = Image.open(source.path).convert("RGB")
    after = Image.open(found.refined_path).convert("RGB")
    return before, highlight(before, changed_region(before, after)), after


def changed_region(before: Image.Image, after: Image.Image) -> NDArray[np.bool_]:
    """Return which pixels differ, holes of single pixels closed. Shape [H, W]."""
    difference = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).sum(axis=2)
    mask = Image.fromarray(np.where(difference > _CHANGED_LEVELS, 255, 0).astype(np.uint8))
    closed = mask.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    return np.asarray(closed) > 127


def highlight(image: Image.Image, region: NDArray[np.bool_]) -> Image.Image:
    """Fade everything outside a region and draw its outline."""
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(axis=2, keepdims=True) * 0.25 + 250 * 0.75
    shown = np.where(region[..., None], pixels, grey)
    inside = Image.fromarray(np.where(region, 255, 0).astype(np.uint8))
    edge = np.asarray(inside.filter(ImageFilter.MaxFilter(3))) != np.asarray(inside)
    shown[edge] = (176, 126, 38)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
