"""How different two colours look: CIEDE2000.

After G. Sharma, W. Wu, E. N. Dalal, "The CIEDE2000 color-difference formula: implementation
notes, supplementary test data, and mathematical observations", Color Res. Appl. 30 (2005).
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def delta_e_2000(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """CIEDE2000 between CIELAB colours `[..., 3]`, broadcast; about 1 is just noticeable."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    chroma_mean = (np.hypot(one[..., 1], one[..., 2]) + np.hypot(two[..., 1], two[..., 2])) / 2
    stretch = 1 + 0.5 * (1 - np.sqrt(chroma_mean**7 / (chroma_mean**7 + 25.0**7)))
    a_one, a_two = one[..., 1] * stretch, two[..., 1] * stretch
    c_one, c_two = np.hypot(a_one, one[..., 2]), np.hypot(a_two, two[..., 2])
    h_one = np.degrees(np.arctan2(one[..., 2], a_one)) % 360
    h_two = np.degrees(np.arctan2(two[..., 2], a_two)) % 360
    grey = c_one * c_two == 0

    turn = np.where(grey, 0.0, (h_two - h_one + 180) % 360 - 180)
    delta_l, delta_c = two[..., 0] - one[..., 0], c_two - c_one
    delta_h = 2 * np.sqrt(c_one * c_two) * np.sin(np.radians(turn / 2))

    l_mean, c_mean = (one[..., 0] + two[..., 0]) / 2, (c_one + c_two) / 2
    h_mean = _mean_hue(h_one, h_two, grey)
    s_l = 1 + 0.015 * (l_mean - 50) ** 2 / np.sqrt(20 + (l_mean - 50) ** 2)
    s_c = 1 + 0.045 * c_mean
    s_h = 1 + 0.015 * c_mean * _hue_weight(h_mean)
    rotation = (
        -np.sin(np.radians(60 * np.exp(-(((h_mean - 275) / 25) ** 2))))
        * 2
        * np.sqrt(c_mean**7 / (c_mean**7 + 25.0**7))
    )
    l_term, c_term, h_term = delta_l / s_l, delta_c / s_c, delta_h / s_h
    squared = l_term**2 + c_term**2 + h_term**2 + rotation * c_term * h_term
    difference: FloatArray = np.sqrt(np.maximum(squared, 0.0))
    return difference


def _mean_hue(first: FloatArray, second: FloatArray, grey: npt.NDArray[np.bool_]) -> FloatArray:
    """Mean of two angles in degrees the short way round; their sum where one has no hue."""
    total = first + second
    apart = np.abs(first - second) > 180
    around = np.where(total < 360, total + 360, total - 360)
    return np.where(grey, total, np.where(apart, around, total) / 2)


def _hue_weight(hue: FloatArray) -> FloatArray:
    return (
        1
        - 0.17 * np.cos(np.radians(hue - 30))
        + 0.24 * np.cos(np.radians(2 * hue))
        + 0.32 * np.cos(np.radians(3 * hue + 6))
        - 0.20 * np.cos(np.radians(4 * hue - 63))
    )
