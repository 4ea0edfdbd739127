"""Packed adapters in the artifact store, from where the server reads them by link."""

import hashlib
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from toile.core.artifacts import ArtifactStore
from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapter_fit import check_base
from toile.diffusion.adapters import AdapterWeights
from toile.diffusion.bank import BankError, BankLayout, PackedAdapter, pack
from toile.diffusion.denoiser import LoadedAdapter

LINK_SECONDS = 600
"""How long a link works: the server reads it at once, or is given another."""


class PackedFiles:
    """The packed files of one bank: `{adapter's artifact}.bank/{digest of the layout}.safetensors`.

    An adapter is packed once, when it is registered, or when it is first wanted in a bank that
    was not known then.
    """

    def __init__(self, store: ArtifactStore, layout: BankLayout, *, base_digest: str = "") -> None:
        self._store, self._layout, self._base_digest = store, layout, base_digest
        self._lock = threading.Lock()

    def key(self, artifact: str) -> str:
        """Return where the packed file of an adapter's artifact is."""
        return f"{packed_folder(artifact)}/{packed_name(self._layout)}"

    def put(self, artifact: str, weights: AdapterWeights) -> None:
        """Pack an adapter and store it; one that is there already is left alone.

        Raises:
            InvalidArgumentError: It does not fit the bank (`ADAPTER_MISMATCH`).
            StoreUnavailableError: The artifact store does not answer.
        """
        key = self.key(artifact)
        with self._lock:  # two requests that want it at once pack it once
            if self._store.exists(key):
                return
            packed = pack_adapter(weights, self._layout, base_digest=self._base_digest)
            with tempfile.TemporaryDirectory(prefix="toile-bank-") as folder:
                path = Path(folder) / packed_name(self._layout)
                packed.save(path, self._layout)
                self._store.put(key, path)

    def link(self, adapter: LoadedAdapter) -> str:
        """Return a link to an adapter's packed file; its key is its artifact.

        Raises:
            InvalidArgumentError: It does not fit the bank (`ADAPTER_MISMATCH`).
            StoreUnavailableError: The artifact store does not answer.
        """
        self.put(adapter.key, adapter.weights)
        return self._store.presigned_url(self.key(adapter.key), expires_seconds=LINK_SECONDS)


def packed_folder(artifact: str) -> str:
    """Return the prefix of an adapter's packed files."""
    return f"{artifact}.bank"


def packed_name(layout: BankLayout) -> str:
    """Return the name of a layout's packed file, which all adapters have in common."""
    return f"{hashlib.sha256(layout.to_json().encode()).hexdigest()[:12]}.safetensors"


def empty_unet(base: Path) -> UNet2DConditionModel:
    """Return the UNet of a base in a folder on the meta device: its weights are not read."""
    config = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def check_adapter(weights: AdapterWeights, layout: BankLayout, *, base_digest: str = "") -> None:
    """Check that an adapter can be packed for a bank.

    Raises:
        InvalidArgumentError: It is of another base, or has layers that the bank does not hold
            (`ADAPTER_MISMATCH`); or it is a DoRA (`UNSUPPORTED_ADAPTER`).
    """
    check_base(weights, base_digest)
    if weights.is_dora:
        raise InvalidArgumentError(
            "the adapter is a DoRA, which scales rows of the base's own weights; engines add to "
            "what these compute, and so it is drawn with in PyTorch alone",
            field="adapters",
            reason="UNSUPPORTED_ADAPTER",
            metadata={"feature": "DoRA"},
        )
    known = {path for group in layout.groups for path in group.targets}
    if foreign := sorted(weights.layers.keys() - known):
        raise InvalidArgumentError(
            f"the adapter does not fit the base: {foreign[0]} is no target of the bank "
            f"({len(foreign)} such layers)",
            field="adapters",
            reason="ADAPTER_MISMATCH",
        )


def pack_adapter(
    weights: AdapterWeights, layout: BankLayout, *, base_digest: str = ""
) -> PackedAdapter:
    """Pack an adapter for a bank, in fp32.

    Raises:
        InvalidArgumentError: It does not fit (`ADAPTER_MISMATCH`).
    """
    check_adapter(weights, layout, base_digest=base_digest)
    layers = {
        path: (layer.down.float().numpy(), layer.up.float().numpy(), layer.alpha)
        for path, layer in weights.layers.items()
    }
    try:
        return pack(layers, layout, dtype=np.float32, base_digest=weights.base_digest)
    except BankError as error:
        raise InvalidArgumentError(
            f"the adapter does not fit the base: {error}",
            field="adapters",
            reason="ADAPTER_MISMATCH",
        ) from error
