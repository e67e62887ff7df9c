"""Training when something is odd: stops in the middle, bad batches, crowded slices, settings that clash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medvision.datasets.discover import Case, LoadedCase
from medvision.detector import load_detector_config
from medvision.device import choose_device
from medvision.errors import Interrupted, UsageError
from medvision.findings.finding import Finding
from medvision.geometry import Box, BoxMm
from medvision.labels.annotation import Annotation
from medvision.models.config import RetinaNetConfig
from medvision.progress import Progress
from medvision.sample_data.phantoms import make_phantom, write_phantom_dataset
from medvision.scans.load import ScanReference
from medvision.scans.volume import Volume
from medvision.stacks.augment import AugmentConfig, Augmenter
from medvision.stacks.config import StackConfig
from medvision.training import validate as validation
from medvision.training.cache import cache_case
from medvision.training.config import SamplingConfig, TrainConfig, make_train_config
from medvision.training.loop import Clock
from medvision.training.prepare import fit_detector, prepare_data
from medvision.training.samples import CropSampler, find_training_lesions
from medvision.training.train import make_trainer, train


def small(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": 6,
        "batch_size": 2,
        "validations": 2,
        "max_minutes": 0,
        "precision": "float32",
        "validation_fraction": 0.3,
        "stack": {"n_slices": 3},
        "sampling": {"crop_size": 32},
        "model": {"width": 8, "pyramid_channels": 8, "head_depth": 1},
    }
    return make_train_config({**values, **changes}, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantom_dataset(folder, 6)
    return folder


def records(run: Path) -> list[tuple[int, str]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["kind"]) for line in lines]


@pytest.mark.parametrize("stage", ["validate", "find hard negatives"])
def test_a_run_stopped_while_it_looks_at_scans_ends_with_the_same_bits(
    data: Path, tmp_path: Path, stage: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(data, straight, small())
    seen: list[str] = []

    def note(progress: Progress) -> None:
        seen.append(progress.stage)

    with pytest.raises(Interrupted) as raised:
        train(
            data,
            stopped,
            small(),
            on_progress=note,
            should_stop=lambda: 2 if stage in seen else None,
        )
    assert raised.value.exit_code == 130
    train(data, stopped, small(), resume=True)
    for name in ("last.safetensors", "best.safetensors"):
        first, second = load_file(straight / name), load_file(stopped / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert records(stopped) == records(straight)


def test_a_killed_run_leaves_no_record_twice(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reached: list[int] = []
    with pytest.raises(Interrupted):
        train(
            data,
            run,
            small(),
            on_progress=lambda progress: reached.append(progress.done),
            should_stop=lambda: 2 if len(reached) > 12 else None,
        )
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "kind": "validation"}\n{"step": 6, "ki')
    train(data, run, small(), resume=True)
    found = records(run)
    assert len(found) == len(set(found))
    assert [step for step, _ in found] == sorted(step for step, _ in found)


def test_a_batch_that_is_not_finite_leaves_no_trace(data: Path, tmp_path: Path) -> None:
    config = small()
    cases, pixel_mm = prepare_data(data, tmp_path, config, lambda progress: None)
    trainer = make_trainer(
        config, fit_detector(cases, config, pixel_mm), cases, choose_device("cpu", "float32")
    )
    trainer.network.train()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    target = {
        "boxes": torch.empty(0, 4),
        "labels": torch.empty(0, dtype=torch.long),
        "ignored": torch.empty(0, 4),
    }
    images = torch.full((2, 3, 32, 32), torch.nan)
    assert trainer.step(images, [target, target], 0.5) is None  # type: ignore[list-item]
    after = trainer.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Minutes:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_limit_leaves_room_for_the_last_validation() -> None:
    turned = Minutes()
    clock = Clock(TrainConfig(steps=1000, max_minutes=10), 0.0, turned)
    clock.reserved = 60.0
    turned.now = 540.0
    assert clock.progress(100) == 1.0
    clock.reserved = 0.0
    assert clock.progress(100) == pytest.approx(0.9)


def case_of(boxes: list[Box], shape: tuple[int, int, int], folder: Path) -> CropSampler:
    volume = make_phantom(n_lesions=0, shape=shape).volume
    annotations = tuple(
        Annotation(number, "solid", box, np.ones(np.array(box.upper - box.lower, dtype=int), bool))
        for number, box in enumerate(boxes, start=1)
    )
    fields = dict.fromkeys(ScanReference.__dataclass_fields__, "")
    fields.update(case_id="one", path=Path("one.nii.gz"), n_files=1, kind="image")  # type: ignore[arg-type]
    case = Case("one", ScanReference(**fields), Path(), "p")  # type: ignore[arg-type]
    loaded = LoadedCase(case, volume, annotations)
    cached = cache_case(loaded, folder, volume.spacing_mm[1], (-1000, 400))
    return CropSampler(
        [cached],
        find_training_lesions([cached], ("solid",)),
        StackConfig(n_slices=3),
        SamplingConfig(crop_size=96, paste_share=0),
        Augmenter(
            AugmentConfig(dihedral=False, affine_p=1, scale=(0.5, 0.5), rotate_degrees=0), 96
        ),
        0,
    )


def test_a_lesion_made_smaller_by_the_zoom_still_counts(tmp_path: Path) -> None:
    sampler = case_of([Box(4, 60, 60, 8, 72, 72)], (12, 128, 128), tmp_path)
    labels, table = sampler._label_crop(0, 5, 6, 6)
    moved = sampler.augmenter(np.zeros((3, 120, 120), np.float32), labels, 1)[1]
    assert (moved > 0).sum() == pytest.approx(36, abs=14)
    target = sampler._target(moved, table)
    assert len(target["boxes"]) == 1
    assert len(target["ignored"]) == 0


def test_a_lesion_that_the_crop_cuts_is_ignored(tmp_path: Path) -> None:
    sampler = case_of([Box(4, 0, 0, 8, 40, 40)], (12, 128, 128), tmp_path)
    labels, table = sampler._label_crop(0, 5, 30, 30)
    target = sampler._target(labels, table)
    assert len(target["boxes"]) == 0
    assert len(target["ignored"]) == 1


def test_no_lesion_of_a_crowded_slice_is_taught_as_background(tmp_path: Path) -> None:
    boxes = [
        Box(4, 4 * row, 4 * column, 8, 4 * row + 2, 4 * column + 2)
        for row in range(20)
        for column in range(20)
    ]
    sampler = case_of(boxes, (12, 128, 128), tmp_path)
    labels, table = sampler._label_crop(0, 5, 0, 0)
    assert ((labels > 0)[:90, :90] == (np.asarray(sampler.cases[0].labels[5]) > 0)[:90, :90]).all()
    assert len(table) <= 254
    assert table[-1].class_index is None
    assert sum(entry.class_index == 0 for entry in table) == 253


def test_held_out_false_positives_set_the_lowest_score_of_a_finding(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Finding(
        1, "solid", 0.4, Box(0, 0, 0, 1, 4, 4), BoxMm(0, 0, 0, 1, 1, 1), (0, 0, 0), 0, 1, 1
    )

    def one_false_each(volume: Volume, *_: object) -> tuple[Finding, ...]:
        score = 0.4 + 0.001 * (hash(volume.array.tobytes()) % 100)
        shown.append(score)
        return (replace(found, score=score),)

    shown: list[float] = []
    monkeypatch.setattr(validation, "find_lesions", one_false_each)
    predict = {"operating_fp_per_scan": 0.5}
    train(data, tmp_path, small(steps=1, validations=1, predict=predict))
    held_out = sorted(shown)
    assert len(held_out) >= 2
    thresh = load_detector_config(tmp_path).predict.score_thresh
    assert sum(score >= thresh for score in held_out) == len(held_out) // 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"inner_windows": [[0.5, 0.5]]}}, "low < high"),
        ({"model": {"anchor_sizes": [[[4, 4], [8, 8]]]}}, "3 pyramid levels"),
        ({"model": {"anchor_sizes": [[[4, 4], [8, 0]]] * 3}}, "above 0"),
        ({"sampling": {"crop_size": 48}, "model": {"stem_pooling": True}}, "multiple of 32"),
        ({"stack": {"n_slices": 4}}, "got 4"),
    ],
)
def test_settings_that_clash_are_refused_before_any_work(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        make_train_config(settings, "cli")
    assert len(str(refused.value)) < 400


def test_strides_follow_the_stem() -> None:
    assert RetinaNetConfig().strides == [4, 8, 16]
    assert RetinaNetConfig(stem_pooling=True).strides == [4, 8, 16, 32]
