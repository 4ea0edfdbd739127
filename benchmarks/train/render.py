"""The results as Markdown."""

from collections.abc import Mapping
from typing import Any

_ARMS = {
    "script": "diffusers' example script",
    "loop": "Toile's loop",
    "pure": "UNet forward and backward alone",
}


def render(results: Mapping[str, Any]) -> str:
    """Return what was measured, each part with its machine."""
    return "\n".join([*_speed(results["speed"]), *_same(results["same"])])


def _speed(results: Mapping[str, Any]) -> list[str]:
    task = results["task"]
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
    return [
        "",
        _where(results),
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


def _same(results: Mapping[str, Any]) -> list[str]:
    steps = [1, *(step for step in (2, 5, 10, 20, 30, 45) if step <= results["steps"])]
    names = {**_ARMS, "disturbed": "the loop, the last bit of its first weights disturbed"}
    rows = []
    for arm in ("script", "loop", "disturbed"):
        losses = results["losses"][arm]
        rows.append(f"| {names[arm]} | {' | '.join(f'{losses[s - 1]:.6f}' for s in steps)} |")
    losses, weights = results["largest_relative_difference"], results["weights_difference"]
    return [
        "",
        _where(results),
        "",
        f"| loss of step | {' | '.join(str(step) for step in steps)} |",
        f"| --- | {' | '.join('---' for _ in steps)} |",
        *rows,
        "",
        f"On the same draws, in fp32, at a learning rate of {results['learning_rate']:g}, losses "
        f"differ by at most **{losses['script']:.1e}** of the loss, and the adapters at the "
        f"end by **{weights['script']:.1e}** of how far they moved; rounding alone makes "
        f"{losses['disturbed']:.1e} and {weights['disturbed']:.1e}.",
    ]


def _where(results: Mapping[str, Any]) -> str:
    run, machine = results["run"], results["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {machine['versions']['torch']}, diffusers {machine['versions']['diffusers']}; "
        f"{run['began'][:10]}; other processes took {100 * run['others_share']:.0f} % of the "
        "processors."
    )


def _spread(values: Mapping[str, float], digits: int = 2) -> str:
    low, high = values["p25"], values["p75"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
