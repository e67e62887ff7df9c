"""Annotation: one reference finding of a scan, as a reader marked it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Box


@dataclass(frozen=True)
class Annotation:
    """A lesion in a scan's voxel grid.

    ``mask[slice, row, column]`` is True on the lesion inside ``box`` (shape of ``box.slices``, integer
    edges), or None where only a box is known. ``label`` is the value in the label volume, 1 or more.
    ``ignore`` marks a region that is neither a lesion to find nor a false positive if found.
    """

    label: int
    class_name: str
    box: Box
    mask: NDArray[np.bool_] | None = None
    ignore: bool = False

    def __post_init__(self) -> None:
        if self.label < 1:
            raise InputError(f"An annotation's label must be 1 or more; got {self.label}.")
        if self.mask is not None:
            size = tuple(axis.stop - axis.start for axis in self.box.slices)
            if self.mask.shape != size:
                raise InputError(
                    f"An annotation's mask must fill its box {size}; got {self.mask.shape}."
                )
