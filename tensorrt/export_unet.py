"""Export a base's UNet, or its refiner's, as ONNX with adapter inputs.

python tensorrt/export_unet.py --out out/engines/unet.onnx
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from toile.diffusion.banked_unet import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    BankedUNet,
    bank_layout,
)
from toile.diffusion.export import export_onnx
from toile.diffusion.shipped import shipped_bundle_path

PARTS = {"unet": ("unet", 6), "refiner": ("refiner/unet", 5)}
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Write the ONNX file, and the layout of its bank beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=shipped_bundle_path(), help="bundle folder")
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--feed-forward", action="store_true", help="adapters there, too")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file")
    arguments = parser.parse_args()

    folder, time_ids = PARTS[arguments.part]
    unet = UNet2DConditionModel.from_pretrained(
        arguments.base / folder, torch_dtype=PRECISIONS[arguments.precision]
    )
    unet.eval().requires_grad_(False)
    ends = ATTENTION_TARGETS + (FEED_FORWARD_TARGETS if arguments.feed_forward else ())
    layout = bank_layout(unet, ends)
    path = export_onnx(BankedUNet(unet, layout), arguments.out, time_ids=time_ids)
    path.with_suffix(".layout.json").write_text(layout.to_json() + "\n", encoding="utf-8")
    facts = {
        "onnx": str(path),
        "bytes": sum(file.stat().st_size for file in path.parent.glob(path.name + "*")),
        "groups": {group.name: len(group.targets) for group in layout.groups},
        "adapter_bytes_per_rank": layout.bytes_per_rank(),
    }
    print(json.dumps(facts))  # noqa: T201 - the script's output


if __name__ == "__main__":
    main()
