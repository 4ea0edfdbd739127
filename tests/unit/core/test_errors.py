"""The error tree: one status and one stable reason for each class, also across processes."""

import pickle
from collections.abc import Iterator

import grpc
import pytest

from toile.core import errors


def tree(kind: type[errors.ToileError]) -> Iterator[type[errors.ToileError]]:
    for child in kind.__subclasses__():
        yield child
        yield from tree(child)


# Those of the module itself: what other modules add depends on which were imported.
KINDS = [kind for kind in tree(errors.ToileError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_drawn_in_the_tree(kind: type[errors.ToileError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_on_purpose_is_internal(kind: type[errors.ToileError]) -> None:
    assert kind.status not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def test_reasons_tell_the_classes_apart() -> None:
    reasons = [kind.default_reason for kind in KINDS]
    assert len(set(reasons)) == len(KINDS)
    assert all(reason == reason.upper() for reason in reasons)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_back_from_a_worker(kind: type[errors.ToileError]) -> None:
    error = kind("said so", reason="SPECIAL", metadata={"field": "x", "other": "y"})
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - what Ray does between processes
    assert type(back) is kind
    assert (back.message, back.reason, back.metadata) == (
        "said so",
        "SPECIAL",
        {"field": "x", "other": "y"},
    )
    assert str(back) == "said so"


def test_an_invalid_argument_names_its_field() -> None:
    assert errors.InvalidArgumentError("no", field="prompt").metadata == {"field": "prompt"}
