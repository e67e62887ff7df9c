"""Bring the pixels of a scan's slices to the size that a network was trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision import geometry
from medvision.geometry import Affine
from medvision.scans.volume import Volume

_SAME_SIZE = 0.01


def inplane_shape(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], pixel_mm: float
) -> tuple[int, int, int]:
    """Return the array size after bringing rows and columns to ``pixel_mm``; slices stay."""
    rows = max(1, round(shape[1] * spacing_mm[1] / pixel_mm))
    columns = max(1, round(shape[2] * spacing_mm[2] / pixel_mm))
    return (shape[0], rows, columns)


def resample_inplane(volume: Volume, pixel_mm: float) -> Volume:
    """Return the volume with square pixels of about ``pixel_mm``; slices are left as they are.

    The outer edges of the field stay where they are, so that a box scales by the ratio of the two
    sizes. Pixels within 1 percent of ``pixel_mm`` are left alone.
    """
    if not needs_resampling(volume.spacing_mm, pixel_mm):
        return volume
    shape = inplane_shape(volume.shape, volume.spacing_mm, pixel_mm)
    array = resize_slices(volume.array, shape[1:], smooth=True)
    return Volume(
        array, scaled_affine(volume.affine, volume.shape, shape), volume.source, volume.notes
    )


def needs_resampling(spacing_mm: tuple[float, float, float], pixel_mm: float) -> bool:
    """Tell whether rows or columns differ from ``pixel_mm`` by more than 1 percent."""
    return any(abs(size / pixel_mm - 1) > _SAME_SIZE for size in spacing_mm[1:])


def scaled_affine(
    affine: Affine, shape: tuple[int, int, int], new_shape: tuple[int, int, int]
) -> Affine:
    """Return the affine of an array of ``new_shape`` over the same field of view."""
    ratio = np.array(shape, dtype=float) / np.array(new_shape, dtype=float)
    scaled = affine.copy()
    scaled[:3, :3] = affine[:3, :3] * ratio
    # The outer edge stays: old index -0.5 is new index -0.5.
    scaled[:3, 3] = geometry.index_to_patient(affine, ratio / 2 - 0.5)
    return scaled


def resize_slices(array: NDArray, size: tuple[int, int], *, smooth: bool) -> NDArray:
    """Resize every slice to ``size`` (rows, columns): bilinear, or nearest for labels.

    A bilinear reduction is smoothed first, since thin lesions would otherwise fall between samples.
    """
    import SimpleITK as sitk

    rows, columns = array.shape[1:]
    scale = (rows / size[0], columns / size[1])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    if smooth and max(scale) > 1:
        sigma = [0.35 * max(scale[1], 1e-6), 0.35 * max(scale[0], 1e-6), 0.0]
        image = sitk.DiscreteGaussian(sitk.Cast(image, sitk.sitkFloat32), [s * s for s in sigma])
    grid = sitk.Image([size[1], size[0], array.shape[0]], image.GetPixelID())
    grid.SetSpacing((scale[1], scale[0], 1.0))
    grid.SetOrigin((scale[1] / 2 - 0.5, scale[0] / 2 - 0.5, 0.0))
    interpolator = sitk.sitkLinear if smooth else sitk.sitkNearestNeighbor
    # Without clamping, samples in the outer half pixel would fall outside and become zero.
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(grid)
    resampler.SetInterpolator(interpolator)
    resampler.SetUseNearestNeighborExtrapolator(True)
    resized = sitk.GetArrayFromImage(resampler.Execute(image))
    if np.issubdtype(array.dtype, np.integer):
        resized = np.rint(resized)
    return resized.astype(array.dtype, copy=False)
