import pytest

from toile.core.content import TERMS, restricted_term


@pytest.mark.parametrize(
    "text",
    [
        *TERMS,
        "a NUDE woman",
        "two naked young men on a beach",
        "a woman, naked",
        "a model standing nude in a room",
        "(nude:1.2) woman",
        "FULL_FRONTAL view",
        "a full-frontal view",
        "fullfrontal",
        "\uff4e\uff53\uff46\uff57",  # full-width letters
        "a red dress, topless",
    ],
)
def test_what_is_for_adults(text: str) -> None:
    assert restricted_term(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a nude tulle dress",
        "nude pumps on a model",
        "a model wearing nude heels",
        "a woman in a nude dress, studio light",
        "nude heels, woman in a garden",
        "a six-gore skirt",
        "a toplessness of mind",
        "Essex actor",
        "sheer lace lingerie on a mannequin",
        "a mannequin, nude lace",
    ],
)
def test_what_a_studio_says_every_day(text: str) -> None:
    assert restricted_term(text) is None
