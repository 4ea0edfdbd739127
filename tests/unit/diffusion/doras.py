"""DoRAs to test with."""

import dataclasses

from toile.diffusion.adapters import AdapterWeights
from toile.diffusion.bundle import Bundle


def as_dora(weights: AdapterWeights, bundle: Bundle) -> AdapterWeights:
    """Give the adapter's layers magnitudes: half as long again as the rows of the base's are."""
    return AdapterWeights(
        {
            path: dataclasses.replace(
                layer, magnitude=1.5 * bundle.unet.get_submodule(path).weight.detach().norm(dim=1)
            )
            for path, layer in weights.layers.items()
        }
    )
