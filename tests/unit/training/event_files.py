"""Event files, as TensorBoard's own reader finds them."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by the names of their series."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, round(event.value, 6)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
