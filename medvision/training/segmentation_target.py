"""The truth of a segmentation, pixel by pixel, from the label map of a crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError

BACKGROUND = 0
IGNORED = 255
"""Value of pixels that are neither lesion nor background; losses leave them out."""


def make_class_map(labels: NDArray[np.integer], classes: Sequence[int | None]) -> NDArray[np.uint8]:
    """Return the class of each pixel: 0 background, 1 + class index, or 255 for ignored.

    ``labels[row, column]`` holds 0 or the number of a lesion; lesion n is of class ``classes[n - 1]``,
    counted from 0, None for one to be ignored. Raises InputError for a label without an entry
    and for more classes than 254.
    """
    if labels.size and int(labels.max()) > len(classes):
        raise InputError(
            f"Every label of a crop must have an entry; got label {int(labels.max())} "
            f"and {len(classes)} entries."
        )
    values = [BACKGROUND, *(IGNORED if index is None else index + 1 for index in classes)]
    if any(index is not None and not 0 <= index < IGNORED - 1 for index in classes):
        raise InputError(f"A class index must be in 0..{IGNORED - 2}; got {list(classes)}.")
    return np.array(values, dtype=np.uint8)[labels]


def border_weights(
    labels: NDArray[np.integer], strength: float, sigma: float
) -> NDArray[np.float32]:
    """Return what is added to the weights ``[row, column]`` of background between close lesions.

    Ronneberger et al. 2015, equation 2 without its class term: strength *
    exp(-(d1 + d2)^2 / (2 sigma^2)), d1 and d2 the distances in pixels to the two nearest lesions; 10 and 5
    in the paper. So a network learns to keep lesions apart that nearly touch. 0 elsewhere.
    """
    from scipy.ndimage import distance_transform_edt

    weights = np.zeros(labels.shape, dtype=np.float32)
    numbers = np.unique(labels[labels > 0])
    if len(numbers) < 2:
        return weights
    distances = np.stack([distance_transform_edt(labels != number) for number in numbers])
    both = np.partition(distances, 1, axis=0)[:2].sum(axis=0)
    added = strength * np.exp(-(both**2) / (2 * sigma**2))
    weights[labels == 0] = added[labels == 0]
    return weights
