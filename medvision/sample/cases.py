"""One case of the sample: a piece of the CT with a plan's nodules, decoys around them, and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.sample.config import SampleConfig
from medvision.sample.decoys import draw_decoy
from medvision.sample.donors import Plan
from medvision.sample.lidc import Nodule, Outline
from medvision.sample.lungs import Chest, Lung
from medvision.sample.nodules import blend, core_coverage, draw, insert_nodule, solid_content
from medvision.sample.scene import Scene, Window, find_place, open_scene, touched_by
from medvision.sample.shapes import Shape, coverage, mask_of, outline_shape
from medvision.scans.volume import ScanSource, Volume

_TRAIN_PURPOSE = 2
_TEST_PURPOSE = 3
_WINDOW_ATTEMPTS = 20


@dataclass(frozen=True)
class Donated:
    """A nodule as put in: the label it got and the LIDC outline that shaped it."""

    label: int
    class_name: str
    diameter_mm: float
    annotation_id: int
    scan_id: int


@dataclass(frozen=True)
class PlacedDecoy:
    """A decoy as put in, with its middle as a voxel index (slice, row, column)."""

    kind: str
    center: tuple[int, int, int]


@dataclass(frozen=True)
class MadeCase:
    """A finished case: the scan in HU, what is to find in it, and what was put in."""

    case_id: str
    volume: Volume
    annotations: tuple[Annotation, ...]
    donated: tuple[Donated, ...]
    decoys: tuple[PlacedDecoy, ...]


Placed = tuple[Donated, Window, NDArray[np.bool_]]
"""A nodule with the window it lies in and its mask there."""


def make_train_case(
    chest: Chest,
    plan: Plan,
    index: int,
    config: SampleConfig,
    own: Annotation,
    place: Box | None = None,
) -> MadeCase:
    """Make training sub-volume number ``index``, at ``place`` or somewhere in the training lung.

    ``own`` is the CT's own nodule in the CT's grid: what of it comes into view is to be ignored.
    InputError if there is no room.
    """
    rng = np.random.default_rng([config.seed, _TRAIN_PURPOSE, index])
    for _ in range(_WINDOW_ATTEMPTS):
        box = place or draw_window(chest, config, rng)
        case = _make(chest, chest.right, box, plan, config, rng, config.train.decoys, own)
        if case is not None:
            return case
    raise InputError(f"The nodules of {plan.case_id} find no room in the training lung.")


def make_test_case(
    chest: Chest, plan: Plan, index: int, config: SampleConfig, own: Annotation
) -> MadeCase:
    """Make test lung number ``index``, whole; ``own`` as for ``make_train_case``."""
    rng = np.random.default_rng([config.seed, _TEST_PURPOSE, index])
    box = lung_window(chest, config.test.margin)
    for _ in range(_WINDOW_ATTEMPTS):
        case = _make(chest, chest.left, box, plan, config, rng, config.test.decoys, own)
        if case is not None:
            return case
    raise InputError(f"The nodules of {plan.case_id} find no room in the test lung.")


def _make(
    chest: Chest,
    lung: Lung,
    box: Box,
    plan: Plan,
    config: SampleConfig,
    rng: np.random.Generator,
    decoy_range: tuple[int, int],
    own: Annotation,
) -> MadeCase | None:
    scene = open_scene(chest, lung, box)
    seen = _part_inside(own, box)
    if seen is not None and seen.mask is not None:
        scene.occupy(seen.box.slices, seen.mask, config.placement.gap_mm)
    made = _fill(scene, plan, config, rng, decoy_range)
    if made is None:
        return None
    case = _finish(chest, box, scene, plan.case_id, *made)
    if seen is None:
        return case
    label = len(case.donated) + 1
    return replace(case, annotations=(*case.annotations, replace(seen, label=label)))


def _part_inside(annotation: Annotation, box: Box) -> Annotation | None:
    """Return what of a lesion lies in an integer ``box``, in that box's grid and to be ignored."""
    low = np.maximum(annotation.box.lower, box.lower).astype(int)
    high = np.minimum(annotation.box.upper, box.upper).astype(int)
    if annotation.mask is None or (low >= high).any():
        return None
    start = annotation.box.lower.astype(int)
    inner = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    if not annotation.mask[inner].any():
        return None
    part = Box(*(low - box.lower).tolist(), *(high - box.lower).tolist())
    return replace(annotation, box=part, mask=annotation.mask[inner], ignore=True)


def draw_window(chest: Chest, config: SampleConfig, rng: np.random.Generator) -> Box:
    """Draw a sub-volume that reaches over the training lung's box and holds enough of it."""
    lung, size = chest.right, np.array(config.train.size)
    over = size // 8
    low = np.maximum(lung.box.lower - over, 0).astype(int)
    high = np.minimum(lung.box.upper + over, lung.mask.shape).astype(int) - size
    for _ in range(1000):
        start = rng.integers(low, np.maximum(high, low) + 1)
        box = Box(*start.tolist(), *(start + size).tolist())
        if lung.mask[box.slices].mean() >= config.train.min_lung_fraction:
            return box
    raise InputError("No sub-volume of the training size holds enough lung.")


def lung_window(chest: Chest, margin: Sequence[int]) -> Box:
    """Return the test lung's box with a margin, inside the CT."""
    low, high = chest.left.box.lower - margin, chest.left.box.upper + margin
    return Box(*low.tolist(), *high.tolist()).clip(chest.volume.shape)


def _fill(
    scene: Scene,
    plan: Plan,
    config: SampleConfig,
    rng: np.random.Generator,
    decoy_range: tuple[int, int],
) -> tuple[list[Placed], list[PlacedDecoy]] | None:
    """Put nodules, the largest first, and then decoys into the scene; None if a nodule has no room."""
    placed: list[Placed] = []
    for nodule in sorted(plan.nodules, key=lambda n: -n.diameter_mm):
        found = _put_nodule(scene, nodule, config, rng, label=len(placed) + 1)
        if found is None:
            return None
        placed.append(found)
    decoys = []
    for _ in range(int(rng.integers(decoy_range[0], decoy_range[1] + 1))):
        decoy = _put_decoy(scene, plan.patch_outlines, config, rng)
        if decoy is not None:
            decoys.append(decoy)
    return placed, decoys


def _put_nodule(
    scene: Scene, nodule: Nodule, config: SampleConfig, rng: np.random.Generator, label: int
) -> Placed | None:
    low, high = config.diameter_mm
    fitting = [o for o in nodule.outlines if low <= o.diameter_mm <= high] or nodule.outlines
    outline = fitting[int(rng.integers(len(fitting)))]
    shape, shift = _turned(outline, rng), _shift(scene, rng)
    sigma = config.density.psf_sigma_px
    alpha = coverage(shape, scene.spacing_mm, shift, sigma)
    window = find_place(scene, alpha, config.placement, rng, in_parenchyma=True)
    if window is None:
        return None
    core = alpha
    if nodule.class_name == "part_solid":
        fraction = draw(config.density.core_fraction, rng)
        core = core_coverage(shape, fraction, scene.spacing_mm, shift, sigma)
    scene.hu[window] = insert_nodule(
        nodule.class_name,
        scene.hu[window],
        alpha,
        core,
        scene.noise[window],
        config.density,
        rng,
    )
    scene.occupy(window, touched_by(alpha), config.placement.gap_mm)
    donated = Donated(
        label, nodule.class_name, outline.diameter_mm, outline.annotation_id, nodule.scan_id
    )
    return donated, window, mask_of(alpha)


def _put_decoy(
    scene: Scene, outlines: Sequence[Outline], config: SampleConfig, rng: np.random.Generator
) -> PlacedDecoy | None:
    weights = np.array(list(config.decoys.weights.values()))
    kind = str(rng.choice(list(config.decoys.weights), p=weights / weights.sum()))
    shift, sigma = _shift(scene, rng), config.density.psf_sigma_px
    if kind == "patch":
        shape = _turned(outlines[int(rng.integers(len(outlines)))], rng)
    else:
        decoy = draw_decoy(kind, config.decoys, rng)
        shape = decoy.shape
    alpha = coverage(shape, scene.spacing_mm, shift, sigma)
    is_patch = kind == "patch"
    window = find_place(scene, alpha, config.placement, rng, in_parenchyma=is_patch)
    if window is None:
        return None
    if is_patch:
        other = find_place(scene, alpha, config.placement, rng, in_parenchyma=True)
        if other is None:
            return None
        content = scene.base[other]
    else:
        content = solid_content(scene.noise[window], decoy.mean_hu, decoy.texture_hu, rng)
    scene.hu[window] = blend(scene.hu[window], alpha, content)
    scene.occupy(window, touched_by(alpha), config.placement.gap_mm)
    middle = [(span.start + span.stop) // 2 for span in window]
    return PlacedDecoy(kind, (middle[0], middle[1], middle[2]))


def _finish(
    chest: Chest,
    box: Box,
    scene: Scene,
    case_id: str,
    placed: list[Placed],
    decoys: list[PlacedDecoy],
) -> MadeCase:
    array = np.rint(np.clip(scene.hu, -2048, 3071)).astype(np.int16)
    volume = replace(chest.volume.crop(box), array=array, source=ScanSource(modality="CT"))
    annotations = tuple(_annotation(donated, window, mask) for donated, window, mask in placed)
    return MadeCase(case_id, volume, annotations, tuple(p[0] for p in placed), tuple(decoys))


def _annotation(donated: Donated, window: Window, mask: NDArray[np.bool_]) -> Annotation:
    from scipy.ndimage import find_objects

    inner = find_objects(mask.astype(np.uint8))[0]
    low = [span.start + part.start for span, part in zip(window, inner, strict=True)]
    high = [span.start + part.stop for span, part in zip(window, inner, strict=True)]
    return Annotation(donated.label, donated.class_name, Box(*low, *high), mask[inner])


def _turned(outline: Outline, rng: np.random.Generator) -> Shape:
    angle = float(rng.uniform(0, 2 * np.pi))
    return outline_shape(outline, angle, bool(rng.random() < 0.5), bool(rng.random() < 0.5))


def _shift(scene: Scene, rng: np.random.Generator) -> tuple[float, float, float]:
    """Move by up to half a voxel each way, so that no edge always falls between two voxels."""
    z, y, x = (rng.uniform(-0.5, 0.5, 3) * scene.spacing_mm).tolist()
    return (z, y, x)
