"""What was trained elsewhere becomes versions like those that were trained here."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from toile import __version__
from toile.core.adapter_types import AdapterType
from toile.core.artifacts import ArtifactStore, Manifest
from toile.core.artifacts.store import sha256
from toile.core.bases import resolve_base
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import BaseRow, ModelVersionRow
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.context import new_id
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.names import ModelName, ProjectName, check_id
from toile.core.settings import Settings
from toile.train.convert import VersionView
from toile.train.deletion import forget_artifact
from toile.train.registry import next_version, version_views
from toile.v1 import train_pb2

MAX_TRIGGER_CHARACTERS = 64
MAX_CONFIG_BYTES = 64 << 10


class Importer:
    """Imports files of LoRAs and ControlNets. Synchronous."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ArtifactStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store

    def run(self, header: train_pb2.ImportModelVersionHeader, file: Path) -> VersionView:
        """Publish a file as the next version of a model; the same request twice is one version.

        Raises:
            InvalidArgumentError: A field is wrong, or the file cannot be used (`BAD_ADAPTER`,
                `UNSUPPORTED_ADAPTER`, `ADAPTER_MISMATCH`; `BAD_CONTROLNET`, `CONTROL_MISMATCH`):
                see `read_foreign` and `publish_controlnet`.
            NotFoundError: There is no such base.
            RequestReusedError: The request id was used for something else.
            FailedPreconditionError: The service was installed without torch
                (`IMPORT_UNAVAILABLE`).
        """
        parent = ProjectName.parse(header.parent, "parent")
        model = ModelName(parent.project, check_id(header.model_id, "model_id"))
        trigger_word = _trigger_word(header.trigger_word)
        _check_config(header.controlnet_config)
        digest, _ = sha256(file)
        request = {
            "scope": f"ImportModelVersion {parent}",
            "request_id": header.request_id,
            "digest": hashlib.sha256(f"{request_digest(header)}{digest}".encode()).hexdigest(),
        }
        with self._catalog.transaction() as session:
            if known := recall(session, **request):
                return _view(session, known)
            base = resolve_base(session, header.base or self._settings.default_base)
        artifact = f"{model}/imports/{new_id()}"
        try:
            manifest, config = self._publish(artifact, base, file, model, header)
            with self._catalog.transaction() as session:
                name = recall(session, **request)  # the same may have been sent at the same time
                if not name:
                    row = _row(model, base, artifact, manifest, config)
                    row.adapter_type = _adapter_type(header)
                    row.trigger_word, row.imported_digest = trigger_word, digest
                    name = _add(session, model, row, request)
                view = _view(session, name)
        except BaseException:
            forget_artifact(self._store, artifact)
            raise
        if view.row.artifact != artifact:
            forget_artifact(self._store, artifact)
        return view

    def _publish(
        self,
        artifact: str,
        base: BaseRow,
        file: Path,
        model: ModelName,
        header: train_pb2.ImportModelVersionHeader,
    ) -> tuple[Manifest, dict[str, Any]]:
        """Return the manifest of what was published, and what is known of its configuration."""
        try:
            # Late: the service does without torch until somebody imports.
            from toile.train.conversion import publish_controlnet, publish_lora
        except ImportError as error:
            raise FailedPreconditionError(
                "adapters cannot be read here: the train service was installed without torch; "
                "install toile[compute] where it runs",
                reason="IMPORT_UNAVAILABLE",
            ) from error
        if _adapter_type(header) == AdapterType.CONTROLNET:
            config = header.controlnet_config
            return publish_controlnet(self._store, artifact, base, file, config), {}
        return publish_lora(
            self._store,
            artifact,
            base,
            file,
            title=model.model,
            trigger_word=header.trigger_word,
            targets=self._settings.engine.targets,
        )


def _trigger_word(word: str) -> str:
    if len(word) > MAX_TRIGGER_CHARACTERS or not word.isprintable() or word != word.strip():
        raise InvalidArgumentError(
            f"trigger_word must be at most {MAX_TRIGGER_CHARACTERS} printable characters "
            "without spaces around them",
            field="trigger_word",
        )
    return word


def _check_config(text: str) -> None:
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise InvalidArgumentError(
            f"controlnet_config has over {MAX_CONFIG_BYTES:,} bytes",
            field="controlnet_config",
            reason="TOO_MANY_BYTES",
        )


def _adapter_type(header: train_pb2.ImportModelVersionHeader) -> AdapterType:
    return AdapterType.CONTROLNET if header.controlnet_config else AdapterType.LORA


def _row(
    model: ModelName, base: BaseRow, artifact: str, manifest: Manifest, config: dict[str, Any]
) -> ModelVersionRow:
    """What is known before the version has its number."""
    return ModelVersionRow(
        model=str(model),
        artifact=artifact,
        digest=manifest.digest,
        base=base.name,
        dataset_version=None,
        dataset_digest="",
        config=config,
        final_loss=0.0,
        reproduction_difference=0.0,
        code_version=__version__,
        files=[
            {"path": path, "size_bytes": entry.size_bytes, "digest": entry.digest}
            for path, entry in sorted(manifest.files.items())
        ],
        job="",
    )


def _add(
    session: Session, model: ModelName, row: ModelVersionRow, request: Mapping[str, str]
) -> str:
    name = next_version(session, model)
    row.name, row.number = str(name), int(name.version)
    session.add(row)
    session.flush()
    remember(session, **request, resource=row.name)
    return row.name


def _view(session: Session, name: str) -> VersionView:
    return version_views(session, [session.get_one(ModelVersionRow, name)])[0]
