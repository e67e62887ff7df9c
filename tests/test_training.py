"""Samples, steps, checkpoints and whole small runs on phantoms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_support import StopAt, case_with, small

from medvision.datasets.discover import LoadedCase, find_cases, load_case
from medvision.detector import DetectorConfig, load_detector_config
from medvision.errors import InputError, Interrupted, MedvisionError, UsageError
from medvision.findings.config import PredictConfig
from medvision.findings.merge import SliceDetections
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.predict import Predictor
from medvision.sample_data.phantoms import make_phantom, write_phantom_dataset
from medvision.stacks.augment import AugmentConfig, Augmenter
from medvision.stacks.config import StackConfig
from medvision.training import hard_negatives
from medvision.training.cache import CachedCase, cache_case, label_array
from medvision.training.checkpoint import read_state
from medvision.training.config import (
    SamplingConfig,
    TrainConfig,
    make_train_config,
    read_settings,
)
from medvision.training.hard_negatives import (
    HardNegative,
    find_hard_negatives,
    load_hard_negatives,
    save_hard_negatives,
)
from medvision.training.large_lesions import share_shown, tell_too_large, too_large
from medvision.training.loop import Clock, SkipGuard, rate_factor, update_average
from medvision.training.prepare import usual_side
from medvision.training.samples import (
    CropSampler,
    find_training_lesions,
    lesion_weights,
)
from medvision.training.targets import make_target
from medvision.training.train import train


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    phantom_data: Path, tmp_path: Path
) -> None:
    straight = train(phantom_data, tmp_path / "straight", small())
    assert straight.steps == 6
    stopper = StopAt(2)
    with pytest.raises(Interrupted) as stopped:
        train(
            phantom_data,
            tmp_path / "resumed",
            small(),
            on_progress=stopper.report,
            should_stop=stopper.stop,
        )
    assert stopped.value.exit_code == 143
    state = read_state(tmp_path / "resumed")
    assert state is not None
    assert state.step == 2
    assert not state.finished
    with pytest.raises(UsageError, match="already holds a run"):
        train(phantom_data, tmp_path / "resumed", small())
    with pytest.raises(UsageError, match="settings"):
        train(phantom_data, tmp_path / "resumed", small(seed=4), resume=True)
    fewer = tmp_path / "fewer"
    shutil.copytree(phantom_data, fewer)
    lost = json.loads((tmp_path / "resumed" / "split.json").read_text())["training"][0]
    for path in [*(fewer / "scans").glob(f"{lost}*"), *(fewer / "labels").glob(f"{lost}*")]:
        path.unlink()
    with pytest.raises(UsageError, match="scans it was started with"):
        train(fewer, tmp_path / "resumed", small(), resume=True)
    # What a process that was killed while writing leaves behind.
    (tmp_path / "resumed" / ".partial-x1.safetensors").write_bytes(b"half")
    (tmp_path / "resumed" / ".partial-7-case").mkdir()  # of a predict into the run's folder
    assert train(phantom_data, tmp_path / "resumed", small(), resume=True).steps == 6
    assert [path.name for path in (tmp_path / "resumed").glob(".partial-*")] == [".partial-7-case"]
    for name in ("last.safetensors", "best.safetensors"):
        first = load_file(tmp_path / "straight" / name)
        second = load_file(tmp_path / "resumed" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_run_folder_alone_predicts_and_holds_no_pickle(
    phantom_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = train(phantom_data, run, small())
    assert summary.training_scans + summary.validation_scans == 6
    assert summary.validation_scans >= 1
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".npy", ".png", ".lock", ""}
    config = load_detector_config(run)
    assert config.class_names == tuple(sorted(config.class_names))
    # Phantoms hold lesions of 3 to 12 mm or so; boxes end at whole pixels.
    assert config.usual_lesion_mm is not None
    assert 2 < config.usual_lesion_mm < 20
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines][-2:] == ["validation", "held out"]
    phantom = make_phantom()
    findings = Predictor(run, "cpu", score_thresh=0.0)(phantom.volume)
    assert findings.shape == phantom.volume.shape
    scores = [finding.score for finding in findings.findings]
    assert scores == sorted(scores, reverse=True)
    assert findings.model["run"] == "run"


def test_the_usual_size_is_what_95_of_100_boxes_do_not_exceed() -> None:
    # By hand: longest sides 1..100 and one of 4000; 95 percent of the way from the first to the last is 96.
    sizes = np.array([(side, 1) if side % 2 else (1, side) for side in range(1, 101)] + [(4000, 1)])
    assert usual_side(sizes.astype(float)) == pytest.approx(96)
    assert usual_side(np.array([[3.0, 5.0]])) == 5


def test_a_unet_looks_once_and_refuses_to_look_more_often() -> None:
    looks = {"name": "unet"}, {"name": "retinanet"}
    scales = [make_train_config({"model": model}, "test").predict.scales for model in looks]
    assert scales == [(1.0,), PredictConfig().scales]
    assert len(scales[1]) == 3
    for given, accepted in (([1.0], True), ([1.0, 0.8], False), ([1.0, 0.8, 1.25], False)):
        values = {"model": {"name": "unet"}, "predict": {"scales": given}}
        if accepted:
            assert make_train_config(values, "test").predict.scales == (1.0,)
        else:
            with pytest.raises(UsageError, match=r"leave it at \[1.0\]"):
                make_train_config(values, "test")


def test_a_damaged_checkpoint_is_refused(phantom_data: Path, tmp_path: Path) -> None:
    stopper = StopAt(1)
    with pytest.raises(Interrupted):
        train(phantom_data, tmp_path, small(), on_progress=stopper.report, should_stop=stopper.stop)
    state = read_state(tmp_path)
    assert state is not None
    path = tmp_path / state.weights_file
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="checksum"):
        train(phantom_data, tmp_path, small(), resume=True)


def test_scans_without_any_lesion_are_refused_with_the_reason(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "data", 2, n_lesions=0)
    with pytest.raises(InputError, match="at least one lesion") as refused:
        train(tmp_path / "data", tmp_path / "run", small())
    assert "healthy" in str(refused.value)


def test_one_bad_scan_and_one_unlabelled_never_stop_the_rest(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, 5)
    scans = sorted((tmp_path / "scans").iterdir())
    scans[0].write_bytes(b"not a scan")
    name = scans[1].name.removesuffix(".nii.gz")
    for suffix in (".nii.gz", ".csv"):
        (tmp_path / "labels" / f"{name}{suffix}").unlink()
    summary = train(tmp_path, tmp_path / "run", small(steps=1))
    assert summary.training_scans + summary.validation_scans == 3
    reasons = dict(summary.left_out)
    assert "unlabelled" in reasons[name]
    assert len(reasons) >= 2


def cached(tmp_path: Path, phantom_data: Path) -> list:
    cases = find_cases(phantom_data).cases
    return [cache_case(load_case(case), tmp_path, 0.8, (-1000, 400)) for case in cases]


def sampler_of(cases: list, **changes: float) -> CropSampler:
    lesions = find_training_lesions(cases, ("ground_glass", "part_solid", "solid"))
    sampling = SamplingConfig(crop_size=48, **changes)
    augmenter = Augmenter(AugmentConfig(affine_p=0, intensity_p=0, noise_p=0), 48)
    return CropSampler(cases, lesions, StackConfig(n_slices=3), sampling, augmenter, 7)


def test_the_share_shown_is_that_of_the_best_window() -> None:
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:5, 0:2] = True  # 8 pixels, and 4 apart from them
    mask[2:4, 7:9] = True
    assert share_shown(mask, 2) == pytest.approx(4 / 12)
    assert share_shown(mask, 4) == pytest.approx(8 / 12)
    assert share_shown(mask, 9) == share_shown(mask, 50) == 1


def case_of_bars(tmp_path: Path, *sides: tuple[int, int]) -> CachedCase:
    """A scan with lesions of so many rows and columns, one on each slice."""
    annotations = []
    for plane, (rows, columns) in enumerate(sides):
        box = Box(plane, 5, 5, plane + 1, 5 + rows, 5 + columns)
        mask = np.ones((1, rows, columns), bool)
        annotations.append(Annotation(plane + 1, "solid", box, mask))
    loaded = case_with(*annotations, shape=(len(sides), 240, 240))
    return cache_case(loaded, tmp_path, loaded.volume.spacing_mm[1], (-1000, 400))


def test_lesions_that_no_crop_shows_half_of_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Of 8 columns of the phantom 7 are left: 190, 200 and 140. Crops show 96 / 190, more than half,
    # 96 / 200, less, and 96 / 140 squared, 0.47.
    cases = [case_of_bars(tmp_path, (20, 217), (20, 229), (140, 160))]
    lesions = find_training_lesions(cases, ("solid",))
    assert too_large(lesions, cases, 96, 0.5) == lesions[1:]
    tell_too_large(lesions[:1], cases, TrainConfig())
    tell_too_large([], cases, TrainConfig())
    assert caplog.text == ""
    tell_too_large(lesions, cases, TrainConfig())
    assert "2 of 3 lesions are too large for crops of 96 pixels" in caplog.text
    assert "Set sampling.crop_size to 112" in caplog.text
    coarse = {"backbone": "resnet18", "stem_pooling": True}
    tell_too_large(lesions, cases, make_train_config({"model": coarse}, "test"))
    assert "Set sampling.crop_size to 128" in caplog.text


def test_samples_depend_on_seed_and_number_only(phantom_data: Path, tmp_path: Path) -> None:
    sampler = sampler_of(cached(tmp_path, phantom_data))
    first = sampler[11]
    for other in (0, 5, 23):
        sampler[other]
    again = sampler[11]
    assert torch.equal(first.image, again.image)
    assert first.case_id == again.case_id
    assert torch.equal(first.target["boxes"], again.target["boxes"])
    assert not torch.equal(first.image, sampler[12].image)


def test_lesion_crops_hold_their_lesion_and_boxes_fit_it(
    phantom_data: Path, tmp_path: Path
) -> None:
    sampler = sampler_of(cached(tmp_path, phantom_data), lesion_share=1.0)
    samples = [sampler[index] for index in range(40)]
    assert np.mean([len(sample.target["boxes"]) > 0 for sample in samples]) > 0.9
    for sample in samples:
        assert sample.image.shape == (3, 48, 48)
        boxes = sample.target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0 if len(boxes) else True
        assert boxes.max() <= 48 if len(boxes) else True


def one_lesion_case(ignore: bool) -> LoadedCase:
    mask = np.ones((2, 6, 8), dtype=bool)
    return case_with(Annotation(3, "solid", Box(10, 20, 16, 12, 26, 24), mask, ignore))


def test_the_slice_beyond_a_lesion_and_ignored_lesions_count_neither_way(tmp_path: Path) -> None:
    case = cache_case(one_lesion_case(False), tmp_path, 0.7, (-1000, 400))
    sampler = sampler_of([case])
    for plane, boxes, ignored in ((9, 0, 1), (10, 1, 0), (11, 1, 0), (12, 0, 1), (13, 0, 0)):
        labels, table = sampler._label_crop(0, plane, 0, 0)
        target = make_target(labels, table, sampler.sampling.least_visible)
        assert (len(target["boxes"]), len(target["ignored"])) == (boxes, ignored)
    hidden = cache_case(one_lesion_case(True), tmp_path, 0.7, (-1000, 400))
    assert find_training_lesions([hidden], ("solid",)) == []
    sampler = sampler_of([hidden])
    labels, table = sampler._label_crop(0, 10, 0, 0)
    assert len(make_target(labels, table, sampler.sampling.least_visible)["ignored"]) == 1


def test_cached_labels_follow_the_pixels(tmp_path: Path) -> None:
    loaded = one_lesion_case(False)
    case = cache_case(loaded, tmp_path, 0.35, (-1000, 400))
    (annotation,) = case.annotations()
    old = loaded.volume.box_to_patient(loaded.annotations[0].box)
    new = case.volume.box_to_patient(annotation.box)
    np.testing.assert_allclose(list(vars(old).values()), list(vars(new).values()), atol=0.5)


def test_a_lesion_known_by_its_box_becomes_an_ellipsoid_and_small_ones_stay_on_top() -> None:
    large = Annotation(1, "solid", Box(0, 0, 0, 6, 20, 20))
    small_one = Annotation(2, "solid", Box(2, 9, 9, 4, 11, 11))
    labels = label_array((6, 20, 20), (small_one, large))
    assert labels[3, 10, 10] == 2
    assert 0.4 < (labels == 1).sum() / (6 * 20 * 20) < 0.56


def test_class_balance_moves_the_draws() -> None:
    class_of: Callable[[int], object] = lambda index: type("L", (), {"class_index": index})()  # noqa: E731
    lesions = [class_of(0)] * 9 + [class_of(1)]
    assert lesion_weights(lesions, 0.0)[9] == pytest.approx(0.1)  # type: ignore[arg-type]
    assert lesion_weights(lesions, 1.0)[9] == pytest.approx(0.5)  # type: ignore[arg-type]
    assert lesion_weights([], 0.5).size == 0


def test_rate_rises_then_falls_to_almost_nothing() -> None:
    rates = [rate_factor(step / 100, 0.1) for step in range(101)]
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.01


def test_the_clock_ends_by_steps_or_by_minutes() -> None:
    now = [0.0]
    clock = Clock(TrainConfig(steps=100, max_minutes=1), 0.0, lambda: now[0])
    now[0] = 30.0
    assert clock.progress(60) == 0.6
    now[0] = 45.0
    # 30 steps in 45 s: the minute ends first, and three quarters of it are gone.
    assert clock.progress(30) == 0.75
    now[0] = 70.0
    assert clock.progress(40) == 1.0
    assert Clock(TrainConfig(steps=100, max_minutes=0), 0.0, lambda: 1e9).progress(50) == 0.5


def test_losses_that_stay_infinite_stop_the_run_and_name_the_cases() -> None:
    guard = SkipGuard()
    guard.note(False, ["a"])
    guard.note(True, ["b"])
    for _ in range(19):
        guard.note(False, ["bad_case"])
    with pytest.raises(MedvisionError, match="finite") as stopped:
        guard.note(False, ["bad_case"])
    assert "bad_case" in str(stopped.value)
    assert guard.skipped == 21


def test_settings_from_a_file_and_wrong_ones(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 7\nsampling: {crop_size: 64}\n")
    config = make_train_config(read_settings(path), str(path))
    assert (config.steps, config.sampling.crop_size) == (7, 64)
    path.write_text("sampling: {crop_sise: 64}\n")
    with pytest.raises(UsageError, match=r"sampling\.crop_sise"):
        make_train_config(read_settings(path), str(path))
    path.write_text("[1, 2")
    with pytest.raises(UsageError, match="readable YAML"):
        make_train_config(read_settings(path), str(path))


def test_hard_negatives_are_drawn_and_belong_to_their_step(
    tmp_path: Path, phantom_data: Path
) -> None:
    sampler = sampler_of(cached(tmp_path, phantom_data), lesion_share=0.0, hard_share=1.0)
    places = [HardNegative(2, 7, 30.0, 22.0, 0.9)]
    sampler.show_again(places)
    assert {sampler[index].case_id for index in range(8)} == {sampler.cases[2].case_id}
    save_hard_negatives(tmp_path, 10, places)
    assert load_hard_negatives(tmp_path, 9) is None
    assert load_hard_negatives(tmp_path, 10) == places
    (tmp_path / "hard_negatives.json").write_text("[]")
    with pytest.raises(InputError, match="hard_negatives"):
        load_hard_negatives(tmp_path, 10)


def test_false_positives_of_high_score_are_shown_far_more_often(
    tmp_path: Path, phantom_data: Path
) -> None:
    sampler = sampler_of(cached(tmp_path, phantom_data), lesion_share=0.0, hard_share=1.0)
    # 16 of 0.25 weigh what one of 0.5 does: 16 / 4^4 against 1 / 2^4.
    often = [HardNegative(1, 7, 30.0, 22.0, 0.25)] * 16
    sampler.show_again([*often, HardNegative(2, 7, 30.0, 22.0, 0.5)])
    drawn = [sampler[index].case_id for index in range(200)]
    assert 70 <= drawn.count(sampler.cases[2].case_id) <= 130  # 4 sigma of 200 even draws
    sampler.show_again([])
    assert len({sampler[index].case_id for index in range(20)}) > 1


def test_a_finding_on_or_next_to_a_lesion_is_no_hard_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cache_case(one_lesion_case(False), tmp_path, 0.7, (-1000, 400))
    (lesion,) = case.annotations()
    z, top, left = (int(edge) for edge in lesion.box.lower)
    shifts = [
        (0, 0),
        (0, -1),
        (0, 2),
        (3, 0),
        (0, 3),
        (20, 0),
    ]  # rows and slices from the lesion's own
    boxes = [(left, top + down, left + 8, top + down + 6) for down, _ in shifts]
    scores = np.linspace(0.2, 0.7, len(shifts))
    shown = SliceDetections(
        np.array([z + up for _, up in shifts]), np.array(boxes, float), scores, np.ones((6, 1))
    )
    asked = {}

    def detect(*_: object, every: int) -> SliceDetections:
        asked["every"] = every
        return shown

    monkeypatch.setattr(hard_negatives, "detect_slices", detect)
    config = DetectorConfig(
        class_names=("solid",), stack=StackConfig(), model=small().model, predict=PredictConfig()
    )
    found = find_hard_negatives(None, config, [case], None, lambda _: None)  # type: ignore[arg-type]
    assert [(item.plane, item.row, item.column, item.score) for item in found] == [
        (z, top + 23, left + 4, pytest.approx(0.7)),
        (z + 3, top + 3, left + 4, pytest.approx(0.6)),
    ]
    assert 2.5 < asked["every"] * case.volume.spacing_mm[0] <= 5.0


def test_the_average_looks_back_over_a_share_of_the_steps() -> None:
    network, average = nn.Linear(1, 1), nn.Linear(1, 1)
    seen = []
    for number in range(200):
        with torch.no_grad():
            network.weight.fill_(float(number))
        update_average(average, network, 0.25, number)
        seen.append(average.weight.item())
    assert seen[0] == 0.0
    # Weights that grow as (t / T)^(1/share - 1) have the mean age share / (1 + share) of the steps.
    assert 199 - seen[-1] == pytest.approx(200 * 0.25 / 1.25, rel=0.05)
    assert 99 - seen[99] == pytest.approx(100 * 0.25 / 1.25, rel=0.1)


def test_without_a_share_the_average_is_the_network() -> None:
    network, average = nn.Linear(2, 2), nn.Linear(2, 2)
    update_average(average, network, 0.0, 7)
    assert torch.equal(average.weight, network.weight)
