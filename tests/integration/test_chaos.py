"""Traffic with different LoRAs over two replicas and a real Triton, while each of them is lost.

Every request is answered once, with the images of a drawing that nothing disturbed.
"""

import asyncio
import io
import itertools
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from integration.ray_head import RayHead
from integration.serving_application import (
    PATIENCE_SECONDS,
    decibels,
    publish_lora,
    serving_command,
)
from integration.shipped_onnx import ShippedOnnx
from toile.cli.platform.ports import free_ports
from toile.core.artifacts import open_store
from toile.core.bases import import_base
from toile.core.catalog.engine import open_catalog
from toile.core.inference import Inference
from toile.core.settings import Limits, Settings
from toile.diffusion.banked_unet import bank_layout
from toile.diffusion.networks import BASE_TIME_IDS, UNET
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.triton.packed import empty_unet
from toile.diffusion.triton.repository import write_model
from toile.diffusion.triton.server import TritonEnvironment, TritonPorts, TritonServer
from toile.serving.engines import model_name
from toile.v1 import inference_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE_SECONDS)]

CLIENTS = 4
ADAPTERS = 4
SEEDS = (1, 2)
STEPS = 4
SIDE = 128
LEAST_DECIBELS = 50.0
"""Of equal images: an engine's last bits depend on the size of a batch."""


@dataclass
class Plant:
    """Two replicas at most, and the server they draw with."""

    settings: Settings
    head: RayHead
    server: TritonServer
    base: str
    expected: dict[int, list[Image.Image]] = field(default_factory=dict)
    """Images by adapter, in the order of `SEEDS`."""

    def deploy(self, replicas: int) -> None:
        """Deploy the application, or another version of it."""
        self.settings = self.settings.model_copy(update={"model_replicas": replicas})
        told = self.settings.inference_address  # Serve keeps the port that it has
        port = told.rpartition(":")[2] or "0"
        answer = serving_command(self.settings, self.head.address, "deploy", "--port", port)
        address = f"127.0.0.1:{answer['port']}"
        self.settings = self.settings.model_copy(update={"inference_address": address})

    @property
    def artifacts(self) -> Path:
        return self.settings.home_path / "artifacts"

    def replicas(self) -> set[int]:
        """Their process ids."""
        return {process.pid for process in self.head.processes("ServeReplica")}

    def request(self, adapter: int) -> inference_pb2.DiffuseRequest:
        return inference_pb2.DiffuseRequest(
            base_artifact=self.base,
            prompt="a red dress",
            seeds=SEEDS,
            steps=STEPS,
            guidance_scale=4.0,
            width=SIDE,
            height=SIDE,
            adapters=[inference_pb2.Adapter(artifact=artifact_of(adapter), weight=1.0)],
        )

    def metric(self, name: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.server.ports.metrics}/metrics").text
        families = text_string_to_metric_families(text)
        return sum(s.value for family in families for s in family.samples if s.name == name)


def artifact_of(adapter: int) -> str:
    return f"projects/p/models/m{adapter}/versions/1/job"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base without what would want further engines."""
    shipped = shipped_bundle_path()
    assert shipped is not None
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return Path(
        shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("refiner", "controlnet"))
    )


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Serve keeps the port that it has on a cluster, so this has a cluster of its own."""
    head = RayHead()
    try:
        head.start()
        yield head
    finally:
        head.stop()


@pytest.fixture(scope="module")
def plant(
    head: RayHead,
    base_folder: Path,
    shipped_onnx: ShippedOnnx,
    triton_environment: TritonEnvironment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Plant]:
    home = tmp_path_factory.mktemp("home")
    ports = TritonPorts(*free_ports("127.0.0.1", 2))
    settings = Settings(
        home=home,
        triton_address=f"127.0.0.1:{ports.http}",
        limits=Limits(running_generations=2, queued_generations=8),
    )
    catalog, store = open_catalog(settings), open_store(settings)
    catalog.migrate()
    base = import_base(settings, catalog, store, base_folder)
    catalog.close()
    for adapter in range(ADAPTERS + 1):
        lora = home / f"lora{adapter}"
        publish_lora(store, artifact_of(adapter), lora, base_folder, base.digest, adapter)
    unet, name = empty_unet(base_folder), model_name(base.digest, UNET)
    write_model(
        home / "models",
        name,
        engine=shipped_onnx.file("unet"),
        layout=bank_layout(unet),
        unet_config=unet.config,
        time_ids=BASE_TIME_IDS,
        pooled_width=128,
    )
    server = TritonServer(triton_environment, home / "models", ports, (name,), home / "triton.log")
    server.start()
    try:
        plant = Plant(settings, head, server, base.artifact)
        plant.deploy(replicas=2)
        yield plant
    finally:
        server.stop()


@pytest.fixture
async def models(plant: Plant) -> AsyncIterator[Inference]:
    async with Inference.connect(plant.settings) as inference:
        yield inference


class Traffic:
    """Clients that ask for one drawing after another and look at every answer."""

    def __init__(self, plant: Plant, models: Inference) -> None:
        self._plant, self._models = plant, models
        self._over = False
        self.answered = 0
        self.begun: dict[int, list[tuple[int, int]]] = {}
        """Of drawings under way: the steps they told of, each with its image."""
        self._clients = [asyncio.create_task(self._client(one)) for one in range(CLIENTS)]

    async def _client(self, number: int) -> None:
        for turn in itertools.count():
            if self._over:
                return
            adapter = (number + turn) % ADAPTERS
            self.begun[number] = steps = []
            images = await drawn(self._models, self._plant.request(adapter), steps)
            for image, expected in zip(images, self._plant.expected[adapter], strict=True):
                assert decibels(image, expected) >= LEAST_DECIBELS
            self.answered += 1

    async def flows(self, answers: int = CLIENTS + 1) -> None:
        """Wait for further answers."""
        wanted = self.answered + answers
        await self.until(lambda: self.answered >= wanted)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; a client that has failed fails here."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            for client in self._clients:
                if client.done():
                    client.result()
            await asyncio.sleep(0.1)

    async def end(self) -> None:
        """Wait for the answers that are due."""
        self._over = True
        await asyncio.gather(*self._clients)

    async def abandon(self) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)


@pytest.fixture
async def traffic(plant: Plant, models: Inference) -> AsyncIterator[Traffic]:
    """Flows already; what it is due is waited for in the end."""
    for adapter in range(ADAPTERS):
        if adapter not in plant.expected:
            plant.expected[adapter] = await drawn(models, plant.request(adapter), [])
    assert decibels(plant.expected[0][0], plant.expected[1][0]) < 30, "adapters change nothing"
    made = Traffic(plant, models)
    try:
        await made.flows(1)
        yield made
        await made.flows()
        await made.end()
    finally:
        await made.abandon()


async def drawn(
    models: Inference, request: inference_pb2.DiffuseRequest, steps: list[tuple[int, int]]
) -> list[Image.Image]:
    """Return the images, each told of once; `steps` gets (image, step) as they are told."""
    images: dict[int, Image.Image] = {}
    async for event in models.diffuse(request):
        if event.HasField("step"):
            steps.append((event.step.image_index, event.step.step))
        elif event.HasField("image"):
            assert event.image.image_index not in images, "an image was told of twice"
            images[event.image.image_index] = Image.open(io.BytesIO(event.image.png)).convert("RGB")
    assert sorted(images) == list(range(len(request.seeds)))
    return [images[index] for index in sorted(images)]


async def two_replicas(plant: Plant, traffic: Traffic) -> set[int]:
    """The queue has another one come."""
    await traffic.until(lambda: len(plant.replicas()) == 2)
    await traffic.flows()
    return plant.replicas()


async def test_a_killed_replica_costs_a_retry(plant: Plant, traffic: Traffic) -> None:
    before = await two_replicas(plant, traffic)
    victim = plant.head.processes("ServeReplica")[0]
    victim.kill()
    await traffic.flows()
    after = await two_replicas(plant, traffic)
    assert victim.pid not in after
    assert after & before, "the other one stayed"


async def test_a_restarted_server_costs_a_retry(plant: Plant, traffic: Traffic) -> None:
    plant.server.kill()
    await asyncio.sleep(1)
    await asyncio.to_thread(plant.server.start)
    await traffic.flows()
    assert plant.metric("toile_bank_loads_total") >= ADAPTERS


async def test_adapters_leave_by_name_and_come_back(
    plant: Plant, traffic: Traffic, models: Inference
) -> None:
    loads = plant.metric("toile_bank_loads_total")
    for _ in range(3):
        for adapter in range(ADAPTERS):
            await models.forget_adapter(artifact_of(adapter))
        await traffic.flows(CLIENTS // 2)
    assert plant.metric("toile_bank_unloads_total") >= ADAPTERS
    assert plant.metric("toile_bank_loads_total") >= loads + ADAPTERS


async def test_a_store_that_is_away_for_a_moment_costs_a_wait(
    plant: Plant, traffic: Traffic, models: Inference
) -> None:
    """For an adapter that nobody has drawn with, and for those that Triton lost."""
    away = plant.artifacts.with_name("away")
    plant.artifacts.rename(away)
    try:
        newcomer = asyncio.create_task(drawn(models, plant.request(ADAPTERS), []))
        for adapter in range(ADAPTERS):
            await models.forget_adapter(artifact_of(adapter))
        await asyncio.sleep(3)
        assert not newcomer.done()
    finally:
        away.rename(plant.artifacts)
    images = await newcomer
    await traffic.flows()
    again = await drawn(models, plant.request(ADAPTERS), [])
    assert all(decibels(*pair) >= LEAST_DECIBELS for pair in zip(images, again, strict=True))
    assert decibels(images[0], plant.expected[0][0]) < 30


async def test_replicas_that_go_finish_their_drawings(plant: Plant, traffic: Traffic) -> None:
    """A new version of the application, of one replica, takes the place of two."""
    before = await two_replicas(plant, traffic)
    deploying = asyncio.create_task(asyncio.to_thread(plant.deploy, 1))
    drawings: list[list[tuple[int, int]]] = []
    while not (deploying.done() and not before & plant.replicas()):
        drawings += [one for one in traffic.begun.values() if not any(one is d for d in drawings)]
        await traffic.flows(1)
    await deploying
    await traffic.flows()
    assert len(plant.replicas()) == 1
    assert len(drawings) > CLIENTS
    for steps in drawings:
        for image in range(len(SEEDS)):
            told = [step for index, step in steps if index == image]
            assert told == sorted(set(told)), "a drawing began anew"
