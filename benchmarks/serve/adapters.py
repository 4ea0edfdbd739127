"""Random LoRAs on every target of a bank, in memory and as the files that trainers write."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from toile.diffusion.adapter_header import AdapterCard
from toile.diffusion.adapters import AdapterWeights, LoraLayer, write_adapter
from toile.diffusion.bank import BankLayout
from toile.diffusion.denoiser import LoadedAdapter

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def random_adapters(
    layout: BankLayout, count: int, *, rank: int = 16, first: int = 0
) -> list[LoadedAdapter]:
    """Return adapters that differ, each under a key of its own."""
    return [
        LoadedAdapter(
            f"projects/bench/models/r{rank}-{number}/versions/1", _weights(layout, number, rank)
        )
        for number in range(first, first + count)
    ]


def write_files(folder: Path, adapters: Sequence[LoadedAdapter]) -> list[Path]:
    """Write each adapter into a folder of its own with Toile's writer; return the folders."""
    folders = []
    for number, adapter in enumerate(adapters):
        card = AdapterCard(
            f"bench {number}",
            base="bases/tiny",
            base_digest="",
            resolution=128,
            created=CREATED,  # the same files every time, so that a store takes them twice
        )
        write_adapter(folder / str(number), adapter.weights, card)
        folders.append(folder / str(number))
    return folders


def _weights(layout: BankLayout, seed: int, rank: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            path: LoraLayer(
                torch.randn(rank, group.in_features, generator=generator) / rank,
                torch.randn(group.out_features, rank, generator=generator) * 0.02,
                float(rank),
            )
            for group in layout.groups
            for path in group.targets
        }
    )
