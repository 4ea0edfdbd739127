"""Short names, as a person types them, and the whole ones, as the services want them."""

from toile.core.errors import InvalidArgumentError
from toile.core.names import (
    DatasetName,
    DatasetVersionName,
    ImageName,
    JobName,
    ModelAliasName,
    ModelName,
    ModelVersionName,
    ProjectName,
    check_id,
)
from toile.core.settings import Settings


class Names:
    """Completes names within the project of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._project = check_id(settings.project, "TOILE_PROJECT")

    @property
    def project(self) -> str:
        """`projects/{project}`."""
        return str(ProjectName(self._project))

    def dataset(self, text: str) -> str:
        """Complete `lace`, or return a dataset's whole name."""
        if "/" in text:
            return str(DatasetName.parse(text, "dataset"))
        return str(DatasetName(self._project, check_id(text, "dataset")))

    def dataset_or_version(self, text: str) -> str:
        """Complete `lace` or `lace/2`, or return a whole name of either kind."""
        if text.startswith("projects/"):
            kind = DatasetVersionName if "/versions/" in text else DatasetName
            return str(kind.parse(text, "dataset"))
        name, _, version = text.partition("/")
        if not version:
            return self.dataset(name)
        parts = (check_id(name, "dataset"), check_id(version, "version"))
        return str(DatasetVersionName(self._project, *parts))

    def model(self, text: str) -> str:
        """Complete `lace`, `lace/2` or `lace@production`, or return a whole name of any kind."""
        if text.startswith("projects/"):
            kind = ModelAliasName if "@" in text else ModelName
            return str((ModelVersionName if "/versions/" in text else kind).parse(text, "model"))
        if "@" in text:
            name, _, alias = text.partition("@")
            parts = (check_id(name, "model"), check_id(alias, "alias"))
            return str(ModelAliasName(self._project, *parts))
        name, _, version = text.partition("/")
        if not version:
            return str(ModelName(self._project, check_id(name, "model")))
        parts = (check_id(name, "model"), check_id(version, "version"))
        return str(ModelVersionName(self._project, *parts))

    def job(self, text: str) -> str:
        """Complete a job's id, or return its whole name."""
        if "/" in text:
            return str(JobName.parse(text, "job"))
        return str(JobName(self._project, check_id(text, "job")))

    def image(self, text: str) -> str:
        """Complete an image's id, or return its whole name."""
        if "/" in text:
            return str(ImageName.parse(text, "image"))
        return str(ImageName(self._project, check_id(text, "image")))

    def adapter(self, text: str) -> tuple[str, float | None]:
        """Read `lace`, `lace/2`, `lace@production` or `lace:0.8` as a whole name and a weight.

        Raises:
            InvalidArgumentError: The weight is not a number, or the name cannot be one.
        """
        name, colon, weight = text.rpartition(":")
        if not colon:
            return self.model(text), None
        try:
            return self.model(name), float(weight)
        except ValueError:
            raise InvalidArgumentError(
                f"an adapter is NAME or NAME:WEIGHT, such as lace:0.8, not {text!r}",
                field="adapter",
            ) from None


def short(name: str) -> str:
    """Return what a person calls a resource: its last id, or `name/version`."""
    parts = name.split("/")
    if len(parts) >= 2 and parts[-2] == "versions":
        return f"{parts[-3]}/{parts[-1]}"
    return parts[-1]
