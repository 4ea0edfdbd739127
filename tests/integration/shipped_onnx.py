"""The tiny base's UNets as ONNX, in fp32; an export takes a processor for half a minute."""

import fcntl
from pathlib import Path

from diffusers import ControlNetModel, UNet2DConditionModel
from tests.unit.diffusion.test_controls import random_controlnet

from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import BASE_TIME_IDS, REFINER_TIME_IDS, DenoisingNetwork
from toile.diffusion.shipped import shipped_bundle_path

UNET_CONTROL = "unet_control"
PARTS = {
    "unet": ("unet", BASE_TIME_IDS),
    UNET_CONTROL: ("unet", BASE_TIME_IDS),
    "refiner": ("refiner/unet", REFINER_TIME_IDS),
}


def control_network() -> ControlNetModel:
    """The ControlNet in `unet_control`: random, strong, and the same every time."""
    return random_controlnet(_shipped_unet("unet"), seed=1)


def _shipped_unet(name: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / name)
    return unet.float().eval().requires_grad_(False)


class ShippedOnnx:
    """Files that are written when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def network(self, part: str) -> DenoisingNetwork:
        """Return what a part is exported from."""
        name, time_ids = PARTS[part]
        unet = _shipped_unet(name)
        nets = [control_network()] if part == UNET_CONTROL else []
        return DenoisingNetwork(BankedUNet(unet, bank_layout(unet), nets), time_ids)

    def file(self, part: str) -> Path:
        """Return the ONNX file of a part."""
        path = self._folder / f"{part}.onnx"
        self._folder.mkdir(exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another of the tests' processes may be at it
            if not path.is_file():
                write_onnx(self.network(part), path.with_suffix(".part.onnx")).replace(path)
        return path
