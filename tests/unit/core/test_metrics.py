"""Metrics over HTTP, on a port of the process."""

import socket

import httpx
import pytest

from toile.core import metrics


def test_metrics_are_served_and_stop() -> None:
    port, stop = metrics.serve("127.0.0.1", 0)
    try:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        stop()
    assert "# TYPE toile_rpc_duration_seconds histogram" in text
    assert "# TYPE toile_rpc_in_flight gauge" in text
    assert "process_resident_memory_bytes" in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        metrics.serve("127.0.0.1", taken.getsockname()[1])


def test_names_and_labels_follow_the_rules() -> None:
    for family in metrics.REGISTRY.collect():
        if family.name.startswith(("process_", "python_")):
            continue
        assert family.name.startswith("toile_")
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels <= {"service", "method", "code", "le"}
