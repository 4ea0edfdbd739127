"""What the services ask of the models: a thin client of `InferenceService`."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from toile.core.errors import (
    ComputeUnavailableError,
    DeadlineError,
    ExhaustedError,
    ToileError,
)
from toile.core.rpc.client import inference_channel
from toile.core.rpc.mapping import to_error
from toile.core.rpc.wire import from_rpc_error
from toile.core.settings import Settings
from toile.v1 import inference_pb2
from toile.v1.inference_pb2_grpc import InferenceServiceStub

UNARY_TIMEOUT_SECONDS = 60.0
"""Deadline of an embedding, a segmentation or a caption, asked again or not; the first call may
load a base."""

FORGET_TIMEOUT_SECONDS = 10.0

MAX_BATCH = 64
"""Images or texts in one call; more are sent in several calls."""

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses before what lost its models is asked of others. Those queue while a replica starts."""


class ModelsLostError(ComputeUnavailableError):
    """The models are gone, or their replica is; others can do the work again."""


class Inference:
    """Asynchronous client of the models. All methods raise `ToileError`s.

    `UnavailableError` when the compute plane is away, `ExhaustedError` when its queue is full,
    otherwise what the models say, such as `InvalidArgumentError` for an image that does not
    decode.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub = InferenceServiceStub(channel)

    @classmethod
    def connect(cls, settings: Settings) -> Self:
        """Return a client of the application at `settings.inference_address`."""
        return cls(inference_channel(settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def diffuse(
        self, request: inference_pb2.DiffuseRequest, *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[inference_pb2.DiffuseResponse, None]:
        """Draw images. Closing the iterator, or cancelling its task, stops the drawing.

        When the models are lost, before they tell of anything or in the middle of it, what is
        missing is drawn by others: an image depends on its seed alone, and none is told of twice.

        Raises:
            DeadlineError: `timeout_seconds` are over.
        """
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        missing = list(range(len(request.seeds)))
        lost = False
        for pause in (*PAUSES_SECONDS, None):
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineError("the drawing was not done in time")
            part = inference_pb2.DiffuseRequest()
            part.CopyFrom(request)
            part.ClearField("seeds")
            part.seeds.extend(request.seeds[index] for index in missing)
            if request.prompts:
                part.ClearField("prompts")
                part.prompts.extend(request.prompts[index] for index in missing)
            drawn: list[int] = []
            try:
                timeout = None if timeout_seconds is None else left
                async with contextlib.aclosing(self._diffuse(part, timeout)) as events:
                    async for event in events:
                        told = getattr(event, str(event.WhichOneof("event")))
                        told.image_index = missing[told.image_index]
                        if event.HasField("image"):
                            drawn.append(told.image_index)
                        yield event
                return
            except ModelsLostError:
                if pause is None:
                    raise
                lost = True
            except ExhaustedError:  # of one that was let in before, others have taken the place
                if pause is None or not lost:
                    raise
            missing = [index for index in missing if index not in drawn]
            if not missing:
                return
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    async def _diffuse(
        self, request: inference_pb2.DiffuseRequest, timeout_seconds: float | None
    ) -> AsyncGenerator[inference_pb2.DiffuseResponse, None]:
        request.timeout_seconds = timeout_seconds or 0.0
        over = asyncio.Event()

        async def hold_open() -> AsyncGenerator[inference_pb2.DiffuseRequest, None]:
            yield request
            await over.wait()

        call = self._stub.Diffuse(hold_open(), timeout=timeout_seconds)
        try:
            async for event in call:
                if event.WhichOneof("event"):  # an empty one carries the trailers of an error
                    yield event
        except grpc.RpcError as error:
            # gRPC takes a cancellation for its own while it still opens a call that has ended.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError from error
            raise _meaning(error) from error
        finally:
            over.set()
            call.cancel()

    async def embed_images(self, base_artifact: str, images: Sequence[bytes]) -> list[list[float]]:
        """Return one CLIP embedding of unit length for each encoded image."""
        embeddings: list[list[float]] = []
        for start in range(0, len(images), MAX_BATCH):
            request = inference_pb2.EmbedImagesRequest(
                base_artifact=base_artifact, images=images[start : start + MAX_BATCH]
            )
            response = await _answer(self._stub.EmbedImages, request)
            embeddings += [list(embedding.values) for embedding in response.embeddings]
        return embeddings

    async def embed_texts(self, base_artifact: str, texts: Sequence[str]) -> list[list[float]]:
        """Return one CLIP embedding of unit length for each text."""
        embeddings: list[list[float]] = []
        for start in range(0, len(texts), MAX_BATCH):
            request = inference_pb2.EmbedTextsRequest(
                base_artifact=base_artifact, texts=texts[start : start + MAX_BATCH]
            )
            response = await _answer(self._stub.EmbedTexts, request)
            embeddings += [list(embedding.values) for embedding in response.embeddings]
        return embeddings

    async def segment(self, base_artifact: str, image: bytes) -> tuple[bytes, list[str]]:
        """Return a greyscale PNG whose pixels index labels, and the labels."""
        request = inference_pb2.SegmentImageRequest(base_artifact=base_artifact, image=image)
        response = await _answer(self._stub.SegmentImage, request)
        return response.label_png, list(response.labels)

    async def forget_adapter(self, artifact: str) -> None:
        """Have the models drop an adapter from memory; asked once, for they would by disuse."""
        request = inference_pb2.ForgetAdapterRequest(artifact=artifact)
        try:
            await self._stub.ForgetAdapter(request, timeout=FORGET_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise _meaning(error) from error

    async def describe(self, base_artifact: str, image: bytes) -> str:
        """Return a caption of an encoded image, without a trigger word."""
        request = inference_pb2.DescribeImageRequest(base_artifact=base_artifact, image=image)
        response = await _answer(self._stub.DescribeImage, request)
        caption: str = response.caption
        return caption


async def _answer(method: Any, request: Message) -> Any:
    """Call a unary method of the models; others are asked when they are lost.

    That is safe, because a call changes nothing. `method` is a stub's, which has no type.

    Raises:
        ComputeUnavailableError: They stay lost, or do not answer in `UNARY_TIMEOUT_SECONDS`.
    """
    until = time.monotonic() + UNARY_TIMEOUT_SECONDS
    lost = False
    for pause in (*PAUSES_SECONDS, None):
        try:
            return await method(request, timeout=max(0.0, until - time.monotonic()))
        except grpc.RpcError as error:
            meaning = _meaning(error)
            lost = lost or isinstance(meaning, ModelsLostError)
            passes = isinstance(meaning, ModelsLostError | ExhaustedError)
            if isinstance(meaning, DeadlineError):  # it is ours: a client's cancels this task
                raise ComputeUnavailableError("the models do not answer in time") from error
            if pause is None or not (lost and passes):
                raise meaning from error
        await asyncio.sleep(pause)
    raise AssertionError("unreachable")


def _meaning(error: grpc.RpcError) -> ToileError:
    """Tell what the models raised from what Ray Serve says of a replica that was lost."""
    known = to_error(error)
    if rpc_status.from_call(error) is None:
        if known is None:
            return ModelsLostError("the models were lost in the middle of their work")
        if isinstance(known, ComputeUnavailableError):
            return ModelsLostError(known.message)
    return known or from_rpc_error(error)
