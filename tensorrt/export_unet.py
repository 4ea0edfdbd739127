"""Export a base's UNet with adapter inputs as ONNX, or another of its networks.

python tensorrt/export_unet.py --out out/engines/unet.onnx
python tensorrt/export_unet.py --part unet_control --controlnet edges/ depth/ --out out/control.onnx
python tensorrt/export_unet.py --precision fp8 --prompts ours.txt --out out/engines/unet-fp8.onnx
python tensorrt/export_unet.py --part vae --precision bf16 --out out/engines/vae.onnx
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from toile.core.errors import ToileError
from toile.diffusion.bundle import Bundle
from toile.diffusion.export import write_onnx
from toile.diffusion.networks import PARTS, PRECISIONS, UNET, NamedNetwork, open_network
from toile.diffusion.quantization import CALIBRATION_PROMPTS, FP8, calibration, quantize_fp8
from toile.diffusion.shipped import shipped_bundle_path


def main() -> None:
    """Write the ONNX file and, of a network with adapter inputs, the layout of its bank beside."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=shipped_bundle_path(), help="bundle folder")
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--precision", choices=(*PRECISIONS, FP8), default="fp16")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="of fp8: a file with a prompt a line, which stand for what will be drawn",
    )
    parser.add_argument("--feed-forward", action="store_true", help="adapters there, too")
    parser.add_argument("--controlnet", type=Path, nargs="*", default=[], help="of unet_control")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file")
    arguments = parser.parse_args()
    is_fp8 = arguments.precision == FP8
    if is_fp8 and arguments.part != UNET:
        parser.error(f"{FP8} is of --part {UNET} alone")
    try:
        network = open_network(
            arguments.base,
            arguments.part,
            dtype=PRECISIONS["fp16" if is_fp8 else arguments.precision],
            feed_forward=arguments.feed_forward,
            controlnets=arguments.controlnet,
        )
    except ToileError as error:
        sys.exit(f"error: {error.message}")
    path = _write_fp8(network, arguments) if is_fp8 else write_onnx(network, arguments.out)
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


def _write_fp8(network: NamedNetwork, arguments: argparse.Namespace) -> Path:
    prompts = CALIBRATION_PROMPTS
    if arguments.prompts:
        prompts = tuple(arguments.prompts.read_text(encoding="utf-8").splitlines())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    samples = calibration(Bundle.load(arguments.base), prompts)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        half = write_onnx(network, Path(folder) / "half.onnx")
        return quantize_fp8(half, arguments.out, network.layout, samples)


if __name__ == "__main__":
    main()
