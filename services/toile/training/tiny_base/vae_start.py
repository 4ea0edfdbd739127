"""A starting point for the autoencoder from which colours are right at once.

A small autoencoder started at random first finds brightness, then one axis of colour, and the last
one late. Here the network starts as a linear map instead: the encoder takes the mean colour of
every 8x8 block, the decoder spreads it out again, and training adds the detail.

The means travel through twelve channels that every block leaves alone (its second convolution
starts at zero). Group normalisation would scale them by each picture's own spread, so constants
`+K` and `-K` travel in the same groups and hold that spread nearly fixed; SiLU is undone exactly,
because silu(x) - silu(-x) = x and every colour travels with its negative.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

_CONSTANT = 6.0
_CARRIED = 12
_POSITIVE = (0, 4, 8)
_NEGATIVE = (1, 5, 9)
_CONSTANTS = {
    2: _CONSTANT,
    3: -_CONSTANT,
    6: _CONSTANT,
    7: -_CONSTANT,
    10: _CONSTANT,
    11: -_CONSTANT,
}
_START_LOG_VARIANCE = -4.0

# Brightness and two colour differences, scaled to similar spreads; the fourth latent starts free.
_TO_LATENT = torch.tensor([[1.0, 1.0, 1.0], [1.5, 0.0, -1.5], [-1.0, 2.0, -1.0]])


def start_linear(vae: AutoencoderKL) -> None:
    """Set the weights in place; what does not carry colour keeps its random start."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                nn.init.zeros_(_bias(module.conv2))
                if module.conv_shortcut is not None:
                    _pass_through(module.conv_shortcut)
        _start_encoder(vae.encoder)
        _start_decoder(vae.decoder)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
            conv.bias.zero_()


def _bias(conv: nn.Conv2d) -> Tensor:
    bias = conv.bias
    if bias is None:
        raise ValueError("the autoencoder's convolutions have biases")
    return bias


def _pass_through(conv: nn.Conv2d) -> None:
    """Carried channels in, the same out."""
    middle = conv.kernel_size[0] // 2
    conv.weight[:_CARRIED] = 0.0
    _bias(conv)[:_CARRIED] = 0.0
    for channel in range(_CARRIED):
        conv.weight[channel, channel, middle, middle] = 1.0


def _carry_in(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Three colours from the inputs by a matrix `[3, inputs]`, their negatives, and constants."""
    conv.weight[:_CARRIED] = 0.0
    _bias(conv)[:_CARRIED] = 0.0
    for colour in range(3):
        conv.weight[_POSITIVE[colour], : matrix.shape[1], 1, 1] = matrix[colour]
        conv.weight[_NEGATIVE[colour], : matrix.shape[1], 1, 1] = -matrix[colour]
    for channel, value in _CONSTANTS.items():
        _bias(conv)[channel] = value


def _carry_out(conv: nn.Conv2d, matrix: Tensor, spread: float) -> None:
    """The outputs from the carried colours by a matrix `[outputs, 3]`, normalisation undone."""
    rows = matrix.shape[0]
    conv.weight[:rows] = 0.0
    _bias(conv)[:rows] = 0.0
    for row in range(rows):
        for colour in range(3):
            conv.weight[row, _POSITIVE[colour], 1, 1] = matrix[row, colour] * spread
            conv.weight[row, _NEGATIVE[colour], 1, 1] = -matrix[row, colour] * spread


def _spread(norm: nn.GroupNorm) -> float:
    """The standard deviation that the constants give the first group(s)."""
    members = norm.num_channels // norm.num_groups
    constants = sum(1 for channel in _CONSTANTS if channel < members)
    return float((constants * _CONSTANT**2 / members) ** 0.5)


def _start_encoder(encoder: Any) -> None:
    _carry_in(encoder.conv_in, torch.eye(3))
    for block in encoder.down_blocks:
        for downsampler in block.downsamplers or ():
            _pass_through(downsampler.conv)
            downsampler.conv.weight[:_CARRIED] = 0.0
            for channel in range(_CARRIED):
                downsampler.conv.weight[channel, channel, 0:2, 0:2] = 0.25
    _carry_out(encoder.conv_out, _TO_LATENT, _spread(encoder.conv_norm_out))
    latents = encoder.conv_out.weight.shape[0] // 2
    encoder.conv_out.weight[latents:] = 0.0
    _bias(encoder.conv_out)[latents:] = _START_LOG_VARIANCE


def _start_decoder(decoder: Any) -> None:
    _carry_in(decoder.conv_in, torch.linalg.inv(_TO_LATENT))
    for block in decoder.up_blocks:
        for upsampler in block.upsamplers or ():
            _pass_through(upsampler.conv)
    _carry_out(decoder.conv_out, torch.eye(3), _spread(decoder.conv_norm_out))
