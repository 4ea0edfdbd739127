"""Resource names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toile.core import names
from toile.core.errors import InvalidArgumentError

IDS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(IDS, IDS, IDS)
def test_a_name_survives_parsing(project: str, dataset: str, version: str) -> None:
    name = names.DatasetVersionName(project, dataset, version)
    assert names.DatasetVersionName.parse(str(name)) == name
    assert name.dataset_name == names.DatasetName(project, dataset)
    assert name.parent == names.ProjectName(project)


@given(st.text(max_size=100))
def test_parsing_accepts_only_what_formats_back(text: str) -> None:
    try:
        name = names.DatasetName.parse(text)
    except InvalidArgumentError:
        assert not names.DatasetName.matches(text)
    else:
        assert str(name) == text


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "projects/p",
        "projects//datasets/d",
        "projects/p/datasets/",
        "projects/p/models/m",
        "projects/p/datasets/d/versions/1",
        "/projects/p/datasets/d",
        "projects/p/datasets/../d",
        "projects/P/datasets/d",
        "projects/p/datasets/d\n",
    ],
)
def test_a_wrong_name_says_how_a_right_one_looks(bad: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"projects/\{project\}/datasets") as caught:
        names.DatasetName.parse(bad, "dataset")
    assert caught.value.reason == "BAD_RESOURCE_NAME"
    assert caught.value.metadata == {"field": "dataset"}


@pytest.mark.parametrize("bad", ["", "-a", "a-", "A", "a_b", "ä", "a" * 64, "a/b", "a\n", "."])
def test_a_wrong_id_is_refused(bad: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        names.check_id(bad, "dataset_id")
    assert caught.value.reason == "BAD_RESOURCE_ID"
    assert caught.value.metadata == {"field": "dataset_id"}


@pytest.mark.parametrize("good", ["a", "0", "lace-2", "a" * 63])
def test_a_right_id_is_kept(good: str) -> None:
    assert names.check_id(good, "dataset_id") == good


def test_a_long_wrong_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        names.ImageName.parse("x" * 10_000)
    assert len(caught.value.message) < 400


@given(IDS, IDS, IDS)
def test_an_alias_is_a_name_beside_the_versions(project: str, model: str, alias: str) -> None:
    name = names.ModelAliasName(project, model, alias)
    assert str(name) == f"projects/{project}/models/{model}@{alias}"
    assert names.ModelAliasName.parse(str(name)) == name
    assert name.model_name == names.ModelName(project, model)
    for other in (names.ModelName, names.ModelVersionName):
        assert not other.matches(str(name))


@pytest.mark.parametrize("bad", ["m", "m@", "@a", "m@a@b", "m@A", "m/versions/1@a", "m@a\n"])
def test_what_no_alias_looks_like(bad: str) -> None:
    assert not names.ModelAliasName.matches(f"projects/p/models/{bad}")
