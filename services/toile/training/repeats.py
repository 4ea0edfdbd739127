"""How often an epoch shows each image. Free of torch, so that services can ask."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from toile.core.errors import InvalidArgumentError


def repeat_counts(repeats: Mapping[str, int], names: Sequence[str], *, recipe: str) -> list[int]:
    """Return how often each image is shown in an epoch: once, where no pattern matches.

    What kohya's trainers say with a folder's name, `4_detail`, is `{"detail/*": 4}` here. Patterns
    have no order in a request, so an image that two of them match is refused.

    Args:
        repeats: Counts by patterns, as `fnmatch` has them; `*` matches slashes too.
        names: Names that the images were imported under.
        recipe: Named by the errors.

    Raises:
        InvalidArgumentError: A pattern matches no image (`REPEATS_MATCH_NOTHING`), or two match
            the same (`REPEATS_OVERLAP`).
    """
    counts = [1] * len(names)
    matched: dict[int, str] = {}
    for pattern, count in repeats.items():
        field = f"{recipe}.repeats.{pattern}"
        places = [place for place, name in enumerate(names) if fnmatchcase(name, pattern)]
        if not places:
            raise InvalidArgumentError(
                f"{field} matches no image of the dataset; one is {names[0]!r}",
                field=field,
                reason="REPEATS_MATCH_NOTHING",
            )
        for place in places:
            if place in matched:
                raise InvalidArgumentError(
                    f"{field} matches {names[place]!r}, and so does {matched[place]!r}",
                    field=field,
                    reason="REPEATS_OVERLAP",
                )
            matched[place] = pattern
            counts[place] = count
    return counts
