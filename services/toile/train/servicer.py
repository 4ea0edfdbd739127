"""TrainService: converts messages, hands them to the handler, converts the answer."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog

from toile.core.errors import ToileError
from toile.core.inference import Inference
from toile.core.jobs.convert import cost_message, job_message
from toile.core.names import ModelAliasName, ModelName, ModelVersionName, ProjectName
from toile.core.settings import Limits, Prices
from toile.train.convert import alias_message, base_message, model_message, version_message
from toile.train.deletion import Deletion
from toile.train.handler import TrainHandler
from toile.train.importing import Importer
from toile.train.registry import ModelRegistry
from toile.train.upload import receive
from toile.v1 import train_pb2, train_pb2_grpc

TRAIN_SERVICE_NAME = train_pb2.DESCRIPTOR.services_by_name["TrainService"].full_name

_log = structlog.stdlib.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class TrainServicer(train_pb2_grpc.TrainServiceServicer):
    """Trainings and models over gRPC."""

    def __init__(
        self,
        handler: TrainHandler,
        registry: ModelRegistry,
        deletion: Deletion,
        importer: Importer,
        models: Callable[[], Inference],
        *,
        limits: Limits,
        prices: Prices,
    ) -> None:
        self._handler = handler
        self._registry = registry
        self._deletion = deletion
        self._importer = importer
        self._models = models
        self._limits = limits
        self._prices = prices

    async def CreateTrainingJob(
        self, request: train_pb2.CreateTrainingJobRequest, context: Context
    ) -> train_pb2.CreateTrainingJobResponse:
        """Queue a training."""
        row = await asyncio.to_thread(self._handler.create, request)
        return train_pb2.CreateTrainingJobResponse(job=job_message(row))

    async def EstimateTrainingJob(
        self, request: train_pb2.EstimateTrainingJobRequest, context: Context
    ) -> train_pb2.EstimateTrainingJobResponse:
        """Say what a training would take."""
        found = await asyncio.to_thread(self._handler.estimate, request.training)
        if found is None:
            return train_pb2.EstimateTrainingJobResponse()
        return train_pb2.EstimateTrainingJobResponse(
            cost=cost_message(found.usage, self._prices), seconds=found.seconds, job=found.job
        )

    async def GetModel(
        self, request: train_pb2.GetModelRequest, context: Context
    ) -> train_pb2.GetModelResponse:
        """Return a model."""
        view = await asyncio.to_thread(self._registry.model, ModelName.parse(request.name))
        return train_pb2.GetModelResponse(model=model_message(view, self._prices))

    async def ListModels(
        self, request: train_pb2.ListModelsRequest, context: Context
    ) -> train_pb2.ListModelsResponse:
        """Page through the models of a project."""
        views, token = await asyncio.to_thread(
            self._registry.models,
            ProjectName.parse(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return train_pb2.ListModelsResponse(
            models=[model_message(view, self._prices) for view in views], next_page_token=token
        )

    async def GetModelVersion(
        self, request: train_pb2.GetModelVersionRequest, context: Context
    ) -> train_pb2.GetModelVersionResponse:
        """Return a version."""
        kind = ModelAliasName if ModelAliasName.matches(request.name) else ModelVersionName
        view = await asyncio.to_thread(self._registry.version, kind.parse(request.name))
        return train_pb2.GetModelVersionResponse(version=version_message(view))

    async def ListModelVersions(
        self, request: train_pb2.ListModelVersionsRequest, context: Context
    ) -> train_pb2.ListModelVersionsResponse:
        """Page through the versions of a model."""
        views, token = await asyncio.to_thread(
            self._registry.versions,
            ModelName.parse(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return train_pb2.ListModelVersionsResponse(
            versions=[version_message(view) for view in views], next_page_token=token
        )

    async def ImportModelVersion(
        self,
        request_iterator: AsyncIterator[train_pb2.ImportModelVersionRequest],
        context: Context,
    ) -> train_pb2.ImportModelVersionResponse:
        """Take an adapter in that was trained elsewhere."""
        with tempfile.TemporaryDirectory(prefix="toile-import-") as folder:
            file = Path(folder) / "adapter.safetensors"
            header = await receive(request_iterator, file, self._limits)
            if context.cancelled():  # a cut-off stream may look like one that has ended
                raise asyncio.CancelledError
            work = asyncio.ensure_future(asyncio.to_thread(self._importer.run, header, file))
            try:
                view = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # it reads the file
                raise
        return train_pb2.ImportModelVersionResponse(version=version_message(view))

    async def SetModelAlias(
        self, request: train_pb2.SetModelAliasRequest, context: Context
    ) -> train_pb2.SetModelAliasResponse:
        """Point an alias to a version."""
        name = ModelAliasName.parse(request.name)
        row = await asyncio.to_thread(self._registry.set_alias, name, request.version)
        return train_pb2.SetModelAliasResponse(alias=alias_message(row))

    async def DeleteModelAlias(
        self, request: train_pb2.DeleteModelAliasRequest, context: Context
    ) -> train_pb2.DeleteModelAliasResponse:
        """Remove an alias."""
        name = ModelAliasName.parse(request.name)
        await asyncio.to_thread(self._registry.delete_alias, name)
        return train_pb2.DeleteModelAliasResponse()

    async def DeprecateModelVersion(
        self, request: train_pb2.DeprecateModelVersionRequest, context: Context
    ) -> train_pb2.DeprecateModelVersionResponse:
        """Advise against a version."""
        name = ModelVersionName.parse(request.name)
        view = await asyncio.to_thread(self._registry.deprecate, name, request.reason)
        return train_pb2.DeprecateModelVersionResponse(version=version_message(view))

    async def DeleteModelVersion(
        self, request: train_pb2.DeleteModelVersionRequest, context: Context
    ) -> train_pb2.DeleteModelVersionResponse:
        """Remove a version, also from the memory of the models."""
        name = ModelVersionName.parse(request.name)
        artifact = await asyncio.to_thread(self._deletion.version, name)
        try:
            await self._models().forget_adapter(artifact)
        except ToileError as error:  # it will leave by disuse
            _log.info("the models were not told", version=str(name), reason=error.reason)
        return train_pb2.DeleteModelVersionResponse()

    async def DeleteModel(
        self, request: train_pb2.DeleteModelRequest, context: Context
    ) -> train_pb2.DeleteModelResponse:
        """Remove a model without versions."""
        await asyncio.to_thread(self._deletion.model, ModelName.parse(request.name))
        return train_pb2.DeleteModelResponse()

    async def DownloadModelFile(
        self, request: train_pb2.DownloadModelFileRequest, context: Context
    ) -> AsyncIterator[train_pb2.DownloadModelFileResponse]:
        """Stream a file of a version."""
        pieces = self._registry.read_file(ModelVersionName.parse(request.name), request.path)
        try:
            while chunk := await asyncio.to_thread(next, pieces, b""):
                yield train_pb2.DownloadModelFileResponse(chunk=chunk)
        finally:
            # A client that goes away while a piece is being read: the thread then closes the file.
            with contextlib.suppress(ValueError):
                pieces.close()

    async def ListBases(
        self, request: train_pb2.ListBasesRequest, context: Context
    ) -> train_pb2.ListBasesResponse:
        """Return all bases."""
        rows = await asyncio.to_thread(self._handler.bases)
        return train_pb2.ListBasesResponse(bases=[base_message(row) for row in rows])
