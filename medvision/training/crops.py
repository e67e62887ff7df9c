"""The crops of a run: which lesions of which cases they are drawn from, and what their targets hold."""

from __future__ import annotations

import logging

from medvision.detector import DetectorConfig
from medvision.models.family import NEED_MASKS
from medvision.models.family_config import ModelConfig
from medvision.models.retina_unet_config import RetinaUNetConfig
from medvision.models.unet_config import UNetConfig
from medvision.stacks.augment import Augmenter
from medvision.training.cache import CachedCase
from medvision.training.config import TrainConfig
from medvision.training.large_lesions import tell_too_large
from medvision.training.samples import CropSampler, Lesion, find_training_lesions
from medvision.training.targets import OutlineTargets

logger = logging.getLogger(__name__)


def training_crops(
    cases: list[CachedCase], detector: DetectorConfig, config: TrainConfig
) -> CropSampler:
    """Return the crops that ``detector`` is trained on; says which lesions are too large for any.

    A model that draws outlines learns them from lesions with an outline alone; says how many have none.
    """
    lesions = find_training_lesions(cases, detector.class_names)
    if detector.model.name in NEED_MASKS:
        tell_without_outline(lesions, cases, detector)
    if isinstance(detector.model, UNetConfig):
        # Of the others a U-Net can learn nothing: crops of them would be spent in vain.
        lesions = [lesion for lesion in lesions if _has_outline(lesion, cases)]
    tell_too_large(lesions, cases, config)
    return CropSampler(
        cases,
        lesions,
        detector.stack,
        config.sampling,
        Augmenter(config.augment, config.sampling.crop_size),
        config.seed,
        outline_targets(detector.model),
    )


def tell_without_outline(
    lesions: list[Lesion], cases: list[CachedCase], detector: DetectorConfig
) -> None:
    """Log how many lesions are known by their boxes alone, what becomes of them, and what would help."""
    without = [lesion for lesion in lesions if not _has_outline(lesion, cases)]
    if not without:
        return
    known = {lesion.class_index for lesion in lesions if _has_outline(lesion, cases)}
    unknown = [name for index, name in enumerate(detector.class_names) if index not in known]
    use = "their boxes are learned, and outlines from the others alone"
    if isinstance(detector.model, UNetConfig):
        use = "they are left out, as U-Net learns from outlines alone"
    logger.warning(
        "%d of %d lesions have a box and no outline: %s. They count neither as lesion nor as background in "
        "the outlines.%s The first is in %s. Put a label volume for each such scan into labels/ to use them.",
        len(without),
        len(lesions),
        use,
        f" Of class {', '.join(unknown)} no lesion has an outline." if unknown else "",
        cases[without[0].case].case_id,
    )


def _has_outline(lesion: Lesion, cases: list[CachedCase]) -> bool:
    return lesion.label not in cases[lesion.case].boxed


def outline_targets(model: ModelConfig) -> OutlineTargets | None:
    """Return what a model that draws outlines is trained from; None for one that draws boxes alone."""
    if isinstance(model, UNetConfig):
        return OutlineTargets(model.loss.border_weight, model.loss.border_sigma)
    if isinstance(model, RetinaUNetConfig):
        loss = model.segmentation_loss
        return OutlineTargets(loss.border_weight, loss.border_sigma)
    # Mask R-CNN has a loss inside each region, which knows of no borders.
    return OutlineTargets(0.0, 1.0) if model.name in NEED_MASKS else None
