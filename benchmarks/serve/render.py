"""The results as Markdown, between the marks in `benchmarks/README.md`.

`python -m serve.render` renders what `results.json` holds.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from measuring.readme import replace_part

PEER = "in process, ONNX Runtime"
"""The arm of the first figure that the platform is held against."""
MODELS = "gRPC, Ray Serve, Triton"
SERVICE = "GenerateService, and the stored image"
RESULTS = Path(__file__).with_name("results.json")

Results = Mapping[str, Any]


def render(results: Results) -> str:
    """Return the tables of the parts that were measured."""
    blocks = []
    for name, (title, tables) in _SECTIONS.items():
        if name in results:
            found = results[name]
            blocks.append(f"\n#### {title}\n\n{_run(found)}\n\n{tables(found)}")
    return "\n".join(blocks) + "\n"


def _run(found: Results) -> str:
    run, machine = found["run"], found["machine"]
    versions = machine["versions"]
    quiet = "" if run["others_share"] < 0.1 else " **Others kept the machine busy.**"
    return (
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}, "
        f"ONNX Runtime {versions['onnxruntime']}; {run['began'][:10]}, scale `{run['scale']}`; "
        f"load average before {run['load_before']:.1f}, other processes took "
        f"{100 * run['others_share']:.0f} % of the processors.{quiet}"
    )


def _overhead(found: Results) -> str:
    rows: list[Iterable[str]] = []
    for name, latency in found["latency_seconds"].items():
        ratios = found["ratio"].get(name, {})
        most = 1.10 if name == PEER else 1.0
        rows.append(
            (
                name,
                _spread(latency, 1e3, "{:.0f}"),
                *(
                    _judged(ratios[ours], most, 2, most=True) if ratios else ""
                    for ours in (MODELS, SERVICE)
                ),
            )
        )
    spread_out, further = (
        {name: _judged(values, 2.0, 2, most=True) for name, values in found[of].items()}
        for of in ("over_ms_a_step", "over_ms_a_further_step")
    )
    steps = found["ms_a_further_step"]
    return (
        _table(("drawn by", "ms an image, p50", "models to it", "service to it"), rows)
        + f"\n\n{found['steps']} steps, {found['size']} pixels (targets: 1.10 times, 2 ms a step, "
        "less than torch). Beyond that many steps, to "
        f"{found['long_steps']}, each takes {_spread(steps[PEER], 1, '{:.1f}')} ms by ONNX Runtime "
        f"in process; the models take {further[MODELS]} ms more, the service {further[SERVICE]}. "
        f"With what an image costs once spread over {found['steps']} steps, it is "
        f"{spread_out[MODELS]} and {spread_out[SERVICE]} ms a step."
    )


def _mixed(found: Results) -> str:
    rows = [
        (
            clients,
            *(
                _spread(arm["images_per_second"][name], 1, "{:.2f}")
                for name in ("a LoRA each", "one LoRA", "no LoRA")
            ),
            _judged(arm["each_over_one"], 0.97, 3),
            f"{arm['triton_last_round']['a LoRA each']['samples_per_call']:.1f}",
        )
        for clients, arm in found["clients"].items()
    ]
    peers = found["peers"]
    peer_rows = [
        (
            name,
            _spread(rate, 1, "{:.2f}"),
            _judged(peers["toile_over"][name], 2.0 if name.startswith("set_") else 4.0, 1)
            if name != "toile"
            else "",
        )
        for name, rate in peers["images_per_second"].items()
    ]
    return (
        _table(
            (
                "clients",
                "a LoRA each, images/s",
                "one LoRA",
                "none",
                "each to one (target 0.97)",
                "samples a call",
            ),
            rows,
        )
        + f"\n\n{found['steps']} steps, rank {found['rank']}. Against diffusers servers with "
        f"{peers['clients']} clients and as many LoRAs (targets: 2 times `set_adapters`, 4 times "
        "load and fuse):\n\n" + _table(("server", "images/s", "toile to it"), peer_rows)
    )


def _mixed_platform(found: Results) -> str:
    rows = [
        (
            clients,
            _spread(arm["images_per_second"]["a LoRA each"], 1, "{:.2f}"),
            _spread(arm["images_per_second"]["one LoRA"], 1, "{:.2f}"),
            _judged(arm["each_over_one"], 0.97, 3),
        )
        for clients, arm in found.items()
        if clients.isdigit()
    ]
    return _table(("clients", "a LoRA each, images/s", "one LoRA", "each to one"), rows)


def _continuous(found: Results) -> str:
    saturation, mix = found["saturation"], found["mix"]
    own = mix["servers"]["continuous"]["latency_seconds"]
    rows = [
        (
            name,
            _spread(rate, 1, "{:.1f}"),
            _spread(saturation["triton"][name]["samples_per_call"], 1, "{:.1f}"),
            _spread(saturation["triton"][name]["busy_share"], 100, "{:.0f}"),
        )
        for name, rate in saturation["steps_per_second"].items()
    ]
    return (
        _table(("batches", "steps/s", "samples a call", "engine busy, about %"), rows)
        + f"\n\nAt saturation, {saturation['clients']} clients. Sharing batches gives "
        f"{_judged(saturation['ratio'], 1.25, 2)} times the steps of one request a batch "
        "(target 1.25).\n\n"
        + _latencies(mix["servers"], own)
        + f"\n\n{mix['offered_images_per_second']:.2f} requests/s, 70 % of the capacity of "
        f"{mix['capacity_images_per_second']:.2f} images/s measured with shared batches; traces of "
        f"{mix['trace_seconds']:.0f} s. In brackets: how many times the latency of continuous "
        "batching (targets: short at least 2 times; long no less than 1 / 1.5)."
    )


def _modelled(found: Results) -> str:
    blocks = []
    for size, at in found.items():
        if not size.isdigit():
            continue
        curve = at["curve"]
        blocks.append(
            f"{size} pixels, {curve['base_ms']} + {curve['sample_ms']} ms a sample, "
            f"{at['offered_images_per_second']:.2f} requests/s:\n\n"
            + _latencies(at["servers"], None)
        )
    return "\n\n".join(blocks)


def _latencies(servers: Results, own: Results | None) -> str:
    rows = []
    for name, server in servers.items():
        latency = server["latency_seconds"]
        cells = [name]
        for kind in ("short", "long"):
            for key in ("p50", "p95"):
                value = latency.get(kind, {}).get(key, math.nan)
                times = ""
                if own is not None and latency is not own and kind in own:
                    ratio = value / own[kind][key]
                    bound = {"short": 2.0, "long": 1 / 1.5}[kind]
                    times = f" ({_number(ratio, bound if key == 'p95' else 0.0, 1)})"
                cells.append(f"{value:.2f}{times}")
        if own is None:
            cells += [
                f"{server['most_images_per_second']:.2f}",
                f"{server['triton']['samples_per_call']:.1f}" if "triton" in server else "",
            ]
        rows.append(cells)
    head = ["server", "short p50, s", "short p95", "long p50", "long p95"]
    if own is None:
        head += ["most images/s", "samples a call"]
    return _table(head, rows)


def _resident(found: Results) -> str:
    ways = {
        "cold": "cold (target 200)",
        "warm": "warm (target 10)",
        "unpacked": "never packed",
        "switch": "switch",
    }
    bounds = {"cold": 200.0, "warm": 10.0}
    rows = [
        (
            rank,
            f"{at['packed_bytes'] / 2**20:.1f}",
            _spread(at["resident_ms"], 1, "{:.1f}"),
            *(
                _judged(at["extra_ms"][way], bounds.get(way, math.inf), 1, most=True)
                for way in ways
            ),
        )
        for rank, at in found["first_step"].items()
    ]
    memory = found["memory"]
    rss = memory["rss_bytes"]
    return (
        _table(("rank", "MiB", "resident step, ms", *(f"{name}" for name in ways.values())), rows)
        + f"\n\nOver {memory['switches']} switches among {memory['adapters']} adapters, of which "
        f"the bank holds {memory['held']}: {memory['loads']:.0f} loads, {memory['evictions']:.0f} "
        f"evictions, {_spread(memory['step_ms'], 1, '{:.1f}')} ms a step; the backend's memory "
        f"{rss['min'] / 2**20:.0f} to {rss['max'] / 2**20:.0f} MiB once each was used, the second "
        f"half's peak {100 * memory['rss_growth']:+.1f} % over the first half's."
    )


def _spread(found: Results, factor: float, form: str) -> str:
    """Write a median and its quartiles."""
    middle, low, high = (form.format(factor * found[key]) for key in ("median", "p25", "p75"))
    return f"{middle} ({low} to {high})"


def _judged(found: Results, bound: float, digits: int, *, most: bool = False) -> str:
    """Write a median and its quartiles; a median that misses its bound says so, and shows it."""
    low, high = (f"{found[key]:.{digits}f}" for key in ("p25", "p75"))
    return f"{_number(found['median'], bound, digits, most=most)} ({low} to {high})"


def _number(value: float, bound: float, digits: int, *, most: bool = False) -> str:
    """Write a number with so many digits, or with as many as it takes to see that it misses.

    Args:
        value: The number.
        bound: What it is to be at least.
        digits: After the point.
        most: Whether it is to be at most that.
    """

    def misses(number: float) -> bool:
        return number > bound if most else number < bound

    if not misses(value):
        return f"{value:.{digits}f}"
    while not misses(round(value, digits)):
        digits += 1
    return f"**{value:.{digits}f}, missed**"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = list(head)
    lines = [cells, ["---"] * len(cells), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "overhead": ("1. What the platform adds to a drawing", _overhead),
    "mixed": ("2. A LoRA for each client", _mixed),
    "mixed_platform": ("2. The same through the whole platform", _mixed_platform),
    "continuous": ("3. Continuous batching", _continuous),
    "modelled": ("3. Batch caps on a modelled A100", _modelled),
    "resident": ("4. Adapters that the bank does not hold", _resident),
}


if __name__ == "__main__":
    replace_part("serve", render(json.loads(RESULTS.read_text(encoding="utf-8"))))
