"""A base's UNets as engines: exported once into the artifact store, then served by Triton."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import tenacity
import tritonclient.grpc as triton
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
from toile.diffusion.export import export_onnx
from toile.diffusion.triton.repository import write_model

EXPORT_FORMAT = 1
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
    if not is_exported(store, base.digest):
        export_engines(store, Bundle.load(fetch(store, base.artifact, cache), digest=base.digest))
    names = sync_repository(store, base.digest, repository, cache)
    load_models(settings.triton_address, names)
    return names


def model_names(base_digest: str) -> dict[str, str]:
    """Return the names of a base's models in Triton, by part: several bases share a server."""
    return {part: f"{part}-{base_digest[:12]}" for part in ("unet", "refiner")}


def engine_prefix(base_digest: str) -> str:
    """Return where the artifact store has a base's engines."""
    return f"engines/{base_digest[:12]}/onnx-fp32-{EXPORT_FORMAT}"


def is_exported(store: ArtifactStore, base_digest: str) -> bool:
    """Say whether the artifact store has a base's engines.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    try:
        read_manifest(store, engine_prefix(base_digest))
    except NotFoundError:
        return False
    return True


def export_engines(store: ArtifactStore, bundle: Bundle) -> None:
    """Export a base's UNets to the artifact store.

    It takes a processor for a minute or two, and gives way to others.

    Raises:
        StoreUnavailableError: The artifact store does not answer.
    """
    os.nice(10)
    parts = [("unet", bundle.unet, 6)]
    if bundle.has_refiner:
        parts.append(("refiner", bundle.refiner_unet, 5))
    with tempfile.TemporaryDirectory(prefix="toile-engines-") as scratch:
        for name, unet, time_ids in parts:
            folder = Path(scratch) / name
            layout = bank_layout(unet)
            export_onnx(BankedUNet(unet, layout), folder / "unet.onnx", time_ids=time_ids)
            facts = {
                "unet_config": dict(unet.config),
                "time_ids": time_ids,
                "pooled_width": _pooled_width(unet.config, time_ids),
            }
            (folder / "facts.json").write_text(json.dumps(facts, default=str), encoding="utf-8")
            (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        publish_folder(store, engine_prefix(bundle.digest), Path(scratch), {"base": bundle.digest})


def sync_repository(
    store: ArtifactStore, base_digest: str, repository: Path, cache: Path
) -> list[str]:
    """Write a base's models into a server's repository, and return their names.

    Raises:
        NotFoundError: The base was not exported.
        DataLossError: The engines are damaged.
    """
    folder = fetch(store, engine_prefix(base_digest), cache)
    written = []
    for part, name in model_names(base_digest).items():
        source = folder / part
        if not source.is_dir():
            continue
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
        )
        written.append(name)
    return written


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
