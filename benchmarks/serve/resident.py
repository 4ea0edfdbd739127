"""Figure 4: what it costs to draw with an adapter that the bank does not hold, and its memory."""

import os
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring.timing import spread
from serve.adapters import random_adapters
from serve.bench import Bench
from serve.engine import serving

from toile.core.artifacts.local import LocalStore
from toile.diffusion.denoiser import LoadedAdapter
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.packed import PackedFiles
from toile.diffusion.triton.repository import FrontConfig

RANKS = (8, 16, 64)
SWITCH_RANK = 16
AMONG, HELD = 100, 20
"""Adapters that are switched among, and that the bank's budget holds."""
SAMPLES = 50
"""Readings of the backend's memory."""


def measure(bench: Bench) -> dict[str, Any]:
    """Time the first steps of adapters, then watch the memory of many switches."""
    return {"first_step": _first_steps(bench), "memory": _memory(bench)}


def _first_steps(bench: Bench) -> dict[str, Any]:
    """Time a step with an adapter for the first time, over a step with one that is resident.

    `cold`: packed in the store, the file not in the page cache. `warm`: packed and in the page
    cache. `unpacked`: in the client's memory alone, as for a bank that is new. `switch`: resident,
    but the step before was another's.
    """
    count, folder = bench.scale.loads, bench.scratch / "resident"
    store = LocalStore(folder / "artifacts")
    files = PackedFiles(store, bench.exported.layout)
    found: dict[str, Any] = {}
    config = FrontConfig(threads=bench.threads)
    with serving(bench.environment, bench.exported, folder / "triton", config) as served:
        step = _stepper(bench, served.denoiser(store))
        for rank in RANKS:
            bench.say(f"adapters of rank {rank}")
            adapters = random_adapters(bench.exported.layout, 3 * count + 2, rank=rank)
            usual, other = adapters[-2:]
            ways = {"cold": adapters[:count], "warm": adapters[count : 2 * count]}
            for adapter in (*ways["cold"], *ways["warm"]):
                files.put(adapter.key, adapter.weights)
            ways["unpacked"] = adapters[2 * count : 3 * count]
            ways["switch"] = [other] * count
            for adapter in (usual, other, usual):
                step(adapter)
            raw: dict[str, list[float]] = {way: [] for way in (*ways, "resident")}
            cached: list[float] = []
            for turn in range(count):
                for way, chosen in ways.items():
                    if way == "cold":
                        cached.append(_forget(_path(store, files, chosen[turn])))
                    before = step(usual)
                    first = step(chosen[turn])
                    raw["resident"] += [before, after := step(usual)]
                    raw[way].append(first - (before + after) / 2)
            found[str(rank)] = {
                "packed_bytes": _path(store, files, usual).stat().st_size,
                "cached_share_when_cold": max(cached),
                "resident_ms": spread([1e3 * value for value in raw["resident"]]),
                "extra_ms": {way: spread([1e3 * value for value in raw[way]]) for way in ways},
                "raw": raw,
            }
    return found


def _memory(bench: Bench) -> dict[str, Any]:
    """Watch the memory of the backend's process while the bank drops and reads adapters."""
    bench.say(f"{bench.scale.switches} switches")
    folder, switches = bench.scratch / "switches", bench.scale.switches
    adapters = random_adapters(bench.exported.layout, AMONG, rank=SWITCH_RANK, first=1000)
    store = LocalStore(folder / "artifacts")
    one = bench.exported.layout.bytes_per_rank(itemsize=4) * SWITCH_RANK
    config = FrontConfig(bank_bytes=HELD * one, threads=bench.threads)
    with serving(bench.environment, bench.exported, folder / "triton", config) as served:
        step = _stepper(bench, served.denoiser(store))
        backend, rss, seconds = served.backend(), [], []
        for number in range(switches):
            seconds.append(step(adapters[number % AMONG]))
            if number % max(1, switches // SAMPLES) == 0 or number == switches - 1:
                rss.append([number, backend.memory_info().rss])
        counters = served.counters()
    # All that the process takes once and keeps is there after each adapter was used once.
    settled = [size for number, size in rss if number >= min(AMONG, switches // 2)]
    half = len(settled) // 2
    return {
        "switches": switches,
        "adapters": AMONG,
        "held": HELD,
        "loads": counters["toile_bank_loads_total"],
        "evictions": counters["toile_bank_evictions_total"],
        "bank_bytes": counters["toile_bank_bytes"],
        "step_ms": spread([1e3 * value for value in seconds]),
        "rss_bytes": spread(settled),
        "rss_growth": max(settled[half:]) / max(settled[: max(1, half)]) - 1,
        "raw": {"rss_bytes": rss},
    }


def _stepper(bench: Bench, denoiser: TritonDenoiser) -> Callable[[LoadedAdapter], float]:
    """Return a way to time one evaluation, of a sample with and one without guidance."""
    bundle, side = bench.bundle, bench.size // 8
    encoded = bundle.encode_prompt("")
    conditions = {
        "text_embeds": torch.cat([encoded.negative_pooled, encoded.pooled]),
        "time_ids": torch.full((2, 6), float(bench.size)),
    }
    text = torch.cat([encoded.negative, encoded.prompt])
    sample = torch.zeros(2, 4, side, side)

    def step(adapter: LoadedAdapter) -> float:
        with denoiser.session([adapter]) as unet:
            started = time.perf_counter()
            unet(sample, torch.tensor(500), text, added_cond_kwargs=conditions)
            return time.perf_counter() - started

    return step


def _path(store: LocalStore, files: PackedFiles, adapter: LoadedAdapter) -> Path:
    link = store.presigned_url(files.key(adapter.key))
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(link).path))


def _forget(path: Path) -> float:
    """Take a file out of the page cache, and return the share of it that stayed there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    fincore = shutil.which("fincore")
    if fincore is None:
        return float("nan")
    told = subprocess.run(
        [fincore, "--bytes", "--noheadings", "--output", "res", str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(told.stdout) / path.stat().st_size
