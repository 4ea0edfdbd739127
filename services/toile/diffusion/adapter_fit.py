"""Whether a LoRA can be applied to a base: what is refused before anything is drawn."""

from collections.abc import Mapping

from toile.core.errors import InvalidArgumentError
from toile.diffusion.adapters import AdapterWeights, LoraLayer
from toile.diffusion.bank import MAX_RANK


def check_base(weights: AdapterWeights, base_digest: str) -> None:
    """Refuse an adapter that says that it was trained on another base than this one.

    Raises:
        InvalidArgumentError: It was (`ADAPTER_MISMATCH`).
    """
    if base_digest and weights.base_digest and base_digest != weights.base_digest:
        raise InvalidArgumentError(
            "the adapter was trained on another base",
            field="adapters",
            reason="ADAPTER_MISMATCH",
            metadata={"base_digest": base_digest, "adapter_base_digest": weights.base_digest},
        )


def check_fits(weights: AdapterWeights, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that a UNet with these Linears cannot apply whole.

    Raises:
        InvalidArgumentError: A layer is not there, has other sizes, or its rank is over
            `MAX_RANK` (`ADAPTER_MISMATCH`).
    """
    check_layers(weights.layers, targets)
    for path, layer in weights.layers.items():
        if layer.rank > MAX_RANK:
            raise _misfit(f"{path} has rank {layer.rank}; at most {MAX_RANK} can be served")


def check_layers(layers: Mapping[str, LoraLayer], targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse layers that networks with these Linears cannot apply.

    Raises:
        InvalidArgumentError: One is not there, or has other sizes (`ADAPTER_MISMATCH`).
    """
    for path, layer in layers.items():
        have = (int(layer.down.shape[1]), int(layer.up.shape[0]))
        want = targets.get(path)
        if want is None:
            raise _misfit(f"the base has no Linear {path}")
        if have != want:
            raise _misfit(f"{path} is {have[0]} to {have[1]}; the base's is {want[0]} to {want[1]}")


def _misfit(problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the adapter does not fit the base: {problem}",
        field="adapters",
        reason="ADAPTER_MISMATCH",
    )
