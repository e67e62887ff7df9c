"""Retina U-Net learns one image by heart with each loss that its segmentation can have."""

from __future__ import annotations

import pytest
import torch
from learning_support import learn_by_heart, two_lesions

from medvision.models.retina_unet import (
    RetinaUNetCriterion,
    build_retina_unet,
    select_with_masks,
)
from medvision.models.retina_unet_config import RetinaUNetConfig

SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))
LOSSES = {
    "focal": {"focal": 1.0},
    "tversky": {"tversky": 1.0},
    "focal tversky and focal": {"focal_tversky": 0.5, "focal": 0.5},
}
"""Weights of the segmentation's losses; those of the default are 0 here."""

STEPS = 200
"""More than with the default losses: an overlap loss alone teaches the smaller lesion late."""


@pytest.mark.parametrize("name", LOSSES)
def test_boxes_and_masks_are_learnt_by_heart_with_other_losses(name: str) -> None:
    torch.manual_seed(0)
    config = RetinaUNetConfig.model_validate(
        {
            "width": 8,
            "pyramid_channels": 16,
            "segmentation_channels": 16,
            "anchor_sizes": SIZES,
            "segmentation_loss": {"dice": 0.0, "cross_entropy": 0.0, **LOSSES[name]},
        }
    )
    assert set(config.segmentation_loss.weights) == set(LOSSES[name])
    network = build_retina_unet(config, 3, 2)
    criterion = RetinaUNetCriterion(config, torch.ones(2))
    image, target = two_lesions()
    totals = learn_by_heart(network, criterion, image, target, STEPS)
    assert totals[-1] < 0.1 < 1 < totals[0], f"{totals[0]:.3f} -> {totals[-1]:.3f}"
    # In training mode: running statistics lag behind after so few steps.
    with torch.no_grad():
        raw = network(image)
        found = select_with_masks(raw, score_thresh=0.3, nms_thresh=0.3, detections_per_img=10)[0]
    assert len(found["masks"]) == 2
    assert raw.segmentation_logits is not None
    predicted = raw.segmentation_logits[0].argmax(dim=0)
    for number in (1, 2):
        there, said = target["class_map"] == number, predicted == number
        overlap = ((there & said).sum() / (there | said).sum()).item()
        assert overlap > 0.85, f"{number}: {overlap:.2f}"
