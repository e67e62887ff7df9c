"""Write the evaluation as one HTML page that needs nothing else, and as JSON with every number."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from medvision.evaluation.case import CaseResult
from medvision.evaluation.evaluate import FEW_LESIONS
from medvision.evaluation.froc import FROC_RATES
from medvision.evaluation.results import ClassResult, Estimate, Evaluation
from medvision.files import atomic_write_text
from medvision.report import words
from medvision.report.figures import froc_figure
from medvision.report.gallery import make_gallery
from medvision.report.load import ImageReader

REPORT_SCHEMA_VERSION = "1"


def write_report(
    evaluation: Evaluation,
    cases: Sequence[CaseResult],
    path: Path | str,
    *,
    images: ImageReader | None = None,
    title: str = "Lesion detection report",
    model: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    without_truth: Sequence[str] = (),
    without_findings: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Write ``path`` (HTML) and the same name with ``.json``; return both.

    ``cases`` are those that were evaluated; ``images`` gives the scan of a case_id for the gallery,
    or None. ``without_truth``, ``without_findings`` and ``problems`` are listed as not evaluated.
    The page has no script and asks the network for nothing; the same input gives the same bytes.
    """
    page = Path(path)
    data = page.with_suffix(".json")
    left_out = {
        "without_reference": list(without_truth),
        "without_findings": list(without_findings),
        "problems": list(problems),
    }
    document = {
        "schema_version": REPORT_SCHEMA_VERSION,
        "title": title,
        "headline": words.headline(evaluation),
        "research_use_only": True,
        "model": dict(model or {}),
        "notes": list(notes),
        "not_evaluated": left_out,
        "evaluation": evaluation.to_dict(),
    }
    context = {
        **_context(evaluation, cases, images),
        "title": title,
        "model": dict(model or {}),
        "notes": list(notes),
        "left_out": left_out,
        "data_name": data.name,
    }
    html = _render(context)
    atomic_write_text(data, json.dumps(document, indent=2, allow_nan=False) + "\n")
    atomic_write_text(page, html)
    return page, data


def _render(context: Mapping[str, Any]) -> str:
    import jinja2

    folder = files("medvision.report")
    style = (folder / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        number=words.number,
        score=words.score_text,
        rate=words.rate_text,
        limit=words.limit_text,
        interval=words.interval_text,
        counted=words.counted,
        size=words.size_text,
        closest=words.closest_text,
    )
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # The style sheet is medvision's own file, and the policy lets nothing but these bytes apply.
    return template.render(context, style=_own_html(style), style_digest=digest)


def _own_html(text: str) -> Any:
    import markupsafe

    return markupsafe.Markup(text)  # noqa: S704


def _context(
    evaluation: Evaluation, cases: Sequence[CaseResult], images: ImageReader | None
) -> dict[str, Any]:
    figure = froc_figure(evaluation) if evaluation.scans > 1 else None
    rows = [evaluation.overall]
    if len(evaluation.classes) > 1:
        rows += evaluation.classes
    return {
        "e": evaluation,
        "headline": words.headline(evaluation),
        "lead": words.lead(evaluation),
        "rows": rows,
        "few": FEW_LESIONS,
        "rates": FROC_RATES,
        "single": evaluation.scans == 1,
        "figure": base64.b64encode(figure).decode() if figure else "",
        "figure_alt": _figure_alt(evaluation.overall),
        "gallery": make_gallery(evaluation, cases, images),
        "iou": [f"{value:g}" for value in evaluation.settings.iou_thresholds],
        "row_name": lambda row: _row_name(row, evaluation),
    }


def _row_name(row: ClassResult, evaluation: Evaluation) -> str:
    if row.name != "all" or row is not evaluation.overall:
        return row.name
    names = evaluation.class_names
    return f"All lesions ({names[0]})" if len(names) == 1 else "All lesions"


def _figure_alt(overall: ClassResult) -> str:
    def read(rate: float, estimate: Estimate) -> str:
        return f"{words.number(estimate.value)} at {words.rate_text(rate)}"

    froc = overall.any_class
    pairs = zip(froc.rates, froc.sensitivity, strict=True)
    listed = ", ".join(read(rate, estimate) for rate, estimate in pairs)
    return f"FROC curve. Sensitivity of all lesions {listed} false positives per scan."
