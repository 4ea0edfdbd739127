"""Builds one dataset version: runs the pipeline, lays out the folder, publishes it.

    images/0001.png      square crops, or images in buckets
    edges/0001.png       their edges, white on black
    masks/0001.png       parts of the garment; values index the manifest's `mask_labels`
    conditioning/0001.png  maps that were imported with the images, cut as these are
    metadata.jsonl       a line for each image, as Hugging Face's imagefolder reads it

Numbers are places in the order of import, so a rejected photograph leaves a gap. All bytes follow
from the photographs, the settings and the base alone: equal input, equal digest.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from sqlalchemy import select

from toile.core.artifacts import Manifest, publish_folder
from toile.core.bases import resolve_base
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    PhotographRow,
)
from toile.core.content import restricted_term
from toile.core.errors import FailedPreconditionError
from toile.core.jobs.runtime import JobContext
from toile.core.names import DatasetVersionName
from toile.dataset.build.pipeline import connected, see_all
from toile.dataset.build.steps import Seen, Source
from toile.dataset.convert import Rejection
from toile.imaging.buckets import SQUARE
from toile.imaging.similarity import group_near_duplicates

_REPORT_INTERVAL_SECONDS = 0.3

CONDITIONING_FOLDER = "conditioning/"
"""Begins the imported name of a map for the image whose name follows: kohya's
`conditioning_data_dir`, inside the dataset. Extensions do not matter."""


@dataclass(frozen=True)
class Plan:
    """What is built, read from the catalog once."""

    dataset: DatasetRow
    base: BaseRow
    resolution: int
    aspect: str
    photographs: Sequence[PhotographRow]
    conditioning: Mapping[str, PhotographRow]
    """Maps, by `stem` of the name of what they are for."""

    def number(self, index: int) -> str:
        """The name of a photograph's files; names sort as numbers do."""
        return f"{index:0{max(4, len(str(len(self.photographs))))}d}"

    def map_of(self, photograph: PhotographRow) -> PhotographRow | None:
        """The map that was imported with a photograph."""
        return self.conditioning.get(stem(photograph.file_name))


@dataclass(frozen=True)
class Item:
    """An image of the version. Its fields are the columns of `metadata.jsonl`."""

    file_name: str
    text: str
    edges: str
    mask: str
    source_file_name: str
    source_digest: str
    width: int
    height: int
    caption_imported: bool
    near_duplicate_of: str = ""
    conditioning: str | None = None
    """The map that was imported with the image."""
    original_size: tuple[int, int] | None = None
    """Width and height of the photograph; of an image in a bucket alone, as the next."""
    crop_left_top: tuple[int, int] | None = None
    """Where the image lies in the photograph as it was scaled."""

    def to_json(self) -> str:
        """A line of `metadata.jsonl`."""
        columns = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(columns, ensure_ascii=False)


def build_version(job: JobContext) -> None:
    """Do the work of a dataset build.

    Raises:
        FailedPreconditionError: Not one photograph can be used (`NO_USABLE_IMAGES`).
    """
    plan = _plan(job)
    folder = job.scratch_path / f"attempt-{job.attempt}"
    try:
        seen = _run(job, plan, folder)
        rejected = [_rejection(plan, row) for row in seen if row["reason"]] + orphans(plan)
        usable = [row for row in seen if not row["reason"]]
        if not usable:
            raise FailedPreconditionError(
                f"none of the {len(seen)} photographs can be used; the first: "
                f"{rejected[0].file_name}: {rejected[0].message}",
                reason="NO_USABLE_IMAGES",
            )
        items = _items(plan, usable)
        _write_metadata(folder, items)
        job.report("publish", len(items), len(items), message=_summary(items, rejected))
        metadata = _metadata(plan, usable[0]["mask_labels"])
        manifest = publish_folder(job.store, _prefix(job), folder, metadata)
    finally:
        shutil.rmtree(job.scratch_path, ignore_errors=True)
    # Last: whoever sees the job succeed finds nothing left behind.
    _publish_rows(job, plan, items, rejected, manifest)


def _plan(job: JobContext) -> Plan:
    name = job.spec["dataset"]
    with job.catalog.reading() as session:
        photographs = session.scalars(
            select(PhotographRow)
            .where(
                PhotographRow.dataset == name,
                PhotographRow.sequence <= job.spec["last_sequence"],
            )
            .order_by(PhotographRow.sequence)
        ).all()
        images, maps = split(photographs)
        return Plan(
            dataset=session.get_one(DatasetRow, name),
            base=resolve_base(session, job.spec["base"]),
            resolution=job.spec["resolution"],
            aspect=job.spec.get("aspect", SQUARE),  # of jobs that were queued by an older release
            photographs=images,
            conditioning=maps,
        )


def _run(job: JobContext, plan: Plan, folder: Path) -> list[Seen]:
    """Run the pipeline and write the pictures as they come; return the rows in order."""
    total = len(plan.photographs)
    job.report("validate", 0, total)
    sources = [
        Source(
            index=index,
            artifact=row.artifact,
            caption=row.caption,
            conditioning=shown.artifact if (shown := plan.map_of(row)) else "",
        )
        for index, row in enumerate(plan.photographs, start=1)
    ]
    if not sources:
        return []  # maps alone were imported
    rows: list[Seen] = []
    progress = _Progress(job, total)
    with connected():
        for row in see_all(
            sources, job.settings, plan.resolution, plan.base.artifact, aspect=plan.aspect
        ):
            job.check()
            _write_pictures(folder, plan.number(row["index"]), row)
            lighter = {"image": b"", "edges": b"", "mask": b"", "conditioning_image": b""}
            rows.append(cast("Seen", {**row, **lighter}))
            progress.done(len(rows))
    return sorted(rows, key=lambda row: row["index"])


class _Progress:
    """Reports each image, but not many times a second."""

    def __init__(self, job: JobContext, total: int) -> None:
        self._job = job
        self._total = total
        self._first = 0.0  # monotonic time of the first image: what comes before is start-up
        self._reported = 0.0

    def done(self, count: int) -> None:
        now = time.monotonic()
        self._first = self._first or now
        if now - self._reported < _REPORT_INTERVAL_SECONDS and count < self._total:
            return
        self._reported, elapsed = now, now - self._first
        rate = (count - 1) / elapsed if elapsed > 0 else 0.0
        left = {"seconds_left": (self._total - count) / rate} if rate else {}
        speed = {"images_per_second": rate} if rate else {}
        self._job.report("caption", count, self._total, **speed, **left)


def _write_pictures(folder: Path, number: str, row: Seen) -> None:
    if row["reason"]:
        return
    pictures = {
        "images": row["image"],
        "edges": row["edges"],
        "masks": row["mask"],
        "conditioning": row["conditioning_image"],
    }
    for kind, data in pictures.items():
        if not data:
            continue  # few images come with a map
        path = folder / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _items(plan: Plan, rows: Sequence[Seen]) -> list[Item]:
    numbers = [plan.number(row["index"]) for row in rows]
    original_by_place = {
        place: f"images/{numbers[group[0]]}.png"
        for group in group_near_duplicates([row["perceptual_hash"] for row in rows])
        for place in group[1:]
    }
    items = []
    for place, (number, row) in enumerate(zip(numbers, rows, strict=True)):
        photograph = plan.photographs[row["index"] - 1]
        items.append(
            Item(
                file_name=f"images/{number}.png",
                text=with_trigger(plan.dataset.trigger_word, row["caption"] or row["described"]),
                edges=f"edges/{number}.png",
                mask=f"masks/{number}.png",
                source_file_name=photograph.file_name,
                source_digest=photograph.digest,
                width=int(row["width"]),
                height=int(row["height"]),
                caption_imported=bool(row["caption"]),
                near_duplicate_of=original_by_place.get(place, ""),
                conditioning=f"conditioning/{number}.png" if plan.map_of(photograph) else None,
                **_frame(plan, row),
            )
        )
    return items


def _frame(plan: Plan, row: Seen) -> dict[str, tuple[int, int]]:
    if plan.aspect == SQUARE:
        return {}
    return {
        "original_size": (int(row["original_width"]), int(row["original_height"])),
        "crop_left_top": (int(row["crop_left"]), int(row["crop_top"])),
    }


def with_trigger(trigger_word: str, caption: str) -> str:
    """Return a caption that begins with the trigger word, once."""
    if caption.lower().split()[:1] == [trigger_word]:
        return caption
    return f"{trigger_word} {caption}".strip()


def content_rating(dataset: DatasetRow, items: Sequence[Item]) -> str:
    """For whom a version is: what its dataset says, unless words of a caption say more."""
    if any(restricted_term(item.text) for item in items):
        return "RESTRICTED"
    return dataset.content_rating


def _rejection(plan: Plan, row: Seen) -> Rejection:
    photograph = plan.photographs[row["index"] - 1]
    return Rejection(photograph.file_name, row["reason"], row["message"])


def orphans(plan: Plan) -> list[Rejection]:
    """Maps of images that are not there."""
    known = {stem(row.file_name) for row in plan.photographs}
    return [
        Rejection(row.file_name, "NO_SUCH_IMAGE", "a map of no image of the dataset")
        for name, row in plan.conditioning.items()
        if name not in known
    ]


def split(
    photographs: Sequence[PhotographRow],
) -> tuple[list[PhotographRow], dict[str, PhotographRow]]:
    """Return the images of what was imported; and the maps, by `stem` of what they are for."""
    images, maps = [], {}
    for row in photographs:
        if row.file_name.startswith(CONDITIONING_FOLDER):
            maps[stem(row.file_name.removeprefix(CONDITIONING_FOLDER))] = row
        else:
            images.append(row)
    return images, maps


def stem(file_name: str) -> str:
    """A name without its extension, by which a map is found."""
    return str(PurePosixPath(file_name).with_suffix(""))


def _write_metadata(folder: Path, items: Sequence[Item]) -> None:
    lines = [item.to_json() + "\n" for item in items]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _summary(items: Sequence[Item], rejected: Sequence[Rejection]) -> str:
    near = sum(bool(item.near_duplicate_of) for item in items)
    parts = [f"{len(items)} images"]
    parts += [f"{len(rejected)} rejected"] if rejected else []
    parts += [f"{near} near-duplicates"] if near else []
    return ", ".join(parts)


def _metadata(plan: Plan, mask_labels: Sequence[str]) -> dict[str, object]:
    """What the manifest says of the version: nothing that a second build would say otherwise."""
    aspect = {} if plan.aspect == SQUARE else {"aspect": plan.aspect}
    return {
        "kind": "dataset",
        **aspect,
        "trigger_word": plan.dataset.trigger_word,
        "resolution": plan.resolution,
        "base_digest": plan.base.digest,
        "mask_labels": list(mask_labels),
    }


def _prefix(job: JobContext) -> str:
    return f"{job.target}/{job.name.rpartition('/')[2]}"


def _publish_rows(
    job: JobContext,
    plan: Plan,
    items: Sequence[Item],
    rejected: Sequence[Rejection],
    manifest: Manifest,
) -> None:
    """Make the version visible and end the job, both or neither."""
    target = DatasetVersionName.parse(job.target)
    with job.catalog.transaction() as session:
        job.succeed(session)
        session.add(
            DatasetVersionRow(
                name=job.target,
                dataset=plan.dataset.name,
                number=int(target.version),
                digest=manifest.digest,
                artifact=_prefix(job),
                trigger_word=plan.dataset.trigger_word,
                resolution=plan.resolution,
                aspect=plan.aspect,
                image_count=len(items),
                rejected=[asdict(rejection) for rejection in rejected],
                job=job.name,
                content_rating=content_rating(plan.dataset, items),
                people_consent=plan.dataset.people_consent,
            )
        )
        session.flush()
        session.add_all(
            DatasetItemRow(
                version=job.target,
                file_name=item.file_name,
                caption=item.text,
                caption_imported=item.caption_imported,
                source_file_name=item.source_file_name,
                source_digest=item.source_digest,
            )
            for item in items
        )
