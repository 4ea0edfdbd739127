"""Which denoiser a base is drawn with: Triton's engine, or PyTorch here until there is one."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

from diffusers import UNet2DConditionModel

from toile.core.artifacts import ArtifactStore
from toile.core.settings import Settings
from toile.diffusion.bank import BankLayout
from toile.diffusion.bundle import Bundle
from toile.diffusion.controls import LoadedControl
from toile.diffusion.denoiser import (
    Denoiser,
    LoadedAdapter,
    TorchDenoiser,
)
from toile.diffusion.networks import REFINER, UNET
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.packed import PackedFiles
from toile.diffusion.turns import NO_HURRY, Urgency
from toile.serving.engines import control_part, front_config, model_name

ASK_AGAIN_SECONDS = 1.0


def open_denoiser(
    bundle: Bundle, layout: BankLayout, store: ArtifactStore, settings: Settings
) -> Denoiser:
    """Return what a base is drawn with.

    Args:
        bundle: The base.
        layout: Of its bank.
        store: Where packed adapters are.
        settings: Where Triton is, if there is one, and how its models batch.
    """
    here = TorchDenoiser(bundle)
    if not settings.triton_address:
        return here
    there = TritonDenoiser(
        settings.triton_address,
        unet_config=bundle.unet_config,
        refiner_config=bundle.refiner_config if bundle.has_refiner else None,
        layout=layout,
        link=PackedFiles(store, layout, base_digest=bundle.digest).link,
        base_digest=bundle.digest,
        unet_model=model_name(bundle.digest, UNET),
        refiner_model=model_name(bundle.digest, REFINER),
        control_models={
            kind: model_name(bundle.digest, control_part(kind)) for kind in bundle.control_kinds
        },
        front=front_config(settings.engine),
    )
    return EngineDenoiser(here, there)


class EngineDenoiser:
    """Draws here until the server has the base's models, and from then on there.

    The UNets here are let go of then: of SDXL's they are 10 GB, on a GPU that the engine may share.
    A drawing that no engine takes loads the base's again.

    A server that goes away later is waited for, step by step: images of one request would differ
    in their last bits if some were drawn here and some there.
    """

    def __init__(self, here: TorchDenoiser, there: TritonDenoiser) -> None:
        self._here, self._there = here, there
        self._found = False
        self._asked = -ASK_AGAIN_SECONDS
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def session(
        self,
        adapters: Sequence[LoadedAdapter],
        urgency: Urgency = NO_HURRY,
        controls: Sequence[LoadedControl] = (),
    ) -> Iterator[UNet2DConditionModel]:
        """See `Denoiser.session`; with DoRAs, or ControlNets that no engine has, it is here."""
        chosen = self._chosen()
        if any(adapter.weights.is_dora for adapter in adapters):
            chosen = self._here
        if controls and chosen is self._there and not self._there.has_controls(controls):
            chosen = self._here
        with chosen.session(adapters, urgency, controls) as unet:
            yield unet

    @contextlib.contextmanager
    def refiner_session(self, urgency: Urgency = NO_HURRY) -> Iterator[UNet2DConditionModel]:
        """See `Denoiser.refiner_session`."""
        with self._chosen().refiner_session(urgency) as unet:
            yield unet

    def samples_at_once(self, height: int, width: int) -> int:
        """See `Denoiser.samples_at_once`."""
        return self._chosen().samples_at_once(height, width)

    def _chosen(self) -> Denoiser:
        with self._lock:
            if not self._found and time.monotonic() - self._asked >= ASK_AGAIN_SECONDS:
                self._found = self._there.is_ready()
                self._asked = time.monotonic()
                if self._found:  # waits for the sessions that are open here
                    threading.Thread(target=self._here.release, daemon=True).start()
            return self._there if self._found else self._here
