"""Refinements in the catalog: a row, its image's row and its adapters, in one transaction."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.catalog.models import GenerationAdapterRow, ImageRow, RefinementRow
from toile.core.catalog.paging import page
from toile.core.clock import now
from toile.core.errors import NotFoundError
from toile.core.names import ProjectName, RefinementName
from toile.refine.source import Source


@dataclass(frozen=True)
class Plan:
    """How an instruction was understood, as `RefinementPlan`, and how it is drawn."""

    operation: str
    region: str
    value: str
    prompt: str
    region_share: float
    seed: int
    steps: int
    strength: float


@dataclass(frozen=True)
class Refined:
    """A finished refinement."""

    row: RefinementRow
    image: ImageRow


def add_refinement(
    session: Session,
    *,
    name: str,
    source: Source,
    image: ImageRow,
    instruction: str,
    plan: Plan,
) -> Refined:
    """Add a refinement with its image and what drew it."""
    session.add(image)
    session.flush()  # the refinement refers to it
    row = RefinementRow(
        name=name,
        project=image.project,
        source_image=source.image.name,
        image=image.name,
        base=source.base.name,
        instruction=instruction,
        plan=asdict(plan),
        create_time=now(),
    )
    session.add(row)
    session.add_all(
        GenerationAdapterRow(
            producer=name, model_version=adapter.model_version, weight=adapter.weight
        )
        for adapter in source.adapters
    )
    return Refined(row, image)


def get_refinement(session: Session, name: str) -> Refined:
    """Return a refinement.

    Raises:
        NotFoundError: There is no such refinement.
    """
    RefinementName.parse(name)
    row = session.get(RefinementRow, name)
    if row is None:
        raise NotFoundError(f"there is no refinement {name}", metadata={"name": name})
    return Refined(row, session.get_one(ImageRow, row.image))


def list_refinements(
    session: Session, *, parent: str, page_size: int, page_token: str
) -> tuple[list[Refined], str]:
    """Return one page of a project's refinements, newest first, and the next page's token."""
    project = ProjectName.parse(parent, "parent").project
    rows, token = page(
        session,
        select(RefinementRow).where(RefinementRow.project == project),
        (RefinementRow.create_time, RefinementRow.name),
        page_size=page_size,
        page_token=page_token,
        scope=f"ListRefinements {parent}",
        descending=True,
    )
    names = [row.image for row in rows]
    images = {i.name: i for i in session.scalars(select(ImageRow).where(ImageRow.name.in_(names)))}
    return [Refined(row, images[row.image]) for row in rows], token


def stored_plan(plan: Mapping[str, Any]) -> Plan:
    """The plan as a row holds it."""
    return Plan(**{field: plan[field] for field in Plan.__dataclass_fields__})
