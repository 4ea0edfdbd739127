"""Where a drawing is denoised: in Triton when it has what the drawing needs, else here."""

import gc
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel

from toile.core.artifacts import open_store
from toile.core.errors import InvalidArgumentError
from toile.core.settings import EngineSettings, Settings
from toile.diffusion.adapters import AdapterWeights, LoraLayer, linear_targets
from toile.diffusion.banked_unet import bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import LoadedAdapter, TorchDenoiser
from toile.diffusion.shipped import shipped_bundle_path
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.repository import FrontConfig
from toile.serving import denoisers
from toile.serving.denoisers import EngineDenoiser, open_denoiser
from toile.serving.engines import control_part, front_config, model_name, parts_of

EDGES = cast("LoadedControl", "edges")
FOLDS = cast("LoadedControl", "folds")


class Place:
    """A denoiser that says who it is."""

    def __init__(self, name: str, *, ready: bool = True) -> None:
        self.name, self.ready, self.asked = name, ready, 0
        self.released = threading.Event()

    def is_ready(self) -> bool:
        self.asked += 1
        return self.ready

    def has_controls(self, controls: Sequence[Any]) -> bool:
        return list(controls) == [EDGES]

    def release(self) -> None:
        self.released.set()

    @contextmanager
    def session(self, *_: Any) -> Iterator[str]:
        yield self.name

    refiner_session = session

    def samples_at_once(self, height: int, width: int) -> int:
        return 16 if self.name == "there" else 1


UNET_CONFIG = json.loads((shipped_bundle_path() / "unet/config.json").read_text())


def place(denoiser: EngineDenoiser, *controls: LoadedControl) -> object:
    with denoiser.session([], controls=controls) as name:
        return name


@pytest.fixture
def there() -> Place:
    return Place("there", ready=False)


@pytest.fixture
def denoiser(there: Place, monkeypatch: pytest.MonkeyPatch) -> EngineDenoiser:
    monkeypatch.setattr(denoisers, "ASK_AGAIN_SECONDS", 0.0)
    return EngineDenoiser(cast("Any", Place("here")), cast("Any", there))


def test_images_are_drawn_at_once_where_they_share_batches(
    denoiser: EngineDenoiser, there: Place
) -> None:
    assert denoiser.samples_at_once(16, 16) == 1
    there.ready = True
    assert denoiser.samples_at_once(16, 16) == 16


def test_a_batch_has_fewer_large_samples() -> None:
    made = TritonDenoiser(
        "127.0.0.1:1",
        unet_config=UNET_CONFIG,
        layout=cast("Any", None),
        link=lambda _: "",
        front=FrontConfig(max_batch=16, batch_pixels=8 * 128 * 128),
    )
    assert [made.samples_at_once(side, side) for side in (16, 64, 128, 256)] == [16, 16, 8, 2]


def test_it_is_here_until_the_server_is_ready_and_then_there(
    denoiser: EngineDenoiser, there: Place
) -> None:
    assert place(denoiser) == place(denoiser, EDGES) == "here"
    there.ready = True
    assert place(denoiser) == "there"
    with denoiser.refiner_session() as name:
        assert name == "there"
    there.ready = False  # a server that goes away is waited for
    asked = there.asked
    assert place(denoiser) == "there"
    assert there.asked == asked


def test_a_server_that_is_there_from_the_start_leaves_the_weights_unread(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    before = weights_in_memory()
    bundle = Bundle.load(tiny_bundle)
    here = TorchDenoiser(bundle, bfloat16=False)
    denoiser = EngineDenoiser(here, cast("Any", Place("there")))
    with denoiser.session([]), denoiser.refiner_session():
        pass
    assert weights_in_memory() == before
    with denoiser.session([], controls=[FOLDS]) as unet:  # no engine has it
        assert sum(weight.numel() for weight in unet.parameters()) > 0
        assert weights_in_memory() > before


def test_weights_are_let_go_of_once_the_server_is_there(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is open meanwhile keeps them until it ends; adapters are loaded again."""
    monkeypatch.setattr(denoisers, "ASK_AGAIN_SECONDS", 0.0)
    before = weights_in_memory()
    bundle = Bundle.load(tiny_bundle)
    there = Place("there", ready=False)
    here = TorchDenoiser(bundle, bfloat16=False)
    denoiser = EngineDenoiser(here, cast("Any", there))
    adapter = LoadedAdapter("a", small_lora(bundle.unet))
    with denoiser.refiner_session():
        pass
    with denoiser.session([adapter]) as unet:
        there.ready = True
        assert place(denoiser) == "there"
        assert weights_in_memory() > before
        assert len(unet.active_adapters()) == 1
    del unet
    deadline = time.monotonic() + 60
    while weights_in_memory() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert weights_in_memory() == before
    assert here.resident_bytes == 0
    with denoiser.session([adapter], controls=[FOLDS]) as unet:
        assert len(unet.active_adapters()) == 1


def weights_in_memory() -> int:
    """UNets of this process that have weights."""
    gc.collect()
    return sum(
        type(one) is UNet2DConditionModel and not next(one.parameters()).is_meta
        for one in gc.get_objects()
    )


def small_lora(unet: UNet2DConditionModel) -> AdapterWeights:
    path, (inputs, outputs) = next(iter(linear_targets(unet).items()))
    return AdapterWeights({path: LoraLayer(torch.ones(2, inputs), torch.ones(outputs, 2), 1.0)})


def test_controls_that_no_engine_has_are_here(denoiser: EngineDenoiser, there: Place) -> None:
    there.ready = True
    assert place(denoiser, EDGES) == "there"
    assert place(denoiser, FOLDS) == place(denoiser, EDGES, FOLDS) == "here"


def dora(target: str, inputs: int, outputs: int) -> LoadedAdapter:
    layer = LoraLayer(
        torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0, magnitude=torch.ones(outputs)
    )
    return LoadedAdapter("dora", AdapterWeights({target: layer}))


def test_doras_are_here(denoiser: EngineDenoiser, there: Place) -> None:
    there.ready = True
    with denoiser.session([dora("a.to_q", 2, 2)], controls=[EDGES]) as name:
        assert name == "here"


def test_an_engine_refuses_a_dora_by_name(tiny_bundle: Path) -> None:
    layout = bank_layout(Bundle.load(tiny_bundle).unet)
    group = layout.groups[0]
    made = TritonDenoiser("127.0.0.1:1", unet_config=UNET_CONFIG, layout=layout, link=lambda _: "")
    adapter = dora(group.targets[0], group.in_features, group.out_features)
    with pytest.raises(InvalidArgumentError) as caught, made.session([adapter]):
        pass
    assert caught.value.reason == "UNSUPPORTED_ADAPTER"
    assert caught.value.metadata == {"feature": "DoRA", "field": "adapters"}


def test_engines_are_of_what_a_base_has() -> None:
    plain = ["model_index.json", "unet/config.json", "vae/config.json"]
    assert parts_of(plain) == ["unet"]
    more = ["controlnet/parts/config.json", "controlnet/edges/config.json"]
    more += ["controlnet/edges/diffusion_pytorch_model.safetensors", "refiner/unet/config.json"]
    assert parts_of([*more, *plain]) == ["unet", "refiner", "unet-edges", "unet-parts"]
    assert model_name("0123456789abcdef", control_part("edges")) == "unet-edges-0123456789ab"


def test_the_server_batches_and_holds_what_the_settings_say() -> None:
    settings = EngineSettings(max_rank=16, max_batch=4, batch_pixels=4096, bank_bytes=1 << 20)
    front = front_config(settings)
    assert (front.max_rank, front.max_batch) == (16, 4)
    assert (front.batch_pixels, front.bank_bytes) == (4096, 1 << 20)


def test_ranks_over_the_engines_are_refused_before_a_step(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    settings = Settings(
        home=tmp_path, triton_address="127.0.0.1:9", engine=EngineSettings(max_rank=16)
    )
    bundle = Bundle.load(tiny_bundle, digest="d" * 64)
    layout = bank_layout(bundle.unet)
    denoiser = open_denoiser(bundle, layout, open_store(settings), settings)
    denoiser._found = True  # as if the server had answered
    group = layout.groups[0]

    def adapter(key: str, rank: int) -> LoadedAdapter:
        down, up = torch.zeros(rank, group.in_features), torch.zeros(group.out_features, rank)
        return LoadedAdapter(key, AdapterWeights({group.targets[0]: LoraLayer(down, up, 1.0)}))

    with denoiser.session([adapter("a", 8), adapter("b", 8)]):
        pass
    with (
        pytest.raises(InvalidArgumentError) as caught,
        denoiser.session([adapter("a", 8), adapter("b", 9)]),
    ):
        pass
    assert caught.value.reason == "RANK_TOO_HIGH"
    assert caught.value.metadata["limit"] == "16"
