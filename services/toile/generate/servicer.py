"""GenerateService: converts messages, hands them on, converts the answer."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from toile.core.errors import BadImageError, InvalidArgumentError, ToileError
from toile.core.rpc.uploads import CHUNK_BYTES
from toile.generate.batch import draw_batch
from toile.generate.convert import starting_from
from toile.generate.deadline import Deadline
from toile.generate.deletion import Deletion
from toile.generate.handler import GenerateHandler
from toile.generate.library import Library
from toile.v1 import generate_pb2, generate_pb2_grpc

GENERATE_SERVICE_NAME = generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Generations and images over gRPC. Every way of drawing is `GenerateHandler.generate`."""

    def __init__(
        self,
        handler: GenerateHandler,
        library: Library,
        deletion: Deletion,
        *,
        most_image_bytes: int,
    ) -> None:
        self._handler = handler
        self._library = library
        self._deletion = deletion
        self._most_image_bytes = most_image_bytes

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Draw images."""
        async with self._drawing(request, context) as events:
            async for event in events:
                yield event

    async def GenerateImages(
        self, request: generate_pb2.GenerateImagesRequest, context: Context
    ) -> generate_pb2.GenerateImagesResponse:
        """Draw images, and answer when all of them are stored."""
        async with self._drawing(request.request, context) as events:
            async for event in events:
                if event.HasField("generation"):
                    return generate_pb2.GenerateImagesResponse(generation=event.generation)
        raise ToileError("a generation ended without a summary")

    async def GenerateBatch(
        self, request: generate_pb2.GenerateBatchRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateBatchResponse]:
        """Draw the rows of a file."""
        drawn = draw_batch(self._handler, request, Deadline(context.time_remaining()))
        async with contextlib.aclosing(drawn) as events:
            async for event in events:
                yield event

    async def Redesign(
        self, request: generate_pb2.RedesignRequest, context: Context
    ) -> AsyncIterator[generate_pb2.RedesignResponse]:
        """Draw variations of an image."""
        drawing = starting_from(request.drawing, request.redesign)
        async with self._drawing(drawing, context) as events:
            async for event in events:
                yield generate_pb2.RedesignResponse(event=event)

    async def RedesignWithPrompt(
        self, request: generate_pb2.RedesignWithPromptRequest, context: Context
    ) -> AsyncIterator[generate_pb2.RedesignWithPromptResponse]:
        """Draw an image anew by a prompt; its edges hold, where the base can."""
        if not request.drawing.prompt.strip():
            raise InvalidArgumentError(
                "prompt is empty; Redesign does without one",
                field="drawing.prompt",
                reason="EMPTY_PROMPT",
            )
        drawing = starting_from(request.drawing, request.redesign)
        drawing = await self._handler.holding_edges(drawing)
        async with self._drawing(drawing, context) as events:
            async for event in events:
                yield generate_pb2.RedesignWithPromptResponse(event=event)

    async def Inpaint(
        self, request: generate_pb2.InpaintRequest, context: Context
    ) -> AsyncIterator[generate_pb2.InpaintResponse]:
        """Draw a part of an image anew."""
        drawing = starting_from(request.drawing, request.inpaint)
        async with self._drawing(drawing, context) as events:
            async for event in events:
                yield generate_pb2.InpaintResponse(event=event)

    async def Upscale(
        self, request: generate_pb2.UpscaleRequest, context: Context
    ) -> AsyncIterator[generate_pb2.UpscaleResponse]:
        """Enlarge an image."""
        drawing = starting_from(request.drawing, request.upscale)
        async with self._drawing(drawing, context) as events:
            async for event in events:
                yield generate_pb2.UpscaleResponse(event=event)

    def _drawing(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> contextlib.aclosing[AsyncGenerator[generate_pb2.GenerateResponse, None]]:
        deadline = Deadline(context.time_remaining())
        return contextlib.aclosing(self._handler.generate(request, deadline))

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

    async def DeleteGeneration(
        self, request: generate_pb2.DeleteGenerationRequest, context: Context
    ) -> generate_pb2.DeleteGenerationResponse:
        """Delete a generation with its images."""
        await asyncio.to_thread(self._deletion.generation, request.name)
        return generate_pb2.DeleteGenerationResponse()

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

    async def ListImages(
        self, request: generate_pb2.ListImagesRequest, context: Context
    ) -> generate_pb2.ListImagesResponse:
        """Page through the images of a project."""
        return await asyncio.to_thread(self._library.images, request)

    async def DeleteImage(
        self, request: generate_pb2.DeleteImageRequest, context: Context
    ) -> generate_pb2.DeleteImageResponse:
        """Delete an image."""
        await asyncio.to_thread(self._deletion.image, request.name)
        return generate_pb2.DeleteImageResponse()

    async def GetImageLink(
        self, request: generate_pb2.GetImageLinkRequest, context: Context
    ) -> generate_pb2.GetImageLinkResponse:
        """Return a link to an image's bytes."""
        return await asyncio.to_thread(self._library.link, request.name, request.expires_seconds)

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
