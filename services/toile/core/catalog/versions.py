"""The versions of models, by each of the names that they have."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from toile.core.catalog.models import ModelAliasRow, ModelVersionRow
from toile.core.names import ModelAliasName, ModelName, ModelVersionName


def project_of(name: str, field: str = "name") -> str:
    """Return the project that a version's name is in; see `find_version` for the names.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    for kind in (ModelName, ModelAliasName):
        if kind.matches(name):
            return kind.parse(name).project
    return ModelVersionName.parse(name, field).project


def find_version(session: Session, name: str) -> ModelVersionRow | None:
    """Return a version by its own name, by an alias, or a model's newest by the model's.

    The newest is the one of the highest number that is not deprecated.
    """
    if ModelName.matches(name):
        return session.scalars(
            select(ModelVersionRow)
            .where(ModelVersionRow.model == name, ModelVersionRow.deprecate_time.is_(None))
            .order_by(ModelVersionRow.number.desc())
            .limit(1)
        ).first()
    if ModelAliasName.matches(name):
        pointed = select(ModelVersionRow).join(
            ModelAliasRow, ModelAliasRow.version == ModelVersionRow.name
        )
        return session.scalars(pointed.where(ModelAliasRow.name == name)).first()
    return session.get(ModelVersionRow, name)
