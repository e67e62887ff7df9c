"""Print the figures by which medvision is compared: python benchmarks/evaluate_sample.py OUT TRUTH.

OUT is what ``medvision predict`` wrote, TRUTH the data set or its labels. Sensitivity at 1 false
positive per scan (of all classes together), CPM, AP at 3-D IoU 0.1, and the share of found lesions
that are given the right class, each with its 95 % interval from 1000 resamples of the scans.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from medvision.errors import MedvisionError
from medvision.evaluation.evaluate import evaluate
from medvision.evaluation.results import ClassResult, Estimate, Evaluation
from medvision.report.load import LoadedCases, load_cases


def main(arguments: list[str] | None = None) -> int:
    """Read the two folders, print the table or JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder with a findings.json per scan")
    parser.add_argument("truth", type=Path, help="data set with labels/, or a folder of labels")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    options = parser.parse_args(arguments)
    try:
        loaded = load_cases(options.out, options.truth)
        result = evaluate(
            loaded.cases,
            class_names=loaded.class_names,
            draws=options.draws,
            seed=options.seed,
        )
    except MedvisionError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    figures = summarise(result, loaded)
    print(json.dumps(figures, indent=2, allow_nan=False) if options.json else as_table(figures))
    return 0


def summarise(result: Evaluation, loaded: LoadedCases) -> dict[str, Any]:
    """Return the figures of comparison as plain values."""
    naming = result.confusion
    return {
        "scans": result.scans,
        "healthy_scans": result.healthy_scans,
        "lesions": result.lesions,
        "without_reference": len(loaded.without_truth),
        "without_findings": len(loaded.without_findings),
        "problems": list(loaded.problems),
        "threshold_at_1_fp": result.operating.threshold,
        "fp_per_healthy_scan": result.operating.fp_per_healthy_scan,
        "fp_per_diseased_scan": result.operating.fp_per_diseased_scan,
        "rows": [_row(item) for item in (result.overall, *result.classes)],
        "class_accuracy": _triple(naming.accuracy),
        "majority_accuracy": naming.majority_accuracy,
        "majority_class": naming.majority_class,
    }


def as_table(figures: dict[str, Any]) -> str:
    """Write the figures as a plain table."""
    rows = [["", "found at 1 FP", "sensitivity at 1 FP", "CPM", "AP@0.1"]]
    for row in figures["rows"]:
        found = f"{row['detected']}/{row['lesions']}"
        values = (row["sensitivity_at_1_fp"], row["cpm"], row["ap_0.1"])
        rows.append([row["name"], found, *(as_text(value) for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    majority = figures["majority_accuracy"]
    baseline = "n/a" if majority is None else f"{majority:.3f}"
    lines += [
        "",
        f"class accuracy of hits  {as_text(figures['class_accuracy'])}, always-majority {baseline}",
        f"scans {figures['scans']}, healthy {figures['healthy_scans']}, "
        f"without reference {figures['without_reference']}, "
        f"without findings {figures['without_findings']}",
        *(f"problem: {text}" for text in figures["problems"]),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(item: ClassResult) -> dict[str, Any]:
    return {
        "name": item.name,
        "lesions": item.lesions,
        "detected": item.detected,
        "sensitivity_at_1_fp": _triple(item.sensitivity),
        "cpm": _triple(item.any_class.cpm),
        "cpm_class_wise": _triple(item.class_wise.cpm),
        "ap_0.1": _triple(item.ap["0.1"]),
        "ap_0.5": _triple(item.ap["0.5"]),
    }


def _triple(item: Estimate) -> list[float | None]:
    return [item.value, item.low, item.high]


def as_text(triple: list[float | None], digits: int = 3) -> str:
    """Write a value with its interval, "n/a" without a value."""
    value, low, high = triple
    if value is None:
        return "n/a"
    text = f"{value:.{digits}f}"
    return text if low is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    raise SystemExit(main())
