"""Resource names: `projects/{project}/datasets/{dataset}/versions/{version}` and the like.

After Google's AIP-122. A name is parsed once, at the edge, and formatted from its parts.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

from toile.core.errors import InvalidArgumentError

ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_id(value: str, field: str) -> str:
    """Return `value` if it can be a resource id.

    Raises:
        InvalidArgumentError: It is not 1 to 63 lower-case letters, digits and inner dashes.
    """
    if not ID.fullmatch(value):
        raise InvalidArgumentError(
            f"{field} must be 1 to 63 lower-case letters, digits and inner dashes, "
            f"not {value[:80]!r}",
            field=field,
            reason="BAD_RESOURCE_ID",
        )
    return value


@dataclass(frozen=True, order=True)
class ResourceName:
    """A name made of collections and ids; subclasses give the pattern."""

    pattern: ClassVar[str]

    @classmethod
    def parse(cls, name: str, field: str = "name") -> Self:
        """Parse a resource name.

        Raises:
            InvalidArgumentError: The name does not follow the pattern.
        """
        if match := _expression(cls.pattern).fullmatch(name):
            return cls(**match.groupdict())
        raise InvalidArgumentError(
            f"{field} must look like {cls.pattern}, not {name[:200]!r}",
            field=field,
            reason="BAD_RESOURCE_NAME",
        )

    @classmethod
    def matches(cls, name: str) -> bool:
        """Say whether a name follows the pattern."""
        try:
            cls.parse(name)
        except InvalidArgumentError:
            return False
        return True

    def __str__(self) -> str:
        return self.pattern.format(**vars(self))


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", rf"(?P<\1>{ID.pattern})", pattern))


@dataclass(frozen=True, order=True)
class ProjectName(ResourceName):
    """A tenant."""

    pattern = "projects/{project}"
    project: str


@dataclass(frozen=True, order=True)
class _InProject(ResourceName):
    project: str

    @property
    def parent(self) -> ProjectName:
        """The project."""
        return ProjectName(self.project)


@dataclass(frozen=True, order=True)
class DatasetName(_InProject):
    """A dataset."""

    pattern = "projects/{project}/datasets/{dataset}"
    dataset: str


@dataclass(frozen=True, order=True)
class DatasetVersionName(_InProject):
    """An immutable version of a dataset."""

    pattern = "projects/{project}/datasets/{dataset}/versions/{version}"
    dataset: str
    version: str

    @property
    def dataset_name(self) -> DatasetName:
        """The dataset."""
        return DatasetName(self.project, self.dataset)


@dataclass(frozen=True, order=True)
class ModelName(_InProject):
    """A named series of adapters."""

    pattern = "projects/{project}/models/{model}"
    model: str


@dataclass(frozen=True, order=True)
class ModelVersionName(_InProject):
    """One trained adapter."""

    pattern = "projects/{project}/models/{model}/versions/{version}"
    model: str
    version: str

    @property
    def model_name(self) -> ModelName:
        """The model."""
        return ModelName(self.project, self.model)


@dataclass(frozen=True, order=True)
class ModelAliasName(_InProject):
    """A name that versions of a model take turns in, such as `…/models/lace@production`."""

    pattern = "projects/{project}/models/{model}@{alias}"
    model: str
    alias: str

    @property
    def model_name(self) -> ModelName:
        """The model."""
        return ModelName(self.project, self.model)


@dataclass(frozen=True, order=True)
class JobName(_InProject):
    """A long run."""

    pattern = "projects/{project}/jobs/{job}"
    job: str


@dataclass(frozen=True, order=True)
class GenerationName(_InProject):
    """A request for images."""

    pattern = "projects/{project}/generations/{generation}"
    generation: str


@dataclass(frozen=True, order=True)
class ImageName(_InProject):
    """An image."""

    pattern = "projects/{project}/images/{image}"
    image: str


@dataclass(frozen=True, order=True)
class RankingName(_InProject):
    """An ordered set of images."""

    pattern = "projects/{project}/rankings/{ranking}"
    ranking: str


@dataclass(frozen=True, order=True)
class RefinementName(_InProject):
    """An edit of an image."""

    pattern = "projects/{project}/refinements/{refinement}"
    refinement: str


@dataclass(frozen=True, order=True)
class BaseName(ResourceName):
    """A base model."""

    pattern = "bases/{base}"
    base: str
