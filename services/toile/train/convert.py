"""Rows of models to `toile.v1` messages, and the recipe's configuration from and to one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toile.core.catalog.models import BaseRow, ModelRow, ModelVersionRow
from toile.core.jobs.convert import timestamp
from toile.training.config import LoraRecipeConfig
from toile.v1 import train_pb2


@dataclass(frozen=True)
class ModelView:
    """A model with its newest version."""

    row: ModelRow
    latest: ModelVersionRow
    first: ModelVersionRow


def lora_values(config: train_pb2.LoraConfig) -> dict[str, Any]:
    """What a request says of the recipe; what it leaves open is left out."""
    # A list of the fields that are set: of a repeated one, when it is not empty.
    values: dict[str, Any] = {field.name: value for field, value in config.ListFields()}
    if "sample_prompts" in values:
        values["sample_prompts"] = list(values["sample_prompts"])
    return values


def lora_message(values: Mapping[str, Any]) -> train_pb2.LoraConfig:
    """A whole configuration, as a version's row holds it."""
    return train_pb2.LoraConfig(**LoraRecipeConfig.checked(values).model_dump())


def model_message(view: ModelView) -> train_pb2.Model:
    """A model."""
    return train_pb2.Model(
        name=view.row.name,
        latest_version=view.latest.name,
        create_time=timestamp(view.first.create_time),
    )


def version_message(row: ModelVersionRow) -> train_pb2.ModelVersion:
    """A version of a model."""
    return train_pb2.ModelVersion(
        name=row.name,
        adapter_type=row.adapter_type,
        base=row.base,
        dataset_version=row.dataset_version,
        dataset_digest=row.dataset_digest,
        trigger_word=row.trigger_word,
        config=lora_message(row.config),
        final_loss=row.final_loss,
        code_version=row.code_version,
        reproduction_difference=row.reproduction_difference,
        files=[train_pb2.ModelFile(**file) for file in row.files],
        job=row.job,
        create_time=timestamp(row.create_time),
    )


def base_message(row: BaseRow) -> train_pb2.Base:
    """A base."""
    return train_pb2.Base(
        name=row.name, native_size=row.native_size, digest=row.digest, license=row.license
    )
