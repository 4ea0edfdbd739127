"""The manifest's format."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.core.artifacts import FileEntry, Manifest
from toile.core.artifacts.store import check_key
from toile.core.errors import DataLossError, InvalidArgumentError

MANIFEST = "manifest.json"
SEGMENTS = st.text(
    st.characters(exclude_characters="/\\", exclude_categories=["C", "Z"]), min_size=1, max_size=12
).filter(lambda segment: segment not in {".", ".."})
NAMES = st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join).filter(MANIFEST.__ne__)
ENTRIES = st.builds(
    FileEntry,
    size_bytes=st.integers(0, 1 << 62),
    digest=st.binary(min_size=32, max_size=32).map(bytes.hex),
    attempt=st.just("") | st.just("attempt-1"),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 62), 1 << 62)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MANIFESTS = st.builds(
    Manifest,
    files=st.dictionaries(NAMES, ENTRIES, max_size=5),
    metadata=st.dictionaries(TEXT, JSON, max_size=4),
)


@given(MANIFESTS)
def test_reads_what_it_writes(manifest: Manifest) -> None:
    read = Manifest.from_json(manifest.to_json())
    assert read == manifest
    assert read.digest == manifest.digest
    assert read.to_json() == manifest.to_json()


@given(MANIFESTS)
def test_the_digest_is_that_of_the_content_in_any_order(manifest: Manifest) -> None:
    files = {
        name: FileEntry(entry.size_bytes, entry.digest)
        for name, entry in reversed(list(manifest.files.items()))
    }
    assert Manifest(files, manifest.metadata).digest == manifest.digest
    assert Manifest({**files, "another": FileEntry(0, "0" * 64)}, {}).digest != manifest.digest


@given(st.text(max_size=40))
def test_a_key_that_passes_stays_inside_its_folder(text: str) -> None:
    try:
        key = check_key(text)
    except InvalidArgumentError:
        return
    assert key == text
    assert key.isprintable()
    assert not {"", ".", ".."} & set(key.split("/"))


GOOD = {"format": 1, "files": {"a": {"size_bytes": 1, "digest": "0" * 64}}, "metadata": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": {"../a": GOOD["files"]["a"]}},  # type: ignore[index]
        {"files": {"/etc/passwd": GOOD["files"]["a"]}},  # type: ignore[index]
        {"files": {"manifest.json": GOOD["files"]["a"]}},  # type: ignore[index]
        {"files": {"a": {"size_bytes": -1, "digest": "0" * 64}}},
        {"files": {"a": {"size_bytes": "1", "digest": "0" * 64}}},
        {"files": {"a": {"size_bytes": 1, "digest": "0" * 63 + "g"}}},
        {"files": {"a": {"size_bytes": 1, "digest": "0" * 64, "attempt": "../x"}}},
        {"files": {"a": {"size_bytes": 1}}},
        {"metadata": []},
        {"more": 1},
    ],
    ids=lambda change: json.dumps(change)[:50],
)
def test_refuses_what_is_not_a_manifest(change: dict[str, object]) -> None:
    assert Manifest.from_json(json.dumps(GOOD).encode()).files["a"].size_bytes == 1
    with pytest.raises(DataLossError):
        Manifest.from_json(json.dumps(GOOD | change).encode())


@given(st.binary(max_size=60))
def test_noise_is_data_loss(noise: bytes) -> None:
    with pytest.raises(DataLossError):
        Manifest.from_json(noise)
