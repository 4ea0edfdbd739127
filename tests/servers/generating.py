"""Asking the generate service, and models that draw at once."""

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from PIL import Image
from sqlalchemy import func, select

from servers.platform import MODEL_VERSION, PARENT, Platform, png
from toile.core.catalog.models import ModelVersionRow
from toile.core.errors import ToileError
from toile.core.rpc.mapping import from_rpc_error, to_status
from toile.v1 import generate_pb2, generate_pb2_grpc, inference_pb2


class Painter:
    """Draws a flat colour that follows from the seed, or the negative of what it starts from.

    Masks do not hinder it. It breaks after so many images.
    """

    def __init__(self) -> None:
        self.requests: list[inference_pb2.DiffuseRequest] = []
        self.fail_after: tuple[int, ToileError] | None = None
        self.pause_after: int | None = None
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def draw(
        self, request: inference_pb2.DiffuseRequest, context: Any
    ) -> AsyncIterator[inference_pb2.DiffuseResponse]:
        self.requests.append(request)
        self.begun.set()
        try:
            for index, seed in enumerate(request.seeds):
                await self._misbehave(index, context)
                yield inference_pb2.DiffuseResponse(
                    step={"image_index": index, "step": 1, "total_steps": 1}
                )
                if request.preview_interval:
                    yield inference_pb2.DiffuseResponse(
                        preview={"image_index": index, "step": 1, "jpeg": b"jpeg"}
                    )
                pixels = self._pixels(request, seed)
                yield inference_pb2.DiffuseResponse(
                    image={"image_index": index, "png": png(pixels)}
                )
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @staticmethod
    def _pixels(request: inference_pb2.DiffuseRequest, seed: int) -> np.ndarray:
        if not request.init_image:
            return np.full((request.height, request.width, 3), seed % 256, np.uint8)
        with Image.open(io.BytesIO(request.init_image)) as image:
            start = image.convert("RGB").resize((request.width, request.height))
        return np.asarray(255 - np.asarray(start), np.uint8)

    async def _misbehave(self, index: int, context: Any) -> None:
        if self.fail_after is not None and index == self.fail_after[0]:
            await context.abort_with_status(rpc_status.to_status(to_status(self.fail_after[1])))
        if self.pause_after == index:
            await self.go_on.wait()


def stub(platform: Platform) -> Any:
    return generate_pb2_grpc.GenerateServiceStub(platform.channel)


def call(platform: Platform, **fields: Any) -> Any:
    request = {"parent": PARENT, "prompt": "a red dress", "seed": 7, **fields}
    return stub(platform).Generate(generate_pb2.GenerateRequest(**request))


async def generate(platform: Platform, **fields: Any) -> list[generate_pb2.GenerateResponse]:
    try:
        return [event async for event in call(platform, **fields)]
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def refused(platform: Platform, **fields: Any) -> ToileError:
    with pytest.raises(ToileError) as caught:
        await generate(platform, **fields)
    return caught.value


async def download(platform: Platform, name: str) -> bytes:
    chunks = stub(platform).DownloadImage(generate_pb2.DownloadImageRequest(name=name))
    return b"".join([message.chunk async for message in chunks])


async def upload(platform: Platform, data: bytes, prompt: str = "") -> Any:
    async def messages() -> AsyncIterator[generate_pb2.UploadImageRequest]:
        yield generate_pb2.UploadImageRequest(header={"parent": PARENT, "prompt": prompt})
        for start in range(0, len(data), 1000):
            yield generate_pb2.UploadImageRequest(chunk=data[start : start + 1000])

    try:
        return (await stub(platform).UploadImage(messages())).image
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def kinds(events: list[generate_pb2.GenerateResponse]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


def count(platform: Platform, table: Any) -> int:
    with platform.catalog.reading() as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


async def only_generation(platform: Platform) -> generate_pb2.Generation:
    request = generate_pb2.ListGenerationsRequest(parent=PARENT)
    (generation,) = (await stub(platform).ListGenerations(request)).generations
    return generation


async def ended(platform: Platform) -> generate_pb2.Generation:
    """The only generation, once it runs no more."""
    async with asyncio.timeout(10):
        while True:
            generation = await only_generation(platform)
            if generation.state != generate_pb2.GENERATION_STATE_RUNNING:
                return generation
            await asyncio.sleep(0.02)


def add_adapter(platform: Platform) -> None:
    """An adapter of the default base, with the lineage of a dataset."""
    platform.add_dataset(np.zeros((8, 8, 3), np.uint8))
    platform.add_generation(weight=1.0)
    with platform.catalog.transaction() as session:
        session.get_one(ModelVersionRow, MODEL_VERSION).base = "bases/tiny"
