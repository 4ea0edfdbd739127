"""The garment segmenter of the tiny base: a small U-Net that labels a garment's parts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention

from toile.imaging.renderer.vocabulary import PART_NAMES

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SegmenterConfig:
    """What rebuilds the network: channels per level, working size in pixels, label names."""

    channels: tuple[int, ...] = (16, 32, 48, 80)
    size: int = 128
    classes: tuple[str, ...] = PART_NAMES


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Segmenter(nn.Module):
    """Images `[B, 3, H, W]` in -1..1 to logits `[B, classes, H, W]`; H and W divisible by 8."""

    def __init__(self, config: SegmenterConfig | None = None) -> None:
        super().__init__()
        self.config = config or SegmenterConfig()
        widths = self.config.channels
        self.encoders = nn.ModuleList(
            _block(i, o) for i, o in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.decoders = nn.ModuleList(
            _block(low + high, low) for low, high in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], len(self.config.classes), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        skips: list[Tensor] = []
        hidden = images
        for level, encoder in enumerate(self.encoders):
            hidden = encoder(F.avg_pool2d(hidden, 2) if level else hidden)
            skips.append(hidden)
        for decoder, skip in zip(self.decoders, skips[-2::-1], strict=True):
            hidden = decoder(
                torch.cat([skip, F.interpolate(hidden, scale_factor=2.0, mode="bilinear")], dim=1)
            )
        logits: Tensor = self.head(hidden)
        return logits

    @torch.inference_mode()
    def predict(self, images: Sequence[UInt8Array]) -> list[UInt8Array]:
        """Label maps `[H, W]`, values indexing `config.classes`, of sRGB images `[H, W, 3]`."""
        maps: list[UInt8Array] = []
        size = self.config.size
        for image in images:
            small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            batch = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 127.5 - 1.0
            logits = self(batch.to(self.head.weight)).float()
            full = F.interpolate(logits, size=image.shape[:2], mode="bilinear", align_corners=False)
            maps.append(full.argmax(dim=1)[0].to(torch.uint8).cpu().numpy())
        return maps

    @classmethod
    def load(cls, path: Path) -> Self:
        """The network saved in a folder by `save`, in fp32 and evaluation mode."""
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = SegmenterConfig(
            channels=tuple(raw["channels"]), size=int(raw["size"]), classes=tuple(raw["classes"])
        )
        segmenter = cls(config)
        state = load_file(path / "model.safetensors")
        segmenter.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return segmenter.eval()

    def save(self, path: Path) -> None:
        """Write `config.json` and `model.safetensors` (half precision) into a folder."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(
            json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8"
        )
        state = {
            name: tensor.detach().half().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(state, path / "model.safetensors")


def load(path: Path) -> Segmenter:
    """The segmenter of a bundle's `segmenter` folder."""
    return Segmenter.load(path)
