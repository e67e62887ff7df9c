"""What the tests of learning share: one image with two lesions, and steps enough to know it by heart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medvision.models.retina_unet import SegmentedTarget


def two_lesions() -> tuple[Tensor, SegmentedTarget]:
    """Return an image ``[1, 3, 48, 48]`` with a bright and a large dim lesion, and the truth."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 48, 48) * 0.2
    class_map = torch.zeros(48, 48, dtype=torch.uint8)
    for rows, columns, value, number in (
        (slice(20, 26), slice(30, 38), 0.9, 1),
        (slice(28, 44), slice(8, 22), 0.6, 2),
    ):
        image[:, :, rows, columns] = value
        class_map[rows, columns] = number
    return image, {
        "boxes": torch.tensor([[30.0, 20, 38, 26], [8, 28, 22, 44]]),
        "labels": torch.tensor([0, 1]),
        "ignored": torch.zeros(0, 4),
        "class_map": class_map,
    }


def learn_by_heart(
    network: nn.Module, criterion: nn.Module, image: Tensor, target: Any, steps: int
) -> list[float]:
    """Train ``network`` on one image ``[1, slice, row, column]``; return the total loss of every step."""
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    totals = []
    for _ in range(steps):
        losses = criterion(network(image), [target])
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        totals.append(total.item())
    return totals
