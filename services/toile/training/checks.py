"""What stands against a training although its configuration is well formed, and what it holds out.

Free of torch, as the train service is.
"""

import hashlib
import importlib.util
from collections.abc import Sequence

from toile.core.errors import FailedPreconditionError
from toile.training.config import LoraRecipeConfig, RecipeConfig


def check_installed(config: RecipeConfig) -> None:
    """Refuse an optimizer whose package is not installed here.

    Raises:
        FailedPreconditionError: It is not (`OPTIMIZER_NOT_INSTALLED`).
    """
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise FailedPreconditionError(
            f"{config.RECIPE}.optimizer: adamw8bit needs bitsandbytes where trainings run: "
            "pip install 'toile[adamw8bit]'",
            reason="OPTIMIZER_NOT_INSTALLED",
            metadata={"field": f"{config.RECIPE}.optimizer"},
        )


def lacks_masks(what: str) -> FailedPreconditionError:
    """The error where a masked loss is asked for and `what` has no masks."""
    return FailedPreconditionError(
        f"{what} has no masks of the garment, which lora.masked_loss needs",
        reason="DATASET_LACKS_MASKS",
        metadata={"field": "lora.masked_loss"},
    )


def lacks_maps(what: str) -> FailedPreconditionError:
    """The error where maps that came with the images are asked for and `what` has none."""
    return FailedPreconditionError(
        f"{what} has no map, which controlnet.control_kind: given needs for each image; import one "
        "as conditioning/NAME for the image NAME, and build a version",
        reason="DATASET_LACKS_MAPS",
        metadata={"field": "controlnet.control_kind"},
    )


def held_out_count(images: int, share: float, *, recipe: str = LoraRecipeConfig.RECIPE) -> int:
    """Return how many of a dataset's images are held out: one at least, none if the share is 0.

    Args:
        images: The dataset's.
        share: What the recipe's configuration says.
        recipe: Named by the error.

    Raises:
        FailedPreconditionError: None would be left to train on (`DATASET_TOO_SMALL`).
    """
    if not share:
        return 0
    count = max(1, round(share * images))
    if count >= images:
        raise FailedPreconditionError(
            f"a validation_share of {share:g} needs 2 images at least; the dataset has {images}",
            reason="DATASET_TOO_SMALL",
            metadata={"field": f"{recipe}.validation_share"},
        )
    return count


def hold_out(
    names: Sequence[str], share: float, *, recipe: str = LoraRecipeConfig.RECIPE
) -> tuple[list[int], list[int]]:
    """Places of the examples to train on, and of those to validate on; none if the share is 0.

    Those whose names have the smallest digests are held out, one at least: the same ones in every
    run, in no order that a folder could have. An error names the recipe.

    Raises:
        FailedPreconditionError: None would be left to train on (`DATASET_TOO_SMALL`).
    """
    count = held_out_count(len(names), share, recipe=recipe)
    ordered = sorted(range(len(names)), key=lambda place: (_digest(names[place]), place))
    return sorted(ordered[count:]), sorted(ordered[:count])


def sample_order(names: Sequence[str], share: float, *, recipe: str) -> list[int]:
    """Places of the examples as samples are drawn of them: those that are held out come first.

    Raises:
        FailedPreconditionError: As for `hold_out`.
    """
    training, held_out = hold_out(names, share, recipe=recipe)
    return [*held_out, *training]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
