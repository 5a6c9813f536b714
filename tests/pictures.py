"""What a PNG shows, for the tests of figures."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np


def pixels(image: bytes) -> np.ndarray:
    """[height, width, 3], from 0 to 1."""
    return matplotlib.image.imread(io.BytesIO(image), format="png")[..., :3]


def shows(image: bytes, colour: str) -> bool:
    """Whether some pixel has the colour `#RRGGBB`."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels(image) - wanted).max(axis=-1) < 0.01).any())
