"""What stands against a training although its configuration is well formed. Free of torch."""

import importlib.util

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
