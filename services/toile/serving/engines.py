"""A base's UNets as engines: exported once into the artifact store, then served by Triton."""

import copy
import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import tenacity
import torch
from diffusers import ControlNetModel

from toile.core.artifacts import (
    ArtifactStore,
    fetch,
    open_store,
    publish_folder,
    read_manifest,
)
from toile.core.bases import resolve_base
from toile.core.catalog.engine import open_catalog
from toile.core.errors import ComputeUnavailableError, NotFoundError
from toile.core.settings import EngineSettings, Settings
from toile.diffusion.bank import BankLayout
from toile.diffusion.banked_unet import TARGETS, BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import CONTROLNET_FOLDER
from toile.diffusion.engine_builders import open_builder
from toile.diffusion.engines import (
    BUILDER,
    CACHE_SUFFIX,
    CAPABILITY,
    ENGINE_SUFFIX,
    serving_profiles,
)
from toile.diffusion.export import export_onnx
from toile.diffusion.networks import (
    BASE_TIME_IDS,
    PRECISIONS,
    REFINER,
    REFINER_TIME_IDS,
    UNET,
)
from toile.diffusion.quantization import FP8, calibration, quantize_fp8
from toile.diffusion.sdxl import PIXELS_PER_LATENT
from toile.diffusion.tensorrt_library import capability_here
from toile.diffusion.triton.client import (
    UNAVAILABLE,
    TritonClient,
    TritonError,
    TritonGoneError,
    TritonRefusedError,
)
from toile.diffusion.triton.repository import VERSION, FrontConfig, write_model

EXPORT_FORMAT = 3
"""Counts changes of what an export takes or gives; engines of another number are not used."""
ONNX_RUNTIME = "onnxruntime"
TIMING_CACHE = "tensorrt.timing"
SERVER_SECONDS = 120.0
"""How long to wait for a server that is not up, and for it to open an engine."""


def serve_engines(settings: Settings, repository: Path) -> list[str]:
    """Have Triton serve the default base, exported first if it was not; return its models' names.

    Raises:
        NotFoundError: There is no such base.
        ComputeUnavailableError: Triton does not answer, or does not open an engine.
        StoreUnavailableError: The artifact store does not answer.
    """
    store, cache = open_store(settings), settings.home_path / "cache"
    catalog = open_catalog(settings)
    try:
        with catalog.reading() as session:
            base = resolve_base(session, settings.default_base)
    finally:
        catalog.close()
    os.nice(10)  # an export takes a processor for half a minute or more
    kind = EngineKind.of(settings)
    front = replace(front_config(settings.engine), threads=settings.cpu_threads or 0)
    names = []
    for part in parts_of(read_manifest(store, base.artifact).files):
        prefix = kind.prefix(base.digest, part)
        if not is_exported(store, prefix):
            folder = fetch(store, base.artifact, cache)
            bundle = Bundle.load(folder, digest=base.digest)
            export_engine(store, bundle, part, kind, settings.home_path / TIMING_CACHE)
        name = model_name(base.digest, part)
        own = sync_repository(store, prefix, name, repository, cache, front)
        load_models(settings.triton_address, own)
        names.append(own[-1])
    return names


@dataclass(frozen=True)
class EngineKind:
    """What a base's engines are, beside their base and part."""

    builder: str = ONNX_RUNTIME
    builder_version: str = ""
    precision: str = "fp32"
    compute_capability: str = ""
    largest_side: int = 2048
    """Pixels."""
    targets: str = "attention"
    """What adapters may change, by the settings' name."""
    front: FrontConfig = field(default_factory=FrontConfig)
    """What a compiled engine has memory for."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return what the settings ask for.

        Raises:
            FailedPreconditionError: Its library is not installed (`NO_ENGINE_BUILDER`), or the
                compute capability is not set and there is no GPU to ask (`NO_GPU`).
        """
        wanted = settings.engine
        if wanted.builder == ONNX_RUNTIME:
            return cls(targets=wanted.targets)
        return cls(
            builder=wanted.builder,
            builder_version=open_builder(wanted.builder).version,
            precision=wanted.precision,
            compute_capability=wanted.compute_capability or capability_here(),
            largest_side=settings.limits.image_side_pixels,
            targets=wanted.targets,
            front=front_config(wanted),
        )

    def prefix(self, base_digest: str, part: str) -> str:
        """Return where the artifact store has a base's engine of this kind."""
        folder = f"onnx-fp32-{EXPORT_FORMAT}"
        if self.builder != ONNX_RUNTIME:
            folder = (
                f"{self.builder}-{self.builder_version}-{self.compute_capability}-"
                f"{self.precision}-{self.largest_side}-r{self.front.max_rank}-"
                f"b{self.front.max_batch}-{self.front.batch_pixels}-{EXPORT_FORMAT}"
            )
        if self.targets != "attention":
            folder += f"-{self.targets}"
        return f"engines/{base_digest[:12]}/{folder}/{part}"


def parts_of(files: Iterable[str]) -> list[str]:
    """Return what of a base, by the paths of its files, is made an engine of; the UNet first."""
    paths = [PurePosixPath(path) for path in files if path.endswith("/config.json")]
    kinds = [path.parts[1] for path in paths if path.parts[0] == CONTROLNET_FOLDER]
    refiner = [REFINER] if any(path.parts[0] == REFINER for path in paths) else []
    return [UNET, *refiner, *(control_part(kind) for kind in sorted(kinds))]


def control_part(kind: str) -> str:
    """Return the part that is the UNet with the base's own ControlNet of a kind."""
    return f"{UNET}-{kind}"


def model_name(base_digest: str, part: str) -> str:
    """Return the name of a base's model in Triton: several bases share a server."""
    return f"{part}-{base_digest[:12]}"


def is_exported(store: ArtifactStore, prefix: str) -> bool:
    """Say whether the artifact store has an engine.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    try:
        read_manifest(store, prefix)
    except NotFoundError:
        return False
    return True


def export_engine(
    store: ArtifactStore,
    bundle: Bundle,
    part: str,
    kind: EngineKind | None = None,
    timing_cache: Path | None = None,
) -> None:
    """Export a base's UNet, its refiner's, or the UNet with a ControlNet to the artifact store.

    See `EngineBuilder.build` for the timing cache.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
        InvalidArgumentError: It cannot be compiled for the GPUs (`BAD_COMPUTE_CAPABILITY`).
    """
    kind = kind or EngineKind()
    nets: list[ControlNetModel] = []
    if part == REFINER:
        unet, time_ids = bundle.refiner_unet, REFINER_TIME_IDS
    else:
        unet, time_ids = bundle.unet, BASE_TIME_IDS
        if part != UNET:
            nets = [bundle.controlnet(part.removeprefix(control_part("")))]
    layout = bank_layout(unet, TARGETS[kind.targets])
    with tempfile.TemporaryDirectory(prefix="toile-engines-") as scratch:
        onnx, folder = Path(scratch) / "unet.onnx", Path(scratch) / "engine"
        folder.mkdir()
        if kind.builder == ONNX_RUNTIME:
            onnx = folder / onnx.name
        dtype = PRECISIONS["fp16" if kind.precision == FP8 else kind.precision]
        banked = BankedUNet(_typed(unet, dtype), layout, [_typed(net, dtype) for net in nets])
        export_onnx(banked, onnx, time_ids=time_ids)
        if kind.precision == FP8 and part == UNET:
            onnx = quantize_fp8(onnx, onnx.with_name("unet-fp8.onnx"), layout, calibration(bundle))
        if kind.builder != ONNX_RUNTIME:
            _compile(onnx, folder / "unet.engine", bundle, kind, timing_cache)
        facts = {
            "unet_config": dict(unet.config),
            "time_ids": time_ids,
            "pooled_width": _pooled_width(unet.config, time_ids),
            "controls": len(nets),
        }
        (folder / "facts.json").write_text(json.dumps(facts, default=str), encoding="utf-8")
        (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        prefix = kind.prefix(bundle.digest, part)
        publish_folder(store, prefix, folder, {"base": bundle.digest})


def _typed(network: Any, dtype: torch.dtype) -> Any:
    """Return a network in a type; a copy unless it is of that type."""
    return network if network.dtype == dtype else copy.deepcopy(network).to(dtype)


def _compile(
    onnx: Path, engine: Path, bundle: Bundle, kind: EngineKind, timing_cache: Path | None
) -> None:
    open_builder(kind.builder).build(
        onnx,
        engine,
        profiles=serving_profiles(
            native_size=bundle.native_size // PIXELS_PER_LATENT,
            largest_size=kind.largest_side // PIXELS_PER_LATENT,
            batch=kind.front.max_batch,
            batch_pixels=kind.front.batch_pixels,
            rank=kind.front.max_rank,
        ),
        compute_capabilities=[kind.compute_capability],
        base_digest=bundle.digest,
        rebuild=f"TOILE_ENGINE__BUILDER={BUILDER} "
        f"TOILE_ENGINE__COMPUTE_CAPABILITY={CAPABILITY} toile up",
        timing_cache=timing_cache,
    )


def front_config(settings: EngineSettings) -> FrontConfig:
    """Return how fronts batch and what they hold."""
    return FrontConfig(
        max_batch=settings.max_batch,
        batch_pixels=settings.batch_pixels,
        bank_bytes=settings.bank_bytes,
        max_rank=settings.max_rank,
    )


def sync_repository(
    store: ArtifactStore,
    prefix: str,
    name: str,
    repository: Path,
    cache: Path,
    front: FrontConfig | None = None,
) -> tuple[str, ...]:
    """Write an engine's models into a server's repository; return their names as `write_model`.

    Kernels that were compiled on the server's GPU are kept if the engine is the same.

    Raises:
        NotFoundError: It was not exported.
        DataLossError: The engine is damaged.
    """
    source = fetch(store, prefix, cache)
    facts = json.loads((source / "facts.json").read_text(encoding="utf-8"))
    (engine,) = (path for path in source.iterdir() if path.suffix in (".onnx", ENGINE_SUFFIX))
    placed = repository / name / VERSION / engine.name
    kernels = placed.with_suffix(CACHE_SUFFIX)
    kept = None
    if kernels.is_file() and placed.is_file() and filecmp.cmp(placed, engine, shallow=False):
        kept = kernels.read_bytes()
    shutil.rmtree(repository / name, ignore_errors=True)
    names = write_model(
        repository,
        name,
        engine=engine,
        layout=BankLayout.from_json((source / "layout.json").read_text(encoding="utf-8")),
        unet_config=facts["unet_config"],
        time_ids=facts["time_ids"],
        pooled_width=facts["pooled_width"],
        controls=facts["controls"],
        config=front,
    )
    if kept is not None:
        kernels.write_bytes(kept)
    return names


def load_models(address: str, names: Iterable[str]) -> None:
    """Have a server open models of its repository; wait until it is up.

    Raises:
        ComputeUnavailableError: It is not, or does not open them; the message has its reason.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_fixed(0.25),
        stop=tenacity.stop_after_delay(SERVER_SECONDS),
        reraise=True,
    )
    with TritonClient(address) as client:
        for name in names:
            try:
                retrying(client.load, name, seconds=SERVER_SECONDS)
            except TritonError as error:
                raise ComputeUnavailableError(f"Triton does not load {name}: {error}") from error


def _is_away(error: BaseException) -> bool:
    refused = isinstance(error, TritonRefusedError) and error.status == UNAVAILABLE
    return refused or isinstance(error, TritonGoneError)


def _pooled_width(config: object, time_ids: int) -> int:
    """Width of the pooled text: the config has the width of it and the time ids together only."""
    together = int(config.projection_class_embeddings_input_dim)  # type: ignore[attr-defined]
    return together - time_ids * int(config.addition_time_embed_dim)  # type: ignore[attr-defined]
