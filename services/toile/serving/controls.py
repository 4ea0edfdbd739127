"""The ControlNets of a request: a base's own, and those of model versions."""

from pathlib import Path

from diffusers import ControlNetModel

from toile.core.artifacts import ArtifactStore, fetch_patiently
from toile.core.errors import FailedPreconditionError
from toile.core.kept import Kept
from toile.core.settings import Limits
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import CONTROLNET_FOLDER, LoadedControl, Network, load_controlnet
from toile.imaging import decode
from toile.v1 import inference_pb2

CONTROLNET_BYTES_IN_MEMORY = 6 << 30
"""Of model versions; one for SDXL has 5 GB in fp32."""


class ControlNets:
    """Loads ControlNets; those of versions stay in memory until others push them out."""

    def __init__(
        self,
        limits: Limits,
        store: ArtifactStore,
        cache: Path,
        *,
        budget_bytes: int = CONTROLNET_BYTES_IN_MEMORY,
    ) -> None:
        """Make it; artifacts are fetched into the folder `cache`."""
        self._limits = limits
        self._store = store
        self._cache = cache
        self._versions: Kept[str, ControlNetModel] = Kept(budget_bytes, _size_bytes)

    def load(self, bundle: Bundle, wanted: inference_pb2.ControlMap) -> LoadedControl:
        """Return a ControlNet with its map.

        Raises:
            BadImageError: The map cannot be decoded.
            NotFoundError: There is no such version.
            InvalidArgumentError: The version is no ControlNet (`BAD_CONTROLNET`), or one for
                another base (`CONTROL_MISMATCH`).
            FailedPreconditionError: The base has none of the kind (`NO_CONTROLNET`).
        """
        return LoadedControl(
            self._version(bundle, wanted.artifact)
            if wanted.artifact
            else _own(bundle, wanted.kind),
            decode.decode(wanted.map_png, self._limits),
            wanted.scale,
            wanted.start,
            wanted.end,
            kind="" if wanted.artifact else wanted.kind,
        )

    def _version(self, bundle: Bundle, artifact: str) -> ControlNetModel:
        def load() -> ControlNetModel:
            folder = fetch_patiently(self._store, artifact, self._cache)
            network = load_controlnet(folder / CONTROLNET_FOLDER, bundle.unet_config)
            return network.to(bundle.device)

        # Whether it fits is checked as it is loaded, so once for each base.
        return self._versions.get(f"{bundle.digest} {artifact}", load)


def _own(bundle: Bundle, kind: str) -> Network:
    """Return a base's own ControlNet, which is loaded when it is first evaluated here."""
    if kind not in bundle.control_kinds:  # which is no path, whatever the request says
        raise FailedPreconditionError(
            f"this base has no ControlNet for {kind[:40]!r}",
            reason="NO_CONTROLNET",
            metadata={"field": "controls.kind", "kinds": ", ".join(bundle.control_kinds)},
        )
    return lambda *inputs, **options: bundle.controlnet(kind)(*inputs, **options)


def _size_bytes(network: ControlNetModel) -> int:
    return sum(weight.nbytes for weight in network.parameters())
