"""GenerateService: converts messages, hands them on, converts the answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from toile.core.errors import BadImageError, InvalidArgumentError
from toile.core.rpc.uploads import CHUNK_BYTES
from toile.generate.handler import GenerateHandler
from toile.generate.library import Library
from toile.v1 import generate_pb2, generate_pb2_grpc

GENERATE_SERVICE_NAME = generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Generations and images over gRPC."""

    def __init__(
        self, handler: GenerateHandler, library: Library, *, most_image_bytes: int
    ) -> None:
        self._handler = handler
        self._library = library
        self._most_image_bytes = most_image_bytes

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Draw images."""
        async with contextlib.aclosing(self._handler.generate(request)) as events:
            async for event in events:
                yield event

    async def GetGeneration(
        self, request: generate_pb2.GetGenerationRequest, context: Context
    ) -> generate_pb2.GetGenerationResponse:
        """Return a generation."""
        generation = await asyncio.to_thread(self._library.generation, request.name)
        return generate_pb2.GetGenerationResponse(generation=generation)

    async def ListGenerations(
        self, request: generate_pb2.ListGenerationsRequest, context: Context
    ) -> generate_pb2.ListGenerationsResponse:
        """Page through the generations of a project."""
        return await asyncio.to_thread(self._library.generations, request)

    async def UploadImage(
        self, request_iterator: AsyncIterator[generate_pb2.UploadImageRequest], context: Context
    ) -> generate_pb2.UploadImageResponse:
        """Take a client's own image in."""
        header: generate_pb2.UploadImageHeader | None = None
        data = bytearray()
        async for message in request_iterator:
            if message.HasField("header") != (header is None):
                raise InvalidArgumentError(
                    "the header is the first message and only the first", field="header"
                )
            if header is None:
                header = message.header
            data += message.chunk
            if len(data) > self._most_image_bytes:
                raise BadImageError(
                    f"the file has over {self._most_image_bytes:,} bytes", reason="TOO_MANY_BYTES"
                )
        if context.cancelled():  # a cut-off stream may look like one that has ended
            raise asyncio.CancelledError
        if header is None:
            raise InvalidArgumentError("the upload is empty: no header", field="header")
        image = await asyncio.to_thread(
            self._library.upload, header.parent, header.prompt, bytes(data)
        )
        return generate_pb2.UploadImageResponse(image=image)

    async def GetImage(
        self, request: generate_pb2.GetImageRequest, context: Context
    ) -> generate_pb2.GetImageResponse:
        """Return an image's record."""
        image = await asyncio.to_thread(self._library.image, request.name)
        return generate_pb2.GetImageResponse(image=image)

    async def DownloadImage(
        self, request: generate_pb2.DownloadImageRequest, context: Context
    ) -> AsyncIterator[generate_pb2.DownloadImageResponse]:
        """Stream an image's bytes."""
        opened = await asyncio.to_thread(self._library.open, request.name)
        file = await asyncio.to_thread(opened.__enter__)
        try:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield generate_pb2.DownloadImageResponse(chunk=chunk)
        finally:
            await asyncio.to_thread(opened.__exit__, None, None, None)

    async def GetImageLineage(
        self, request: generate_pb2.GetImageLineageRequest, context: Context
    ) -> generate_pb2.GetImageLineageResponse:
        """Follow an image back to the photographs."""
        return await asyncio.to_thread(self._library.lineage, request.name)
