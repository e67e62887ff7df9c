"""From a bright spot in a scan to a finding at the same place in the patient, whatever the geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects
from scipy.ndimage import label as components
from torch import Tensor, nn

import medvision
from medvision.detector import (
    DetectorConfig,
    load_detector,
    load_detector_config,
    save_detector_config,
    save_weights,
)
from medvision.device import choose_device, cpu_has_bfloat16
from medvision.errors import InputError, UsageError
from medvision.findings.config import PredictConfig
from medvision.geometry import Box, make_affine
from medvision.models.config import RetinaNetConfig
from medvision.models.retinanet import RawDetections, build_retinanet
from medvision.predict import Predictor, find_lesions
from medvision.progress import Progress
from medvision.scans.volume import ScanSource, Volume
from medvision.stacks.config import StackConfig

SIZES = (((4.0, 4.0),), ((9.0, 9.0),), ((20.0, 18.0),))
MODEL = RetinaNetConfig(width=8, pyramid_channels=8, anchors_per_level=1, anchor_sizes=SIZES)
OBLIQUE = make_affine(
    [10.0, -20.0, 30.0], [0.0, 0.6, 0.8], [0.0, 0.8, -0.6], [-1.0, 0.0, 0.0], [3.0, 0.5, 0.8]
)
FLIPPED = make_affine([50.0, 60.0, 70.0], [0, 0, -1], [0, -1, 0], [-1, 0, 0], [2.5, 0.7, 0.7])
PLAIN = make_affine([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1.25, 0.7, 0.7])


def config(**predict: Any) -> DetectorConfig:
    # The stand-in for a network has no grid of anchors to mirror.
    predict = {"flips": False, **predict}
    return DetectorConfig(
        class_names=("dark", "bright"),
        modality="CT",
        stack=StackConfig(n_slices=3, pixel_mm=0.7),
        model=MODEL,
        predict=PredictConfig(**predict),
    )


class BrightSpots(nn.Module):
    """Stands in for a network: boxes what is above 0.9 of the window on the middle slice."""

    strides = (4, 8, 16)

    def forward(self, images: Tensor) -> RawDetections:
        assert images.shape[-1] % 16 == 0
        assert images.shape[-2] % 16 == 0
        boxes = torch.zeros(len(images), 5, 4)
        boxes[:, :, 2:] = 1
        logits = torch.full((len(images), 5), -20.0)
        for number, image in enumerate(images):
            spots = find_objects(components(image[image.shape[0] // 2].numpy() > 0.9)[0])
            for rank, (rows, columns) in enumerate(spots[:5]):
                corners = (columns.start, rows.start, columns.stop, rows.stop)
                boxes[number, rank] = torch.tensor(corners)
                logits[number, rank] = 2.0
        return RawDetections(logits, torch.zeros(len(images), 5, 2), boxes, [])


@pytest.mark.parametrize("affine", [OBLIQUE, FLIPPED, PLAIN], ids=["oblique", "flipped", "plain"])
@pytest.mark.parametrize("shape", [(9, 90, 64), (1, 70, 120)], ids=["many", "single"])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.8, 1.25)], ids=["one look", "three looks"])
def test_a_bright_spot_is_found_where_it_is(
    affine: np.ndarray, shape: tuple[int, int, int], scales: tuple[float, ...]
) -> None:
    array = np.full(shape, -1000, dtype=np.int16)
    array[:, 15:60, 8:56] = -100
    spot = Box(0, 30, 20, 1, 42, 32) if shape[0] == 1 else Box(3, 30, 20, 6, 42, 32)
    array[spot.slices] = 400
    volume = Volume(array, affine, ScanSource(modality="CT"))
    settings = config(scales=scales)
    findings = find_lesions(volume, BrightSpots(), settings, choose_device("cpu", "float32"))
    assert len(findings) == 1
    finding = findings[0]
    # Resampling by up to 1.4 and a threshold at 0.9 move an edge by a pixel at most.
    np.testing.assert_allclose(finding.box.lower, spot.lower, atol=1.2)
    np.testing.assert_allclose(finding.box.upper, spot.upper, atol=1.2)
    assert (finding.box.slice_min, finding.box.slice_max) == (spot.slice_min, spot.slice_max)
    np.testing.assert_allclose(
        finding.center_mm, volume.index_to_patient(spot.center_index), atol=0.5
    )


class SmallSpots(BrightSpots):
    """Sees no spot of more than 20 pixels, as a network that never saw one may not."""

    def forward(self, images: Tensor) -> RawDetections:
        raw = super().forward(images)
        sides = (raw.boxes[..., 2:] - raw.boxes[..., :2]).amax(dim=-1)
        unseen = raw.lesion_logits.masked_fill(sides > 20, -20.0)
        return raw._replace(lesion_logits=unseen)


@pytest.mark.parametrize(
    # Shares of the looks that see the spot: of those that vote, and of all three.
    ("rows", "columns", "voting", "all_three"),
    [(10, 10, 1, 1), (18, 10, 1, 2 / 3), (10, 18, 1, 2 / 3), (24, 10, 1 / 2, 1 / 3)],
    ids=["small", "high", "wide", "seen by the coarse look alone"],
)
def test_a_look_that_magnifies_has_no_say_on_the_largest(
    rows: int, columns: int, voting: float, all_three: float
) -> None:
    # Pixels are half as wide as high, so that the spot of 18 columns is 18 of the network's as well.
    affine = np.diag([2.5, 0.7, 0.35, 1.0])
    array = np.full((3, 90, 140), -1000, dtype=np.int16)
    array[:, 10:80, 10:120] = -100
    array[:, 30 : 30 + rows, 40 : 40 + 2 * columns] = 400
    volume = Volume(array, affine, ScanSource(modality="CT"))
    device = choose_device("cpu", "float32")
    found = {}
    for usual in (None, 14.0):
        settings = config(scales=(1.0, 0.8, 1.25), candidate_thresh=0.01).model_copy(
            update={"usual_lesion_mm": usual}
        )
        findings = find_lesions(volume, SmallSpots(), settings, device)
        found[usual] = max((one.score for one in findings), default=0.0)
    sure = float(torch.tensor(2.0).sigmoid())
    # 18 pixels are 22 in the look that magnifies, too many for it; 24 are 19 in the coarse one.
    assert found[14.0] == pytest.approx(voting * sure, abs=1e-3)
    assert found[None] == pytest.approx(all_three * sure, abs=1e-3)


def test_slices_are_counted_over_all_looks() -> None:
    volume = Volume(np.full((4, 40, 40), -1000, dtype=np.int16), PLAIN, ScanSource(modality="CT"))
    device = choose_device("cpu", "float32")
    for scales, unit, expected in (
        ((1.0, 0.8), "looks at slices", [(3, 8), (4, 8), (7, 8), (8, 8)]),
        ((1.0,), "slices", [(3, 4), (4, 4)]),
    ):
        seen: list[Progress] = []
        settings = config(scales=scales, batch_size=3)
        find_lesions(volume, BrightSpots(), settings, device, seen.append)
        assert [(item.done, item.total) for item in seen] == expected
        assert {item.unit for item in seen} == {unit}


def test_a_scan_without_anything_has_no_findings() -> None:
    volume = Volume(np.full((4, 40, 40), -1000, dtype=np.int16), PLAIN, ScanSource(modality="CT"))
    assert find_lesions(volume, BrightSpots(), config(), choose_device("cpu", "float32")) == ()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_detector_config(tmp_path, config(score_thresh=0.0, box_score_thresh=0.0))
    save_weights(tmp_path / "best.safetensors", build_retinanet(MODEL, 3, 2).state_dict(), {})
    return tmp_path


def test_batch_size_changes_nothing(run: Path) -> None:
    generator = np.random.default_rng(0)
    array = generator.normal(-500, 200, (5, 48, 40)).astype(np.int16)
    volume = Volume(array, OBLIQUE, ScanSource(modality="CT"))
    network, settings, _ = load_detector(run)
    found = []
    for size in (1, 2, 5):
        update = settings.predict.model_copy(update={"batch_size": size})
        changed = settings.model_copy(update={"predict": update})
        found.append(find_lesions(volume, network, changed, choose_device("cpu", "float32")))
    assert len(found[0]) > 0
    for other in found[1:]:
        np.testing.assert_allclose(
            [one.score for one in other], [one.score for one in found[0]], atol=1e-5
        )


def test_what_scores_less_is_a_candidate_and_nothing_is_lost(run: Path) -> None:
    array = np.random.default_rng(0).normal(-500, 200, (5, 48, 40)).astype(np.int16)
    volume = Volume(array, OBLIQUE, ScanSource(modality="CT"))
    everything = Predictor(run, "cpu")(volume)
    assert everything.candidates == ()
    scores = [item.score for item in everything.findings]
    thresh = scores[len(scores) // 2]
    split = Predictor(run, "cpu", score_thresh=thresh)(volume)
    assert split.score_thresh == thresh
    # The finding that sets the threshold is one itself: nothing is rounded away.
    assert [item.score for item in split.findings] == [s for s in scores if s >= thresh]
    lowest = min(0.05, thresh)
    assert [item.score for item in split.candidates] == [s for s in scores if lowest <= s < thresh]
    numbers = [item.finding_id for item in (*split.findings, *split.candidates)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_another_modality_is_refused(run: Path) -> None:
    volume = Volume(np.zeros((2, 20, 20), dtype=np.int16), PLAIN, ScanSource(modality="MR"))
    with pytest.raises(InputError, match="must be CT"):
        Predictor(run, "cpu")(volume)


def test_broken_run_folders_are_refused_with_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"detector\.json"):
        load_detector_config(tmp_path / "nowhere")
    path = run / "best.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="safetensors"):
        load_detector(run)
    path.write_bytes(whole)
    text = (run / "detector.json").read_text()
    (run / "detector.json").write_text(text.replace('"width": 8', '"width": 16'))
    with pytest.raises(InputError, match="do not fit"):
        load_detector(run)
    (run / "detector.json").write_text("{}")
    with pytest.raises(InputError, match="not one that medvision wrote"):
        load_detector(run)
    (run / "detector.json").write_text(text)
    path.unlink()
    with pytest.raises(UsageError, match="neither"):
        load_detector(run)


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="not there"):
            choose_device("cuda:0")
        wanted = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        assert choose_device("auto").compute_dtype == wanted
    with pytest.raises(UsageError, match="Precision"):
        choose_device("cpu", "float16")


def test_the_public_names_are_there_and_no_others() -> None:
    for name in medvision.__all__:
        assert getattr(medvision, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = medvision.no_such_name
