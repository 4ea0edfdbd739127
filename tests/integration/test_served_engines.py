"""A base becomes engines for the GPUs of the server, in the store and in its repository."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toile.core.artifacts import open_store, read_manifest
from toile.core.errors import FailedPreconditionError
from toile.core.settings import EngineSettings, Settings
from toile.diffusion.bundle import Bundle
from toile.diffusion.engines import CACHE_SUFFIX, Fingerprint, check_plan
from toile.diffusion.networks import UNET
from toile.diffusion.tensorrt_library import TENSORRT, TENSORRT_RTX
from toile.serving.engines import EngineKind, export_engine, is_exported, sync_repository

pytest.importorskip("tensorrt_rtx_bindings", reason="the rtx extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def settings_for(home: Path, **engine: Any) -> Settings:
    return Settings(home=home, engine=EngineSettings(**engine))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle, digest="d" * 64)


def test_an_engine_of_tensorrt_for_rtx_gets_into_the_repository(
    bundle: Bundle, tmp_path: Path
) -> None:
    settings = settings_for(
        tmp_path, builder=TENSORRT_RTX, compute_capability="8.9", max_rank=32, max_batch=8
    )
    store, kind = open_store(settings), EngineKind.of(settings)
    prefix = kind.prefix(bundle.digest, UNET)
    assert not is_exported(store, prefix)

    export_engine(store, bundle, UNET, kind)

    files = read_manifest(store, prefix).files
    assert set(files) == {"facts.json", "layout.json", "unet.engine", "unet.json"}
    repository = tmp_path / "models"
    for _ in range(2):  # whatever was there before
        names = sync_repository(store, prefix, "unet-x", repository, tmp_path / "cache", kind.front)
        assert names == ("unet-x",)
    engine = repository / "unet-x" / "1" / "unet.engine"
    check_plan(engine)
    fingerprint = Fingerprint.load(engine)
    assert fingerprint.base_digest == bundle.digest
    assert (fingerprint.precision, fingerprint.compute_capabilities) == ("fp16", ("8.9",))
    caps = [(one.latent_size[2], one.batch[2]) for one in fingerprint.profiles]
    assert caps == [(128, 8), (256, 2)]
    assert {one.rank for one in fingerprint.profiles} == {(1, 16, 32)}
    config = (repository / "unet-x" / "config.pbtxt").read_text()
    assert "max_batch_size: 8" in config
    assert 'key: "max_rank" value: { string_value: "32" }' in config
    assert 'value: { string_value: "unet.engine" }' in config
    kernels = engine.with_suffix(CACHE_SUFFIX)
    kernels.write_bytes(b"compiled on the GPU")
    sync_repository(store, prefix, "unet-x", repository, tmp_path / "cache")
    assert kernels.read_bytes() == b"compiled on the GPU"
    engine.write_bytes(b"another engine")
    sync_repository(store, prefix, "unet-x", repository, tmp_path / "cache")
    assert not kernels.exists()


def test_an_engine_is_for_one_kind_alone(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, builder=TENSORRT_RTX, compute_capability="8.9")
    kind = EngineKind.of(settings)
    others = [
        EngineKind(),
        replace(kind, builder=TENSORRT),
        replace(kind, builder_version="0"),
        replace(kind, precision="fp32"),
        replace(kind, compute_capability="8.6"),
        replace(kind, largest_side=1024),
        replace(kind, targets="transformer"),
        replace(kind, front=replace(kind.front, max_rank=8)),
        replace(kind, front=replace(kind.front, max_batch=8)),
        replace(kind, front=replace(kind.front, batch_pixels=4)),
        EngineKind(targets="transformer"),
    ]
    prefixes = {one.prefix("d" * 64, UNET) for one in (kind, *others)}
    assert len(prefixes) == len(others) + 1
    assert EngineKind.of(Settings(home=tmp_path)) == EngineKind()


def test_a_gpu_that_is_neither_named_nor_here_is_asked_for(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(FailedPreconditionError) as caught:
        EngineKind.of(settings_for(tmp_path, builder=TENSORRT_RTX))
    assert caught.value.reason == "NO_GPU"
    with pytest.raises(FailedPreconditionError) as caught:
        EngineKind.of(settings_for(tmp_path, builder=TENSORRT, compute_capability="9.0"))
    assert caught.value.reason == "NO_ENGINE_BUILDER"
