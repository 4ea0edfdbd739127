"""The results as Markdown."""

from collections.abc import Mapping
from typing import Any

_ARMS = {
    "script": "diffusers' example script",
    "loop": "Toile's loop",
    "pure": "UNet forward and backward alone",
}


def render(results: Mapping[str, Any]) -> str:
    """Return the table of a run."""
    run, machine, task = results["run"], results["machine"], results["task"]
    rows = []
    for arm, name in _ARMS.items():
        rate, peak = results["images_per_second"][arm], results["peak_bytes"][arm]
        loss = results["mean_loss"].get(arm)
        rows.append(
            f"| {name} | {_spread(rate)} | {peak['median'] / 2**30:.2f} GiB | "
            f"{_spread(loss, 4) if loss else ''} |"
        )
    counted = task["steps"] - task["warm_up"]
    head = [
        f"{counted} steps, batch {task['batch_size']}, rank 16",
        "images/s",
        "peak memory",
        f"mean loss of the last {task['smoothed']} steps",
    ]
    return "\n".join(
        [
            "",
            f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
            f"torch {machine['versions']['torch']}, diffusers {machine['versions']['diffusers']}; "
            f"{run['began'][:10]}; other processes took {100 * run['others_share']:.0f} % of the "
            "processors.",
            "",
            f"| {' | '.join(head)} |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Toile's loop over the script: **{_spread(results['over_script'])} times** (target "
            f"1.5); over the UNet alone: **{_spread(results['share_of_pure'])}** (target 0.9). "
            "What the loop computes once, before its first step, took "
            f"{results['cache_seconds']['median']:.1f} s.",
        ]
    )


def _spread(values: Mapping[str, float], digits: int = 2) -> str:
    low, high = values["p25"], values["p75"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
