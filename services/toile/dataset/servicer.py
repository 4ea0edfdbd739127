"""DatasetService: converts messages, hands them to the handler, converts the answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, ParamSpec, TypeVar

import grpc

from toile.core.jobs.convert import job_message
from toile.core.names import DatasetName, DatasetVersionName, ProjectName
from toile.dataset.convert import (
    Rejection,
    dataset_message,
    item_message,
    rejection_message,
    version_message,
)
from toile.dataset.handler import DatasetHandler
from toile.dataset.photographs import Outcome
from toile.dataset.upload import Upload
from toile.v1 import dataset_pb2, dataset_pb2_grpc

DATASET_SERVICE_NAME = dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """Datasets over gRPC."""

    def __init__(self, handler: DatasetHandler, *, most_image_bytes: int) -> None:
        self._handler = handler
        self._most_image_bytes = most_image_bytes

    async def CreateDataset(
        self, request: dataset_pb2.CreateDatasetRequest, context: Context
    ) -> dataset_pb2.CreateDatasetResponse:
        """Make an empty dataset."""
        view = await asyncio.to_thread(self._handler.create, request)
        return dataset_pb2.CreateDatasetResponse(dataset=dataset_message(view))

    async def GetDataset(
        self, request: dataset_pb2.GetDatasetRequest, context: Context
    ) -> dataset_pb2.GetDatasetResponse:
        """Return a dataset."""
        view = await asyncio.to_thread(self._handler.get, DatasetName.parse(request.name))
        return dataset_pb2.GetDatasetResponse(dataset=dataset_message(view))

    async def UpdateDataset(
        self, request: dataset_pb2.UpdateDatasetRequest, context: Context
    ) -> dataset_pb2.UpdateDatasetResponse:
        """Say something else of a dataset's photographs."""
        view = await asyncio.to_thread(self._handler.update, request)
        return dataset_pb2.UpdateDatasetResponse(dataset=dataset_message(view))

    async def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest, context: Context
    ) -> dataset_pb2.ListDatasetsResponse:
        """Page through the datasets of a project."""
        views, token = await asyncio.to_thread(
            self._handler.list,
            ProjectName.parse(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return dataset_pb2.ListDatasetsResponse(
            datasets=[dataset_message(view) for view in views], next_page_token=token
        )

    async def ImportImages(
        self, request_iterator: AsyncIterator[dataset_pb2.ImportImagesRequest], context: Context
    ) -> dataset_pb2.ImportImagesResponse:
        """Take files in, one by one; each stays in even if the stream breaks later."""
        response = dataset_pb2.ImportImagesResponse()
        with Upload(request_iterator, self._most_image_bytes) as upload:
            dataset = DatasetName.parse(await upload.header(), "dataset")
            await asyncio.to_thread(self._handler.get, dataset)
            async for file in upload.files():
                if context.cancelled():  # a cut-off stream may look like one that has ended
                    raise asyncio.CancelledError
                outcome = await _to_the_end(
                    self._handler.add_photograph, dataset, file.file_name, file.caption, file.path
                )
                if isinstance(outcome, Rejection):
                    response.rejected.append(rejection_message(outcome))
                elif outcome is Outcome.DUPLICATE:
                    response.duplicate_count += 1
                else:
                    response.imported_count += 1
        view = await asyncio.to_thread(self._handler.get, dataset)
        response.dataset.CopyFrom(dataset_message(view))
        return response

    async def BuildDatasetVersion(
        self, request: dataset_pb2.BuildDatasetVersionRequest, context: Context
    ) -> dataset_pb2.BuildDatasetVersionResponse:
        """Queue a build."""
        job = await asyncio.to_thread(self._handler.build, request)
        return dataset_pb2.BuildDatasetVersionResponse(job=job_message(job))

    async def GetDatasetVersion(
        self, request: dataset_pb2.GetDatasetVersionRequest, context: Context
    ) -> dataset_pb2.GetDatasetVersionResponse:
        """Return a version."""
        row = await asyncio.to_thread(
            self._handler.get_version, DatasetVersionName.parse(request.name)
        )
        return dataset_pb2.GetDatasetVersionResponse(version=version_message(row))

    async def ListDatasetVersions(
        self, request: dataset_pb2.ListDatasetVersionsRequest, context: Context
    ) -> dataset_pb2.ListDatasetVersionsResponse:
        """Page through the versions of a dataset."""
        rows, token = await asyncio.to_thread(
            self._handler.list_versions,
            DatasetName.parse(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return dataset_pb2.ListDatasetVersionsResponse(
            versions=[version_message(row) for row in rows], next_page_token=token
        )

    async def ListDatasetItems(
        self, request: dataset_pb2.ListDatasetItemsRequest, context: Context
    ) -> dataset_pb2.ListDatasetItemsResponse:
        """Page through the items of a version."""
        rows, token = await asyncio.to_thread(
            self._handler.list_items,
            DatasetVersionName.parse(request.parent, "parent"),
            request.page_size,
            request.page_token,
        )
        return dataset_pb2.ListDatasetItemsResponse(
            items=[item_message(row) for row in rows], next_page_token=token
        )


async def _to_the_end(
    work: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> Result:
    """Run work in a thread and wait for it, even if the call is cancelled meanwhile."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
