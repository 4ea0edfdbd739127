"""Rows of models to `toile.v1` messages, and a recipe's configuration from and to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toile.core.catalog.models import BaseRow, ModelAliasRow, ModelRow, ModelVersionRow
from toile.core.jobs.convert import cost_message, timestamp
from toile.core.jobs.costs import Usage
from toile.core.settings import Prices
from toile.training.config import RECIPES, ControlNetRecipeConfig, LoraRecipeConfig
from toile.v1 import train_pb2

RecipeMessage = train_pb2.LoraConfig | train_pb2.ControlNetConfig
_MESSAGES: Mapping[str, type[RecipeMessage]] = {
    LoraRecipeConfig.RECIPE: train_pb2.LoraConfig,
    ControlNetRecipeConfig.RECIPE: train_pb2.ControlNetConfig,
}
_FIELDS = {LoraRecipeConfig.RECIPE: "config", ControlNetRecipeConfig.RECIPE: "controlnet_config"}
"""Where a version has its configuration, by what it is."""


@dataclass(frozen=True)
class ModelView:
    """A model with its versions, at least one, in order, its aliases, and what it took to train."""

    row: ModelRow
    versions: Sequence[ModelVersionRow]
    aliases: Sequence[ModelAliasRow]
    usage: Usage

    @property
    def latest(self) -> str:
        """Name of the newest version that is not deprecated; empty when all are."""
        names = [row.name for row in self.versions if row.deprecate_time is None]
        return names[-1] if names else ""


@dataclass(frozen=True)
class VersionView:
    """A version with the names of the aliases that point to it."""

    row: ModelVersionRow
    aliases: Sequence[str]


def recipe_values(config: RecipeMessage) -> dict[str, Any]:
    """What a request says of the recipe; what it leaves open is left out."""
    # A list of the fields that are set: of a repeated one, when it is not empty.
    values: dict[str, Any] = {field.name: value for field, value in config.ListFields()}
    if "sample_prompts" in values:
        values["sample_prompts"] = list(values["sample_prompts"])
    if "repeats" in values:
        values["repeats"] = dict(values["repeats"])
    return values


def recipe_message(recipe: str, values: Mapping[str, Any]) -> RecipeMessage:
    """A whole configuration, as a version's row holds it."""
    return _MESSAGES[recipe](**RECIPES[recipe].checked(values).model_dump())


def model_message(view: ModelView, prices: Prices) -> train_pb2.Model:
    """A model."""
    return train_pb2.Model(
        name=view.row.name,
        latest_version=view.latest,
        create_time=timestamp(view.versions[0].create_time),
        aliases=[alias_message(row) for row in view.aliases],
        cost=cost_message(view.usage, prices),
    )


def alias_message(row: ModelAliasRow) -> train_pb2.ModelAlias:
    """An alias of a model."""
    return train_pb2.ModelAlias(
        name=row.name, version=row.version, update_time=timestamp(row.update_time)
    )


def version_message(view: VersionView) -> train_pb2.ModelVersion:
    """A version of a model."""
    row = view.row
    # An imported one has no recipe to fill in the rest from.
    config: RecipeMessage = (
        _MESSAGES[row.adapter_type](**row.config)
        if row.imported_digest
        else recipe_message(row.adapter_type, row.config)
    )
    message = train_pb2.ModelVersion(
        name=row.name,
        adapter_type=row.adapter_type,
        base=row.base,
        dataset_version=row.dataset_version or "",
        dataset_digest=row.dataset_digest,
        trigger_word=row.trigger_word,
        final_loss=row.final_loss,
        code_version=row.code_version,
        reproduction_difference=row.reproduction_difference,
        files=[train_pb2.ModelFile(**file) for file in row.files],
        job=row.job,
        create_time=timestamp(row.create_time),
        aliases=view.aliases,
        deprecate_time=timestamp(row.deprecate_time),
        deprecation_reason=row.deprecation_reason,
        imported_digest=row.imported_digest,
    )
    getattr(message, _FIELDS[row.adapter_type]).CopyFrom(config)
    if row.metrics:
        message.metrics.CopyFrom(train_pb2.VersionMetrics(**row.metrics))
    return message


def base_message(row: BaseRow) -> train_pb2.Base:
    """A base."""
    return train_pb2.Base(
        name=row.name, native_size=row.native_size, digest=row.digest, license=row.license
    )
