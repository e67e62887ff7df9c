"""How a slice is turned for the eye: the patient's right at the left, the head or the front up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from medvision.geometry import Affine, directions_of, spacing_of

_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))
"""Letters of the negative and the positive end of x, y and z (DICOM PS3.3 C.7.6.1.1.1)."""

_SECOND_LETTER = 0.35
"""A direction that leans more than about 20 degrees towards a second axis gets its letter too."""

PlaneBox = tuple[float, float, float, float]
"""row_min, column_min, row_max, column_max in voxel edges of a slice, or of its turned picture."""


@dataclass(frozen=True)
class SliceView:
    """The turn that shows slices as radiologists hang them, whatever way the array is stored.

    Axial and coronal slices have the patient's right at the left; axial ones have the front up,
    coronal and sagittal ones the head up, and sagittal ones the front at the left. ``pixel_mm`` is
    (down, across) after the turn; ``shape`` is (rows, columns) before it; ``left`` and the rest are
    the letters to print at the edges.
    """

    shape: tuple[int, int]
    transposed: bool
    flip_down: bool
    flip_across: bool
    pixel_mm: tuple[float, float]
    left: str
    right: str
    top: str
    bottom: str

    def turn(self, plane: NDArray) -> NDArray:
        """Return a slice ``[row, column]`` as the picture ``[down, across]``."""
        turned = plane.T if self.transposed else plane
        return turned[:: -1 if self.flip_down else 1, :: -1 if self.flip_across else 1]

    def turn_box(self, box: PlaneBox) -> PlaneBox:
        """Return a box of the slice as a box of the picture, both in voxel edges."""
        top, left, bottom, right = box
        height, width = self.shape
        if self.transposed:
            top, left, bottom, right, height, width = left, top, right, bottom, width, height
        if self.flip_down:
            top, bottom = height - bottom, height - top
        if self.flip_across:
            left, right = width - right, width - left
        return (top, left, bottom, right)


def view_of(affine: Affine, shape: tuple[int, int, int]) -> SliceView:
    """Choose the view of the slices of a scan of ``shape`` (slices, rows, columns)."""
    directions = directions_of(affine)
    down, across = directions[:, 1], directions[:, 2]
    down_axis, across_axis = _nearest_axes(down, across)
    _, down_mm, across_mm = spacing_of(affine)
    transposed = across_axis > down_axis
    if transposed:
        down, across, down_mm, across_mm = across, down, across_mm, down_mm
        down_axis, across_axis = across_axis, down_axis
    head_up = -1 if down_axis == 2 else 1
    flip_down = bool(down[down_axis] * head_up < 0)
    flip_across = bool(across[across_axis] < 0)
    down = -down if flip_down else down
    across = -across if flip_across else across
    return SliceView(
        shape=shape[1:],
        transposed=transposed,
        flip_down=flip_down,
        flip_across=flip_across,
        pixel_mm=(down_mm, across_mm),
        left=direction_letters(-across),
        right=direction_letters(across),
        top=direction_letters(-down),
        bottom=direction_letters(down),
    )


def direction_letters(direction: NDArray[np.float64]) -> str:
    """Name a direction in the patient (unit vector, LPS) by one letter, or two where it is oblique.

    R, L, A, P, F and H are right, left, anterior, posterior, feet and head; the nearer axis first.
    """
    order = np.argsort(-np.abs(direction), kind="stable")
    letters = [_LETTERS[axis][int(direction[axis] > 0)] for axis in order]
    return letters[0] + (letters[1] if abs(direction[order[1]]) > _SECOND_LETTER else "")


def _nearest_axes(down: NDArray[np.float64], across: NDArray[np.float64]) -> tuple[int, int]:
    """Return the two different patient axes that lie nearest to the two directions."""
    pairs = list(permutations(range(3), 2))
    best = max(pairs, key=lambda pair: abs(down[pair[0]]) + abs(across[pair[1]]))
    return best[0], best[1]
