"""Train and test every model on the sample: python benchmarks/model_family.py data/ -o runs/family.

Each model is trained on data/train with the defaults, as ``make demo`` does, and tested on data/test, one after
the other: 20 minutes each on two cores. What is finished is kept, so the command may be stopped and given
again. Writes docs/models.md (or --table): sensitivity at 1 false positive per volume with its 95 percent
interval, CPM, seconds a volume and peak memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evaluate_sample import as_text, summarise

from medvision._version import __version__
from medvision.doctor import read_cpuinfo
from medvision.evaluation.evaluate import evaluate
from medvision.files import atomic_write_text
from medvision.models.family_config import MODEL_CONFIGS
from medvision.report.load import load_cases

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
RESULT = "result.json"
KIB_PER_GIB = 2**20
HEADING = """# The models on the sample

Each trained on `data/train` and tested on `data/test` with the settings that `make demo` had on the day of
the row: so many steps as fitted into its time. Sensitivity is at 1 false positive per volume, with its 95
percent interval by bootstrap over the volumes. Seconds a volume are those of the whole command `medvision
predict`: each slice with its three mirror images and, but for the U-Net, in two more pixel sizes. Made by

```
python benchmarks/model_family.py data/ -o runs/family
```
"""


def main(arguments: list[str] | None = None) -> int:
    """Run what is not finished yet, write the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="what medvision sample wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--models", nargs="*", default=list(MODEL_CONFIGS), choices=MODEL_CONFIGS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--table", type=Path, default=TABLE, help="Markdown file to write")
    options = parser.parse_args(arguments)
    for name in options.models:
        folder = options.output / name
        if not (folder / RESULT).is_file():
            result = run_model(name, options.data, folder, options.settings)
            atomic_write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    results = [read_result(options.output / name) for name in MODEL_CONFIGS]
    atomic_write_text(options.table, as_table([found for found in results if found is not None]))
    print(options.table.read_text(encoding="utf-8"))
    return 0


def run_model(name: str, data: Path, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Train, predict and evaluate one model; return its row of the table."""
    run, out = folder / "run", folder / "findings"
    train = ["train", str(data / "train"), "-o", str(run), "--model", name]
    train += [part for pair in settings for part in ("--set", pair)]
    train += ["--resume"] if (run / "state.json").is_file() else []
    trained = measured(train)
    predicted = measured(["predict", str(run), str(data / "test"), "-o", str(out), "--overwrite"])
    loaded = load_cases(out, data / "test")
    result = evaluate(loaded.cases, class_names=loaded.class_names, draws=1000, seed=0)
    return {
        "model": name,
        "settings": settings,
        "figures": summarise(result, loaded),
        "training": trained,
        "prediction": predicted,
        "volumes": result.scans,
        "machine": f"{os.cpu_count()} cores, {read_cpuinfo()[0]}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "medvision_version": __version__,
    }


def measured(words: list[str]) -> dict[str, float]:
    """Run a medvision command; return its seconds and peak memory in GiB. Its output goes to ours."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "medvision", *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"medvision {' '.join(words)} ended with {process.returncode}")
    return {"seconds": time.monotonic() - started, "peak_gib": usage.ru_maxrss / KIB_PER_GIB}


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run wrote, and its steps; None if there is none."""
    path = folder / RESULT
    if not path.is_file():
        return None
    state = json.loads((folder / "run" / "state.json").read_text(encoding="utf-8"))
    return {**json.loads(path.read_text(encoding="utf-8")), "steps": state["step"]}


def as_table(results: list[dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    lines = [
        HEADING,
        "| model | found | sensitivity at 1 FP | CPM | AP at IoU 0.1 | steps | training, minutes "
        "| s a volume | peak memory, training | prediction |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(result) for result in results),
        "",
    ]
    lines += [
        f"- {item['model']}: {item['date']}, medvision {item['medvision_version']}, {item['machine']}"
        + (f", with {', '.join(item['settings'])}" if item["settings"] else "")
        for item in results
    ]
    missing = [name for name in MODEL_CONFIGS if name not in {item["model"] for item in results}]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(result: dict[str, Any]) -> str:
    overall = result["figures"]["rows"][0]
    training, prediction = result["training"], result["prediction"]
    cells = [
        result["model"],
        f"{overall['detected']} of {overall['lesions']}",
        as_text(overall["sensitivity_at_1_fp"], 2),
        as_text(overall["cpm"], 2),
        as_text(overall["ap_0.1"], 2),
        f"{result['steps']}",
        f"{training['seconds'] / 60:.1f}",
        f"{prediction['seconds'] / result['volumes']:.1f}",
        f"{training['peak_gib']:.1f} GiB",
        f"{prediction['peak_gib']:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
