"""Models that are no models, behind the real InferenceService over gRPC.

What they answer follows from the pixels, so that tests can tell right from wrong: parts are found
by difference from the backdrop, embeddings are made of colours, and a drawing is the image it
started from, a little blurred everywhere, also where the mask forbids it.
"""

import asyncio
import contextlib
import io
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import cv2
import grpc
import numpy as np
from grpc_status import rpc_status
from PIL import Image

from toile.core.errors import ToileError
from toile.core.rpc.mapping import to_status
from toile.imaging.colour_words import garment_colour
from toile.imaging.colours import rgb_to_lab
from toile.v1 import inference_pb2, inference_pb2_grpc

LABELS = ("background", "body", "sleeves", "collar")

Context = grpc.aio.ServicerContext[Any, Any]
Painter = Callable[
    [inference_pb2.DiffuseRequest, Context], AsyncIterator[inference_pb2.DiffuseResponse]
]


class FakeModels(inference_pb2_grpc.InferenceServiceServicer):
    """Answers at once; `errors`, `losses`, `gate` and `broken` make it misbehave."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: list[inference_pb2.DiffuseRequest] = []
        self.forgotten: list[str] = []
        self.errors: dict[str, ToileError] = {}
        self.losses: Counter[str] = Counter()  # calls to come whose replica is killed first
        self.gate: asyncio.Event | None = None  # Diffuse waits for it after its first step
        self.drawing = asyncio.Event()  # a Diffuse call has begun
        self.cancelled = asyncio.Event()  # a Diffuse call was cancelled
        self.broken = False  # embeddings are not numbers
        self.no_drawing = False
        self.painter: Painter | None = None  # draws in place of the blur
        self.caption = "a green shirt on a white background"

    async def Diffuse(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[inference_pb2.DiffuseRequest], context: Context
    ) -> AsyncIterator[inference_pb2.DiffuseResponse]:
        """Blur the image, in three steps."""
        request = await anext(requests)
        self.requests.append(request)
        self.drawing.set()
        await self._begin("Diffuse", context)
        if self.painter is not None:
            async for event in self.painter(request, context):
                yield event
            return
        try:
            for step in range(1, 4):
                yield inference_pb2.DiffuseResponse(step={"step": step, "total_steps": 3})
                if self.gate is not None:
                    await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if not self.no_drawing:
            pixels = _decode(request.init_image)
            assert pixels.shape[:2] == (request.height, request.width)
            assert _decode(request.mask_image).shape == pixels.shape
            drawn = cv2.GaussianBlur(pixels, (3, 3), 0).astype(np.int16) + 3
            data = _png(np.clip(drawn, 0, 255).astype(np.uint8))
            yield inference_pb2.DiffuseResponse(image={"png": data})

    async def EmbedImages(  # noqa: N802 - the RPC's name
        self, request: inference_pb2.EmbedImagesRequest, context: Context
    ) -> inference_pb2.EmbedImagesResponse:
        """The mean colour of the middle."""
        await self._begin("EmbedImages", context)
        vectors = [_colour_vector(_middle(_decode(data))) for data in request.images]
        if self.broken:
            vectors = [[float("nan")] * 4 for _ in vectors]
        return inference_pb2.EmbedImagesResponse(embeddings=[{"values": v} for v in vectors])

    async def EmbedTexts(  # noqa: N802 - the RPC's name
        self, request: inference_pb2.EmbedTextsRequest, context: Context
    ) -> inference_pb2.EmbedTextsResponse:
        """The colour that the text names."""
        await self._begin("EmbedTexts", context)
        vectors = []
        for text in request.texts:
            shade = garment_colour(text)
            vectors.append(_colour_vector(np.array(shade.rgb if shade else (128, 128, 128))))
        return inference_pb2.EmbedTextsResponse(embeddings=[{"values": v} for v in vectors])

    async def SegmentImage(  # noqa: N802 - the RPC's name
        self, request: inference_pb2.SegmentImageRequest, context: Context
    ) -> inference_pb2.SegmentImageResponse:
        """What differs from the corner: sleeves in the outer quarters, body between."""
        await self._begin("SegmentImage", context)
        pixels = _decode(request.image)
        distance = np.linalg.norm(rgb_to_lab(pixels) - rgb_to_lab(pixels[0, 0]), axis=2)
        labels = (distance > 12).astype(np.uint8)
        quarter = pixels.shape[1] // 4
        for side in (slice(0, quarter), slice(-quarter, None)):
            labels[:, side] *= 2
        return inference_pb2.SegmentImageResponse(label_png=_png(labels), labels=LABELS)

    async def DescribeImage(  # noqa: N802 - the RPC's name
        self, request: inference_pb2.DescribeImageRequest, context: Context
    ) -> inference_pb2.DescribeImageResponse:
        """Always the same."""
        await self._begin("DescribeImage", context)
        return inference_pb2.DescribeImageResponse(caption=self.caption)

    async def ForgetAdapter(  # noqa: N802
        self, request: inference_pb2.ForgetAdapterRequest, context: Context
    ) -> inference_pb2.ForgetAdapterResponse:
        """Remember which."""
        await self._begin("ForgetAdapter", context)
        self.forgotten.append(request.artifact)
        return inference_pb2.ForgetAdapterResponse()

    async def _begin(self, method: str, context: Context) -> None:
        assert dict(context.invocation_metadata() or ())["application"] == "toile"
        self.calls[method] += 1
        if self.losses[method]:
            self.losses[method] -= 1
            # As Ray Serve's proxy answers for a replica that died: no details.
            await context.abort(grpc.StatusCode.INTERNAL, "The actor died unexpectedly")
        if method in self.errors:
            await context.abort_with_status(rpc_status.to_status(to_status(self.errors[method])))


@contextlib.asynccontextmanager
async def running_models() -> AsyncIterator[tuple[FakeModels, str]]:
    """Serve fake models in this event loop; yields them and their address."""
    models, server = FakeModels(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(models, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield models, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _middle(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    middle = pixels[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]
    return np.asarray(middle.reshape(-1, 3).mean(axis=0))


def _colour_vector(rgb: np.ndarray) -> list[float]:
    vector = np.append(rgb_to_lab(rgb) / 100, 0.5)
    return [float(value) for value in vector / np.linalg.norm(vector)]
