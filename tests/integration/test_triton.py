"""One UNet in a real Triton serves every LoRA, with the images of the in-process pipeline."""

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families

from integration.serving_application import decibels
from integration.shipped_onnx import UNET_CONTROL, ShippedOnnx, control_network
from toile.cli.platform.ports import free_ports
from toile.core.artifacts import ArtifactStore
from toile.core.artifacts.local import LocalStore
from toile.core.errors import (
    ComputeUnavailableError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    StoreUnavailableError,
)
from toile.diffusion.adapters import AdapterWeights, LoraLayer
from toile.diffusion.banked_unet import bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.engines import EngineProfile, Fingerprint
from toile.diffusion.pipelines import DiffusionRequest, diffuse
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.tensorrt_library import TENSORRT
from toile.diffusion.triton.client import TritonClient
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.packed import PackedFiles
from toile.diffusion.triton.repository import FrontConfig, write_model
from toile.diffusion.triton.server import TritonEnvironment, TritonPorts, TritonServer
from toile.diffusion.triton.unloading import unload_adapter
from toile.diffusion.turns import NO_HURRY, Urgency

pytestmark = pytest.mark.timeout(600)

BANK_BYTES = 6 << 20
"""Of the front under test: one adapter of rank 40 fits, two do not."""
PLANNED = "planned"
"""A front whose engine is a model of the server's; here that is not a plan of TensorRT's."""
FRONTS = {
    "unet": FrontConfig(bank_bytes=BANK_BYTES, threads=1),
    "narrow": FrontConfig(max_batch=2, batch_pixels=2 * 16 * 16, threads=1),
    "capped": FrontConfig(batch_pixels=2 * 16 * 16, threads=1),
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shipped_bundle_path(), digest="d" * 64)


@pytest.fixture(scope="module")
def in_process(bundle: Bundle) -> TorchDenoiser:
    return TorchDenoiser(bundle, bfloat16=False)


@pytest.fixture(scope="module")
def repository(
    bundle: Bundle,
    triton_environment: TritonEnvironment,
    shipped_onnx: ShippedOnnx,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    del triton_environment
    folder = tmp_path_factory.mktemp("triton") / "a space and (parentheses)"
    for name, unet, time_ids in (
        ("unet", bundle.unet, 6),
        ("refiner", bundle.refiner_unet, 5),
        (UNET_CONTROL, bundle.unet, 6),
    ):
        layout, onnx = bank_layout(unet), shipped_onnx.file(name)
        for front, config in FRONTS.items():
            if name == "unet" or front == "unet":
                write_model(
                    folder / "models",
                    front if name == "unet" else name,
                    engine=onnx,
                    layout=layout,
                    unet_config=unet.config,
                    time_ids=time_ids,
                    pooled_width=128,
                    controls=int(name == UNET_CONTROL),
                    config=config,
                )
    write_planned(folder / "models", bundle, shipped_onnx.file("unet"), folder)
    return folder / "models"


def write_planned(models: Path, bundle: Bundle, onnx: Path, folder: Path) -> None:
    """A front of an engine of TensorRT proper, and in the plan's place the ONNX file."""
    engine = folder / "unet.engine"
    engine.write_bytes(b"a plan")
    Fingerprint(
        builder=TENSORRT,
        builder_version="10",
        compute_capabilities=("9.0",),
        profiles=(EngineProfile(batch=(1, 2, 4)),),
        onnx_digest="",
        precision="fp32",
    ).save(engine)
    names = write_model(
        models,
        PLANNED,
        engine=engine,
        layout=bank_layout(bundle.unet),
        unet_config=bundle.unet.config,
        time_ids=6,
        pooled_width=128,
    )
    assert names == (f"{PLANNED}-plan", PLANNED)
    plan = models / names[0]
    assert (plan / "1" / "model.plan").read_bytes() == b"a plan"
    config = (plan / "config.pbtxt").read_text()
    for theirs, ours in (
        ('platform: "tensorrt_plan"', 'backend: "python"'),
        ('kind: KIND_GPU profile: [ "0" ]', "kind: KIND_CPU"),
    ):
        assert theirs in config
        config = config.replace(theirs, ours)
    (plan / "config.pbtxt").write_text(config)
    shutil.copyfile(onnx, plan / "1" / "unet.onnx")
    shutil.copyfile(Path(__file__).parent / "onnx_plan.py", plan / "1" / "model.py")


@pytest.fixture(scope="module")
def server(
    triton_environment: TritonEnvironment,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    made = TritonServer(
        triton_environment,
        repository,
        TritonPorts(*free_ports("127.0.0.1", 2)),
        (*FRONTS, "refiner", UNET_CONTROL, f"{PLANNED}-plan", PLANNED),
        repository.parent / "triton.log",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("links")))
        made.start()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return LocalStore(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def denoiser(bundle: Bundle, server: TritonServer, store: ArtifactStore) -> TritonDenoiser:
    return TritonDenoiser(
        server.address,
        unet_config=dict(bundle.unet.config),
        layout=bank_layout(bundle.unet),
        link=PackedFiles(store, bank_layout(bundle.unet), base_digest=bundle.digest).link,
        refiner_config=dict(bundle.refiner_unet.config),
        base_digest=bundle.digest,
        control_models={"edges": UNET_CONTROL},
    )


def drawn_by(bundle: Bundle, server: TritonServer, model: str) -> TritonDenoiser:
    """Return a denoiser of another front."""
    return TritonDenoiser(
        server.address,
        unet_config=dict(bundle.unet.config),
        layout=bank_layout(bundle.unet),
        link=lambda _: "",
        unet_model=model,
        front=FRONTS[model],
    )


def step(denoiser: TritonDenoiser, urgency: Urgency = NO_HURRY) -> None:
    with denoiser.session([], urgency) as unet:
        unet(**ARGUMENTS)


def adapter(bundle: Bundle, seed: int, *, rank: int = 8, weight: float = 1.0) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: LoraLayer(
            torch.randn(rank, group.in_features, generator=generator) / rank,
            torch.randn(group.out_features, rank, generator=generator) * 0.05,
            float(rank),
        )
        for group in bank_layout(bundle.unet).groups
        for path in group.targets
    }
    key = f"projects/p/models/m{seed}-{rank}/versions/1"
    return LoadedAdapter(key, AdapterWeights(layers), weight)


def request_for(adapters: list[LoadedAdapter], seed: int = 7, **more: object) -> DiffusionRequest:
    return DiffusionRequest(
        prompt="a red dress", seeds=[seed], steps=6, guidance_scale=3.0, adapters=adapters, **more
    )


def metrics(server: TritonServer, model: str = "unet") -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{server.ports.metrics}/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model") == model
    }


@pytest.mark.parametrize("refiner_strength", [0.0, 0.4])
def test_images_are_those_of_the_in_process_pipeline(
    bundle, in_process, denoiser, refiner_strength
):
    pictures = []
    for adapters in (
        [],
        [adapter(bundle, 1)],
        [adapter(bundle, 1, weight=0.5), adapter(bundle, 2)],
        [replace(adapter(bundle, 1), schedule=((0.0, 0.0), (0.5, 1.5), (1.0, -0.5)))],
    ):
        wanted = request_for(adapters, refiner_strength=refiner_strength)
        (ours,) = diffuse(bundle, denoiser, wanted)
        (theirs,) = diffuse(bundle, in_process, wanted)
        assert decibels(ours, theirs) >= 50
        pictures.append(ours)
    assert decibels(pictures[0], pictures[1]) < 30, "the adapter changes nothing"
    assert decibels(pictures[3], pictures[1]) < 30, "the schedule changes nothing"


@pytest.mark.parametrize(("width", "height"), [(136, 120), (72, 88), (104, 160)])
def test_sides_are_any_multiples_of_8_pixels(bundle, in_process, denoiser, width, height):
    wanted = replace(
        request_for([adapter(bundle, 1)], refiner_strength=0.4), width=width, height=height
    )
    (ours,) = diffuse(bundle, denoiser, wanted)
    (theirs,) = diffuse(bundle, in_process, wanted)
    assert ours.size == (width, height)
    assert decibels(ours, theirs) >= 50


def test_a_control_holds_as_it_does_in_process(bundle, in_process, denoiser):
    network = control_network()
    sketch = Image.new("RGB", (104, 168))
    ImageDraw.Draw(sketch).ellipse((20, 30, 70, 140), outline="white", width=3)
    control = LoadedControl(network, sketch, 0.8, start=0.2, kind="edges")
    assert denoiser.has_controls([control])
    pictures = []
    for controls in ([control], [replace(control, scale=0.0)]):
        wanted = request_for([adapter(bundle, 1)], controls=controls)
        (ours,) = diffuse(bundle, denoiser, wanted)
        (theirs,) = diffuse(bundle, in_process, wanted)
        assert decibels(ours, theirs) >= 50
        pictures.append(ours)
    assert decibels(*pictures) < 30, "the control changes nothing"


def test_controls_without_an_engine_are_not_drawn_there(denoiser):
    network = control_network()
    own = LoadedControl(network, Image.new("RGB", (128, 128)), kind="edges")
    for controls in ([replace(own, kind="")], [replace(own, kind="parts")], [own, own]):
        assert not denoiser.has_controls(controls)
        with (
            pytest.raises(FailedPreconditionError) as caught,
            denoiser.session([], controls=controls),
        ):
            pass
        assert caught.value.reason == "NO_CONTROLS"


def test_requests_with_different_adapters_share_batches(bundle, in_process, denoiser, server):
    adapters = [adapter(bundle, seed, rank=4 + 4 * (seed % 3)) for seed in range(10, 16)]
    before = metrics(server)
    drawn: dict[int, Image.Image] = {}
    start = threading.Barrier(len(adapters))

    def draw(index: int) -> None:
        start.wait()
        (drawn[index],) = diffuse(bundle, denoiser, request_for([adapters[index]], seed=index))

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(len(adapters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = metrics(server)
    samples = after["toile_engine_samples_total"] - before.get("toile_engine_samples_total", 0)
    calls = after["toile_engine_calls_total"] - before.get("toile_engine_calls_total", 0)
    assert samples == 2 * 6 * len(adapters)  # guidance makes two of an image
    assert samples / calls > 2.5, "no two requests shared a batch"
    assert after["toile_bank_loads_total"] - before.get("toile_bank_loads_total", 0) == 6
    for index, loaded in enumerate(adapters):
        (alone,) = diffuse(bundle, in_process, request_for([loaded], seed=index))
        assert decibels(drawn[index], alone) >= 50


ARGUMENTS = {
    "sample": torch.ones(2, 4, 16, 16),
    "timestep": torch.tensor(500),
    "encoder_hidden_states": torch.ones(2, 77, 256),
    "added_cond_kwargs": {
        "text_embeds": torch.ones(2, 128),
        "time_ids": torch.full((2, 6), 128.0),
    },
}


def test_a_restarted_server_costs_the_step_a_wait(bundle, denoiser, server):
    """It comes back without the adapter, which is given to it again."""
    with denoiser.session([adapter(bundle, 30)]) as unet:
        first = unet(**ARGUMENTS).sample
        server.kill()
        again = threading.Timer(1.0, server.start)
        again.start()
        assert torch.equal(unet(**ARGUMENTS).sample, first)
        again.join()


@pytest.mark.parametrize("_", range(2))  # Triton forgives the first: the front's bytecode is new
def test_a_front_that_stands_still_costs_the_step_a_wait(bundle, denoiser, server, _):
    """The server takes it for dead and is told to start another.

    Should it end over that before it is told, it is started again.
    """
    with denoiser.session([adapter(bundle, 31)]) as unet, ThreadPoolExecutor(1) as pool:
        first = unet(**ARGUMENTS).sample
        front = front_of(server, "unet")
        front.suspend()
        again = pool.submit(lambda: unet(**ARGUMENTS).sample)
        time.sleep(3)
        with contextlib.suppress(psutil.NoSuchProcess):
            front.resume()
        while not again.done():
            if server.process.poll() is not None:
                server.kill()
                server.start()
            time.sleep(0.1)
        assert torch.equal(again.result(), first)
        assert ended(front)
        assert torch.equal(unet(**ARGUMENTS).sample, first)


def test_a_model_that_was_closed_costs_the_step_a_wait(denoiser, server):
    """As by another replica, which closes an unsound one before it opens it anew."""
    with denoiser.session([]) as unet:
        first = unet(**ARGUMENTS).sample
        with TritonClient(server.address) as client:
            client.unload("unet", seconds=10.0)
        assert torch.equal(unet(**ARGUMENTS).sample, first)


def ended(process: psutil.Process) -> bool:
    """Wait for a process that its parent may not ask for; say whether it ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(300):
            if process.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        else:
            return False
    return True


def front_of(server: TritonServer, model: str) -> psutil.Process:
    """Return the process of a front."""
    (front,) = (
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and any(part.endswith(f"/{model}/1/model.py") for part in process.cmdline())
    )
    return front


def test_a_server_that_ends_answers_who_draws_and_takes_nobody_new(bundle, denoiser, server):
    told = server.log.stat().st_size
    try:
        with ThreadPoolExecutor(1) as pool:
            with denoiser.session([]) as unet:
                first = unet(**ARGUMENTS).sample
                ending = pool.submit(server.stop)
                while denoiser.is_ready():
                    time.sleep(0.05)
                assert torch.equal(unet(**ARGUMENTS).sample, first)
                assert not ending.done()
            ending.result()
    finally:
        server.start()
    waits = server.log.read_bytes()[told:].count(b"HTTP service connections")  # one a second
    assert 1 <= waits < 8, "it waits for the drawing, not for the ten seconds that it may"


def test_a_server_that_stays_away_is_given_up_at_the_deadline(bundle, denoiser, server):
    server.stop()
    try:
        urgency = Urgency(deadline=time.monotonic() + 1.0)
        with denoiser.session([], urgency) as unet, pytest.raises(DeadlineError):
            unet(**ARGUMENTS)
        assert time.monotonic() < urgency.deadline + 1.0
        assert not denoiser.is_ready()
    finally:
        server.start()
    assert denoiser.is_ready()


def test_an_adapter_that_was_evicted_is_read_again(bundle, server, denoiser):
    """The bank's budget here holds one adapter of rank 40, so that two push each other out."""
    two = [adapter(bundle, seed, rank=40) for seed in (50, 51)]
    before = metrics(server)
    for _ in range(3):
        for one in two:
            with denoiser.session([one]) as unet:
                unet(**ARGUMENTS)
    after = metrics(server)
    assert after["toile_bank_loads_total"] - before["toile_bank_loads_total"] == 6
    assert after["toile_bank_evictions_total"] - before["toile_bank_evictions_total"] >= 5
    assert after["toile_bank_bytes"] <= BANK_BYTES


def test_a_store_that_fails_for_a_moment_costs_the_step_a_wait(bundle, server, store):
    """Before there is a link, and then where the link leads."""
    layout, failures = bank_layout(bundle.unet), [StoreUnavailableError("away")]
    files = PackedFiles(store, layout)
    links = ["file:///no/such/file"]

    def link(adapter: LoadedAdapter) -> str:
        if failures:
            raise failures.pop()
        return links.pop() if links else files.link(adapter)

    made = TritonDenoiser(
        server.address, unet_config=dict(bundle.unet.config), layout=layout, link=link
    )
    one = adapter(bundle, 55)
    with made.session([one]) as unet:
        predicted = unet(**ARGUMENTS).sample
        assert (failures, links) == ([], [])
        unload_adapter(server.address, one.key)
        assert torch.equal(unet(**ARGUMENTS).sample, predicted)


def test_credentials_that_the_store_refuses_are_told_at_once(bundle, server):
    def link(_: LoadedAdapter) -> str:
        raise StoreUnavailableError("refused", reason="STORE_DENIED")

    made = TritonDenoiser(
        server.address,
        unet_config=dict(bundle.unet.config),
        layout=bank_layout(bundle.unet),
        link=link,
    )
    started = time.monotonic()
    with made.session([adapter(bundle, 56)]) as unet, pytest.raises(StoreUnavailableError):
        unet(**ARGUMENTS)
    assert time.monotonic() - started < 10


def test_steps_of_one_caller_follow_each_other_at_once(bundle, server):
    """With any queue policy in its config, Triton's batcher looks again after 500 ms at times."""
    with drawn_by(bundle, server, "unet").session([]) as unet:
        seconds = []
        for _ in range(150):
            started = time.monotonic()
            unet(**ARGUMENTS)
            seconds.append(time.monotonic() - started)
    stalls = [one for one in seconds if 0.49 < one - sorted(seconds)[75] < 0.6]
    assert len(stalls) < 3, stalls


def test_an_engine_that_is_a_model_of_the_server_is_called_in_place(
    bundle, in_process, server, store
):
    layout = bank_layout(bundle.unet)
    planned = TritonDenoiser(
        server.address,
        unet_config=dict(bundle.unet.config),
        layout=layout,
        link=PackedFiles(store, layout).link,
        unet_model=PLANNED,
    )
    before = metrics(server, PLANNED)
    with ThreadPoolExecutor(4) as pool:
        wanted = [request_for([adapter(bundle, seed)], seed=seed) for seed in range(80, 84)]
        ours = list(pool.map(lambda one: next(diffuse(bundle, planned, one)), wanted))
    for one, picture in zip(wanted, ours, strict=True):
        (alone,) = diffuse(bundle, in_process, one)
        assert decibels(picture, alone) >= 50
    after = metrics(server, PLANNED)
    samples = after["toile_engine_samples_total"] - before.get("toile_engine_samples_total", 0)
    calls = after["toile_engine_calls_total"] - before.get("toile_engine_calls_total", 0)
    assert samples == 2 * 6 * len(wanted)
    assert 2 < samples / calls <= 4, "batches are shared, up to the profile's"


def test_an_adapter_is_unloaded_by_name_while_others_draw(bundle, denoiser, server):
    """It costs those who use it a reading, and changes no picture."""
    one, other = adapter(bundle, 70), adapter(bundle, 71)
    with denoiser.session([one]) as first, denoiser.session([other]) as second:
        wanted = first(**ARGUMENTS).sample, second(**ARGUMENTS).sample
        before = metrics(server)
        stop = threading.Event()

        def drop() -> None:
            while not stop.wait(0.02):
                unload_adapter(server.address, one.key)

        dropping = threading.Thread(target=drop)
        dropping.start()
        try:
            for _ in range(30):
                assert torch.equal(first(**ARGUMENTS).sample, wanted[0])
                assert torch.equal(second(**ARGUMENTS).sample, wanted[1])
        finally:
            stop.set()
            dropping.join()
    unload_adapter(server.address, one.key)
    unload_adapter(server.address, other.key)
    after = metrics(server)
    assert after["toile_bank_unloads_total"] - before.get("toile_bank_unloads_total", 0) >= 5
    assert after["toile_bank_loads_total"] - before["toile_bank_loads_total"] >= 3
    size = 8 * bank_layout(bundle.unet).bytes_per_rank(itemsize=4)
    assert after["toile_bank_bytes"] <= before["toile_bank_bytes"] - 2 * size


def test_who_waits_too_long_in_the_queue_is_told(bundle, server):
    denoiser = drawn_by(bundle, server, "narrow")
    with ThreadPoolExecutor(4) as pool:
        step(denoiser)
        calls = [pool.submit(step, denoiser) for _ in range(4)]
        with pytest.raises(DeadlineError):
            step(denoiser, Urgency(deadline=time.monotonic() + 0.005))
        assert [call.result() for call in calls] == [None] * 4


def test_who_is_waited_for_goes_first(bundle, server):
    order: list[str] = []
    denoiser = drawn_by(bundle, server, "narrow")
    with ThreadPoolExecutor(5) as pool:

        def timed(name: str, priority: int) -> None:
            step(denoiser, Urgency(priority=priority))
            order.append(name)

        step(denoiser)
        calls = [pool.submit(timed, "batch", 2) for _ in range(4)]
        time.sleep(0.005)  # they are in the queue, the first is in the engine
        calls.append(pool.submit(timed, "interactive", 1))
        for call in calls:
            call.result()
    assert order.index("interactive") < 3


def test_a_batch_holds_no_more_than_its_cap(bundle, server):
    denoiser = drawn_by(bundle, server, "capped")
    with ThreadPoolExecutor(6) as pool:
        for call in [pool.submit(step, denoiser) for _ in range(12)]:
            call.result()
    seen = metrics(server, "capped")
    assert seen["toile_engine_samples_total"] == 24
    assert seen["toile_engine_calls_total"] == 12


def test_what_is_no_packed_adapter_is_an_error_and_the_server_goes_on(bundle, denoiser, store):
    broken = adapter(bundle, 60)
    files = PackedFiles(store, bank_layout(bundle.unet))
    store.put(files.key(broken.key), b"not safetensors")
    with (
        denoiser.session([broken]) as unet,
        pytest.raises(ComputeUnavailableError, match="not a packed adapter"),
    ):
        unet(**ARGUMENTS)
    with denoiser.session([]) as unet:
        unet(**ARGUMENTS)


def test_what_cannot_be_served_is_refused_before_a_step(bundle, denoiser):
    other = AdapterWeights(adapter(bundle, 1).weights.layers, {"toile.base_digest": "e" * 64})
    for adapters, reason in (
        ([adapter(bundle, 40, rank=40), adapter(bundle, 41, rank=32)], "RANK_TOO_HIGH"),
        ([LoadedAdapter("x", other)], "ADAPTER_MISMATCH"),
        ([adapter(bundle, 42), adapter(bundle, 42)], "DUPLICATE_ADAPTER"),
    ):
        with pytest.raises(InvalidArgumentError) as caught, denoiser.session(adapters):
            pass
        assert caught.value.reason == reason


def test_an_environment_without_a_server_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FailedPreconditionError, match="make triton") as caught:
        TritonEnvironment.open(tmp_path)
    assert caught.value.reason == "NO_TRITON"
