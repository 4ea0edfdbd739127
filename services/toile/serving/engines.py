"""A base's UNets as engines: exported once into the artifact store, then served by Triton."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import tenacity
import tritonclient.grpc as triton
from diffusers import ControlNetModel
from tritonclient.utils import InferenceServerException

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
from toile.core.settings import Settings
from toile.diffusion.bank import BankLayout
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import CONTROLNET_FOLDER
from toile.diffusion.export import export_onnx
from toile.diffusion.networks import BASE_TIME_IDS, REFINER, REFINER_TIME_IDS, UNET
from toile.diffusion.triton.repository import write_model

EXPORT_FORMAT = 2
"""Counts changes of what an export takes or gives; engines of another number are not used."""
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
    names = []
    for part in parts_of(read_manifest(store, base.artifact).files):
        if not is_exported(store, base.digest, part):
            folder = fetch(store, base.artifact, cache)
            export_engine(store, Bundle.load(folder, digest=base.digest), part)
        names.append(sync_repository(store, base.digest, part, repository, cache))
        load_models(settings.triton_address, names[-1:])
    return names


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


def engine_prefix(base_digest: str, part: str) -> str:
    """Return where the artifact store has a base's engine."""
    return f"engines/{base_digest[:12]}/onnx-fp32-{EXPORT_FORMAT}/{part}"


def is_exported(store: ArtifactStore, base_digest: str, part: str) -> bool:
    """Say whether the artifact store has a base's engine.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    try:
        read_manifest(store, engine_prefix(base_digest, part))
    except NotFoundError:
        return False
    return True


def export_engine(store: ArtifactStore, bundle: Bundle, part: str) -> None:
    """Export a base's UNet, its refiner's, or the UNet with a ControlNet to the artifact store.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    nets: list[ControlNetModel] = []
    if part == REFINER:
        unet, time_ids = bundle.refiner_unet, REFINER_TIME_IDS
    else:
        unet, time_ids = bundle.unet, BASE_TIME_IDS
        if part != UNET:
            nets = [bundle.controlnet(part.removeprefix(control_part("")))]
    layout = bank_layout(unet)
    with tempfile.TemporaryDirectory(prefix="toile-engines-") as scratch:
        folder = Path(scratch)
        export_onnx(BankedUNet(unet, layout, nets), folder / "unet.onnx", time_ids=time_ids)
        facts = {
            "unet_config": dict(unet.config),
            "time_ids": time_ids,
            "pooled_width": _pooled_width(unet.config, time_ids),
            "controls": len(nets),
        }
        (folder / "facts.json").write_text(json.dumps(facts, default=str), encoding="utf-8")
        (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        publish_folder(store, engine_prefix(bundle.digest, part), folder, {"base": bundle.digest})


def sync_repository(
    store: ArtifactStore, base_digest: str, part: str, repository: Path, cache: Path
) -> str:
    """Write a base's model into a server's repository, and return its name.

    Raises:
        NotFoundError: It was not exported.
        DataLossError: The engine is damaged.
    """
    source = fetch(store, engine_prefix(base_digest, part), cache)
    name = model_name(base_digest, part)
    facts = json.loads((source / "facts.json").read_text(encoding="utf-8"))
    shutil.rmtree(repository / name, ignore_errors=True)
    write_model(
        repository,
        name,
        onnx=source / "unet.onnx",
        layout=BankLayout.from_json((source / "layout.json").read_text(encoding="utf-8")),
        unet_config=facts["unet_config"],
        time_ids=facts["time_ids"],
        pooled_width=facts["pooled_width"],
        controls=facts["controls"],
    )
    return name


def load_models(address: str, names: list[str]) -> None:
    """Have a server open models of its repository; wait until it is up.

    Raises:
        ComputeUnavailableError: It is not, or does not open them; the message has its reason.
    """
    client = triton.InferenceServerClient(address)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_fixed(0.25),
        stop=tenacity.stop_after_delay(SERVER_SECONDS),
        reraise=True,
    )
    try:
        for name in names:
            retrying(client.load_model, name, client_timeout=SERVER_SECONDS)
    except InferenceServerException as error:
        raise ComputeUnavailableError(f"Triton does not load {name}: {error.message()}") from error
    finally:
        client.close()


def _is_away(error: BaseException) -> bool:
    return isinstance(error, InferenceServerException) and "UNAVAILABLE" in str(error.status())


def _pooled_width(config: object, time_ids: int) -> int:
    """Width of the pooled text: the config has the width of it and the time ids together only."""
    together = int(config.projection_class_embeddings_input_dim)  # type: ignore[attr-defined]
    return together - time_ids * int(config.addition_time_embed_dim)  # type: ignore[attr-defined]
