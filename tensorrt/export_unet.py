"""Export a base's UNet with adapter inputs as ONNX, or another of its networks.

python tensorrt/export_unet.py --out out/engines/unet.onnx
python tensorrt/export_unet.py --part unet_control --controlnet edges/ depth/ --out out/control.onnx
python tensorrt/export_unet.py --part vae --precision bf16 --out out/engines/vae.onnx
"""

import argparse
import json
import sys
from pathlib import Path

from toile.core.errors import ToileError
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import PARTS, PRECISIONS, open_network
from toile.diffusion.shipped import shipped_bundle_path


def main() -> None:
    """Write the ONNX file and, of a network with adapter inputs, the layout of its bank beside."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=shipped_bundle_path(), help="bundle folder")
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--feed-forward", action="store_true", help="adapters there, too")
    parser.add_argument("--controlnet", type=Path, nargs="*", default=[], help="of unet_control")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file")
    arguments = parser.parse_args()
    try:
        network = open_network(
            arguments.base,
            arguments.part,
            dtype=PRECISIONS[arguments.precision],
            feed_forward=arguments.feed_forward,
            controlnets=arguments.controlnet,
        )
    except ToileError as error:
        sys.exit(f"error: {error.message}")
    path = write_onnx(network, arguments.out)
    facts = {
        "onnx": str(path),
        "bytes": sum(file.stat().st_size for file in path.parent.glob(path.name + "*")),
    }
    if layout := network.layout:
        path.with_suffix(".layout.json").write_text(layout.to_json() + "\n", encoding="utf-8")
        facts |= {
            "groups": {group.name: len(group.targets) for group in layout.groups},
            "adapter_bytes_per_rank": layout.bytes_per_rank(),
        }
    print(json.dumps(facts))  # noqa: T201 - the script's output


if __name__ == "__main__":
    main()
