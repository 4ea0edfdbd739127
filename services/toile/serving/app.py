"""The Ray Serve application that answers for `InferenceService` behind Serve's gRPC proxy."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from grpc_status import rpc_status
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.grpc_util import RayServegRPCContext

from toile.core import logging as logs
from toile.core.artifacts import open_store
from toile.core.errors import ToileError
from toile.core.rpc.mapping import to_status
from toile.core.settings import Settings
from toile.serving.models import Models
from toile.v1 import inference_pb2

APPLICATION = "toile"
DEPLOYMENT = "models"
HEALTH_PERIOD_SECONDS = 5.0
DRAIN_SECONDS = 120.0
"""How long a replica that is told to go may finish what it works on."""

STEP_EVENT_SECONDS = 0.25
"""Between two steps that a drawing tells of. An event passes through three processes, which where
steps are short costs as much as a fifth of one."""

_log = logging.getLogger(__name__)

R = TypeVar("R")


class InferenceReplica:
    """One replica: methods are `InferenceService`'s, called by Serve's gRPC proxy.

    Serve drops the trailers of a method that raises, and with them the error's details. So
    errors are set on the call's context and the method returns; a stream sends one empty event,
    because the context travels with messages.
    """

    def __init__(self, settings: Settings, warm_base: str = "") -> None:
        logs.configure(settings, DEPLOYMENT)
        torch.set_num_threads(settings.resolved_cpu_threads)  # Ray would have it be one
        device = torch.device("cuda" if settings.model_gpus else "cpu")
        self._models = Models(settings, open_store(settings), device=device)
        self._threads = ThreadPoolExecutor(_calls(settings), thread_name_prefix="models")
        if warm_base:
            try:
                self._models.warm_up(warm_base)
            except ToileError as error:  # bases can still be loaded later
                _log.warning("could not load %s: %s", warm_base, error.message)

    async def Diffuse(  # noqa: N802 - the RPC's name
        self,
        requests: AsyncIterator[inference_pb2.DiffuseRequest],
        grpc_context: RayServegRPCContext,
    ) -> AsyncIterator[inference_pb2.DiffuseResponse]:
        """Draw images in a thread; a caller that goes away stops it within one step.

        That the caller went is read from its half of the call. Serve's proxy cancels this method,
        too, but not when the caller goes while the proxy waits for it to take a message.
        """
        request = await anext(requests, None)
        if request is None:
            return
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[inference_pb2.DiffuseResponse | Exception | None] = asyncio.Queue()
        stop = threading.Event()
        caller = asyncio.create_task(_until_closed(requests))
        caller.add_done_callback(lambda _: events.put_nowait(None))

        def put(event: inference_pb2.DiffuseResponse | Exception | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        told = -math.inf

        def on_step(index: int, step: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if step < total and now - told < STEP_EVENT_SECONDS:
                return
            told = now
            put(
                inference_pb2.DiffuseResponse(
                    step=inference_pb2.DiffuseStep(image_index=index, step=step, total_steps=total)
                )
            )

        def on_image(index: int, data: bytes) -> None:
            put(
                inference_pb2.DiffuseResponse(
                    image=inference_pb2.DiffuseImage(image_index=index, png=data)
                )
            )

        def on_preview(index: int, step: int, data: bytes) -> None:
            put(
                inference_pb2.DiffuseResponse(
                    preview=inference_pb2.DiffusePreview(image_index=index, step=step, jpeg=data)
                )
            )

        def draw() -> None:
            try:
                self._models.diffuse(
                    request,
                    on_step=on_step,
                    on_image=on_image,
                    on_preview=on_preview,
                    cancelled=stop.is_set,
                )
            except Exception as error:  # noqa: BLE001 - raised where it can be answered
                put(error)
            else:
                put(None)

        self._threads.submit(draw)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    _fail(grpc_context, event)
                    yield inference_pb2.DiffuseResponse()
                    return
                yield event
        finally:
            stop.set()
            caller.cancel()

    async def EmbedImages(  # noqa: N802
        self, request: inference_pb2.EmbedImagesRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.EmbedImagesResponse:
        """Embed images."""

        def work() -> inference_pb2.EmbedImagesResponse:
            rows = self._models.embed_images(request.base_artifact, request.images)
            return inference_pb2.EmbedImagesResponse(
                embeddings=[inference_pb2.Embedding(values=row) for row in rows]
            )

        return await self._answer(work, inference_pb2.EmbedImagesResponse(), grpc_context)

    async def EmbedTexts(  # noqa: N802
        self, request: inference_pb2.EmbedTextsRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.EmbedTextsResponse:
        """Embed texts."""

        def work() -> inference_pb2.EmbedTextsResponse:
            rows = self._models.embed_texts(request.base_artifact, list(request.texts))
            return inference_pb2.EmbedTextsResponse(
                embeddings=[inference_pb2.Embedding(values=row) for row in rows]
            )

        return await self._answer(work, inference_pb2.EmbedTextsResponse(), grpc_context)

    async def SegmentImage(  # noqa: N802
        self, request: inference_pb2.SegmentImageRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.SegmentImageResponse:
        """Label the parts of a garment."""

        def work() -> inference_pb2.SegmentImageResponse:
            label_png, labels = self._models.segment(request.base_artifact, request.image)
            return inference_pb2.SegmentImageResponse(label_png=label_png, labels=labels)

        return await self._answer(work, inference_pb2.SegmentImageResponse(), grpc_context)

    async def DescribeImage(  # noqa: N802
        self, request: inference_pb2.DescribeImageRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.DescribeImageResponse:
        """Write a caption."""

        def work() -> inference_pb2.DescribeImageResponse:
            caption = self._models.describe(request.base_artifact, request.image)
            return inference_pb2.DescribeImageResponse(caption=caption)

        return await self._answer(work, inference_pb2.DescribeImageResponse(), grpc_context)

    async def ForgetAdapter(  # noqa: N802
        self, request: inference_pb2.ForgetAdapterRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.ForgetAdapterResponse:
        """Drop an adapter from memory."""

        def work() -> inference_pb2.ForgetAdapterResponse:
            self._models.forget_adapter(request.artifact)
            return inference_pb2.ForgetAdapterResponse()

        return await self._answer(work, inference_pb2.ForgetAdapterResponse(), grpc_context)

    async def _answer(
        self, work: Callable[[], R], nothing: R, grpc_context: RayServegRPCContext
    ) -> R:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, work)
        except Exception as error:  # noqa: BLE001 - every error gets its status
            _fail(grpc_context, error)
            return nothing


def build_app(settings: Settings, *, warm_base: str = "") -> serve.Application:
    """Return the application, bound to its settings.

    Args:
        settings: Passed to every replica.
        warm_base: Artifact of a base to load before a replica counts as ready.
    """
    deployment = serve.deployment(
        InferenceReplica,
        name=DEPLOYMENT,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1,
            max_replicas=settings.model_replicas,
            # The engine has room for the steps of so many; more means that the loops are the brake.
            target_ongoing_requests=settings.limits.running_generations / 2,
        ),
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.model_gpus},
        # Those that wait do so in the replica, which knows who may.
        max_ongoing_requests=_calls(settings),
        max_queued_requests=settings.limits.queued_generations,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    return deployment.bind(settings, warm_base)


def _calls(settings: Settings) -> int:
    """Return how many calls a replica has in hand at most, those that wait included."""
    return settings.limits.running_generations + settings.limits.queued_generations


async def _until_closed(requests: AsyncIterator[inference_pb2.DiffuseRequest]) -> None:
    with contextlib.suppress(RayError):  # the proxy is gone, and the caller's connection with it
        async for _ in requests:
            pass


def _fail(context: RayServegRPCContext, error: Exception) -> None:
    status = rpc_status.to_status(to_status(error))
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(list(status.trailing_metadata))
