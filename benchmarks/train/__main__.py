"""`python -m train`: speed, memory and losses of training a LoRA, beside diffusers' script.

Run by `make bench-train`, with `benchmarks` on PYTHONPATH. The script is not part of the diffusers
package: name a copy of examples/text_to_image/train_text_to_image_lora_sdxl.py, and the Python of
an environment that has what it needs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import machine
from measuring.readme import replace_part
from measuring.timing import in_turns, ratios, spread
from train import arms, same
from train.render import render
from train.task import Task, prepare

from toile.diffusion.bundle import Bundle, shipped_bundle_path
from toile.training.loop import SMOOTHING_STEPS

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "lace" / "photos"
RESULTS = Path(__file__).with_name("results.json")
CAPTION = "a white floral lace dress"


def main() -> None:
    """Measure, write and render."""
    arguments = _arguments()
    base = shipped_bundle_path()
    if base is None:
        sys.exit("this installation has no tiny base")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in arguments.part:
        with (
            tempfile.TemporaryDirectory(prefix="toile-bench-") as name,
            machine.watched() as watched,
        ):
            found = PARTS[part](arguments, base, Path(name))
        results[part] = {"run": watched, "machine": machine.facts(), **found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace_part("train", render(results))


def _speed(arguments: argparse.Namespace, base: Path, scratch: Path) -> dict[str, Any]:
    prepare(PHOTOS, scratch / "photos", CAPTION)
    task = Task(base, scratch / "photos", arguments.steps, 5, arguments.batch_size)
    runs: dict[str, list[arms.Run]] = {"script": [], "loop": [], "pure": []}

    def arm(which: str, work: Callable[[int], arms.Run]) -> Callable[[int], float]:
        def measured(number: int) -> float:
            run = work(number)
            runs[which].append(run)
            rate = run.images_per_second(task)
            print(f"{which}: {rate:.2f} images/s", file=sys.stderr, flush=True)
            return rate

        return measured

    rates = in_turns(
        {
            "script": arm(
                "script",
                lambda number: arms.diffusers_script(
                    task,
                    arguments.script_python,
                    arguments.script,
                    scratch / f"script{number}",
                ),
            ),
            "loop": arm("loop", lambda _: arms.ours(task, "loop")),
            "pure": arm("pure", lambda _: arms.ours(task, "pure")),
        },
        arguments.rounds,
    )
    return {
        "task": {
            "steps": task.steps,
            "warm_up": task.warm_up,
            "batch_size": task.batch_size,
            "smoothed": SMOOTHING_STEPS,
        },
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "over_script": spread(ratios(rates["loop"], rates["script"])),
        "share_of_pure": spread(ratios(rates["loop"], rates["pure"])),
        "peak_bytes": {
            name: spread([run.peak_bytes for run in found]) for name, found in runs.items()
        },
        "cache_seconds": spread([run.cache_seconds for run in runs["loop"]]),
        "mean_loss": {
            "script": spread([_mean(run.losses) for run in runs["script"]]),
            "loop": spread([run.losses[task.steps] for run in runs["loop"]]),
        },
        "values": rates,
    }


def _same(arguments: argparse.Namespace, base: Path, scratch: Path) -> dict[str, Any]:
    size = Bundle.load(base).native_size
    prepare(PHOTOS, scratch / "photos", CAPTION, size)
    task = Task(base, scratch / "photos", arguments.steps, 0, arguments.batch_size)
    return same.measure(task, arguments.script_python, arguments.script, scratch)


PARTS = {"speed": _speed, "same": _same}


def _mean(losses: dict[int, float]) -> float:
    """Over the last steps, as many as the loop takes its mean of."""
    last = [losses[step] for step in sorted(losses)[-SMOOTHING_STEPS:]]
    return sum(last) / len(last)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--script", type=Path, required=True, help="the example script")
    parser.add_argument(
        "--script-python", type=Path, required=True, help="Python of its environment"
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
