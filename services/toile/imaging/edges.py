"""Edge maps: what a ControlNet is trained on and what shows a design's line."""

import cv2
import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]

_LEAST_CONTRAST = 24.0
"""Gradients below this, in 8-bit levels, are noise on plain cloth."""


def canny(image: UInt8Array) -> UInt8Array:
    """Canny edges of an sRGB image `[H, W, 3]`: `[H, W]`, 255 on an edge and 0 elsewhere.

    The upper threshold is Otsu's over the gradient magnitudes, so that pale lace on white keeps
    its edges and a busy print does not turn solid; the lower is half of it.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (3, 3), 0)
    along_x = cv2.Sobel(grey, cv2.CV_16S, 1, 0)
    along_y = cv2.Sobel(grey, cv2.CV_16S, 0, 1)
    magnitude = np.hypot(along_x.astype(np.float32), along_y.astype(np.float32)) / 4.0
    levels = np.clip(magnitude, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    upper = 4.0 * max(_LEAST_CONTRAST / 2.0, float(threshold))
    return np.asarray(cv2.Canny(along_x, along_y, upper / 2.0, upper, L2gradient=True), np.uint8)
