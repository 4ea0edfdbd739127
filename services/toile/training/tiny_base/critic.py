"""A critic of small patches, which keeps the decoder's texture sharp."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from torch.nn.utils.parametrizations import spectral_norm

_WIDTHS = (3, 32, 64, 96)


class PatchCritic(nn.Module):
    """Judges overlapping patches of 22 pixels, real above zero (Isola et al., 2017).

    Spectral norms keep it smooth (Miyato et al., 2018), so that it needs no gradient penalty.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(_WIDTHS):
            layers += [_conv(before, after, stride=2 if after < _WIDTHS[-1] else 1)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv(_WIDTHS[-1], 1, stride=1))

    def forward(self, images: Tensor) -> Tensor:
        """Verdicts `[B, 1, h, w]` on pictures `[B, 3, H, W]` in -1..1."""
        return cast("Tensor", self.layers(images))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Give gradients to what is judged, and none to the critic."""
        self.requires_grad_(False)
        try:
            yield
        finally:
            self.requires_grad_(True)


def critic_loss(critic: PatchCritic, decoded: Tensor, images: Tensor) -> Tensor:
    """What the critic learns from: hinge losses of the decoded and the real."""
    fake, real = critic(decoded.detach()), critic(images)
    return F.relu(1.0 + fake).mean() + F.relu(1.0 - real).mean()


def deception_loss(critic: PatchCritic, decoded: Tensor) -> Tensor:
    """What the decoder learns from: how far from real its pictures are judged."""
    with critic.held():
        verdicts: Tensor = critic(decoded)
    return -verdicts.float().mean()


def _conv(before: int, after: int, *, stride: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(before, after, 4, stride, padding=1))
