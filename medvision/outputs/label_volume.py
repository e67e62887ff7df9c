"""Findings as a label volume in the scan's grid, for viewers that overlay one on the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision.findings.finding import Finding, ScanFindings
from medvision.findings.measure import ellipse_in_box, ellipsoid_in_box
from medvision.scans.images import write_image
from medvision.scans.volume import Volume


def write_finding_labels(path: Path, scan_findings: ScanFindings) -> None:
    """Write a volume (NIfTI by its suffix) whose value is 0 or the ``finding_id`` of the voxel."""
    write_image(path, Volume(paint_findings(scan_findings), scan_findings.affine))


def paint_findings(scan_findings: ScanFindings) -> NDArray[np.unsignedinteger]:
    """Return ``[slice, row, column]`` of the scan with the value ``finding_id`` on each finding.

    A finding is its mask; without one it is an ellipse in each of its slice boxes, or, without
    those, the ellipsoid in its box. Where findings overlap, the higher score keeps the voxel.
    """
    findings = scan_findings.findings
    kind = np.uint8 if max((item.finding_id for item in findings), default=0) < 256 else np.uint16
    labels = np.zeros(scan_findings.shape, dtype=kind)
    for item in sorted(findings, key=lambda item: (item.score, -item.finding_id)):
        _paint(labels, item)
    return labels


def _paint(labels: NDArray, finding: Finding) -> None:
    window = labels[finding.box.slices]
    if finding.mask is not None:
        size = tuple(slice(0, length) for length in window.shape)
        window[finding.mask[size]] = finding.finding_id
    elif finding.slice_boxes:
        for box in finding.slice_boxes:
            plane = labels[box.slice_index]
            edges = (box.row_min, box.column_min, box.row_max, box.column_max)
            _paint_ellipse(plane, edges, finding.finding_id)
    elif window.size:
        inside = ellipsoid_in_box(finding.box.clip(labels.shape), window.shape)
        window[inside] = finding.finding_id


def _paint_ellipse(
    plane: NDArray, edges: tuple[float, float, float, float], finding_id: int
) -> None:
    """Paint only the touched pixels: a scan has many boxes and each is small."""
    low = np.clip(np.floor(edges[:2]), 0, None).astype(int)
    high = np.clip(np.ceil(edges[2:]), 0, plane.shape).astype(int)
    window = plane[low[0] : high[0], low[1] : high[1]]
    if window.size:
        shifted = np.array(edges) - np.tile(low, 2)
        window[ellipse_in_box(window.shape, *shifted.tolist())] = finding_id
