"""The tiny base's UNets as ONNX, in fp32; an export takes a processor for half a minute."""

from pathlib import Path

from diffusers import UNet2DConditionModel

from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import BASE_TIME_IDS, REFINER_TIME_IDS, DenoisingNetwork
from toile.diffusion.shipped import shipped_bundle_path

PARTS = {"unet": ("unet", BASE_TIME_IDS), "refiner": ("refiner/unet", REFINER_TIME_IDS)}


class ShippedOnnx:
    """Files that are written when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def network(self, part: str) -> DenoisingNetwork:
        """Return what `unet` or `refiner` is exported from."""
        name, time_ids = PARTS[part]
        unet = UNet2DConditionModel.from_pretrained(shipped_bundle_path() / name)
        unet.float().eval().requires_grad_(False)
        return DenoisingNetwork(BankedUNet(unet, bank_layout(unet)), time_ids)

    def file(self, part: str) -> Path:
        """Return the ONNX file of `unet` or `refiner`."""
        path = self._folder / f"{part}.onnx"
        return path if path.is_file() else write_onnx(self.network(part), path)
