"""The crops of a run: which lesions of which cases they are drawn from, and what their targets hold."""

from __future__ import annotations

from medvision.detector import DetectorConfig
from medvision.models.family import NEED_MASKS
from medvision.models.family_config import ModelConfig
from medvision.models.retina_unet_config import RetinaUNetConfig
from medvision.models.unet_config import UNetConfig
from medvision.stacks.augment import Augmenter
from medvision.training.cache import CachedCase
from medvision.training.config import TrainConfig
from medvision.training.large_lesions import tell_too_large
from medvision.training.samples import CropSampler, find_training_lesions
from medvision.training.targets import OutlineTargets


def training_crops(
    cases: list[CachedCase], detector: DetectorConfig, config: TrainConfig
) -> CropSampler:
    """Return the crops that ``detector`` is trained on; says which lesions are too large for any."""
    lesions = find_training_lesions(cases, detector.class_names)
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


def outline_targets(model: ModelConfig) -> OutlineTargets | None:
    """Return what a model that draws outlines is trained from; None for one that draws boxes alone."""
    if isinstance(model, UNetConfig):
        return OutlineTargets(model.loss.border_weight, model.loss.border_sigma)
    if isinstance(model, RetinaUNetConfig):
        loss = model.segmentation_loss
        return OutlineTargets(loss.border_weight, loss.border_sigma)
    # Mask R-CNN has a loss inside each region, which knows of no borders.
    return OutlineTargets(0.0, 1.0) if model.name in NEED_MASKS else None
