"""The FROC figure of the report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medvision.evaluation.froc import FROC_RATES
from medvision.evaluation.results import ClassResult, Evaluation, Froc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#1f2933"
_GREY = "#7b8794"
# Okabe and Ito's colours, told apart by every common kind of colour vision.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", "-.", ":", (0, (7, 2, 1, 2)))
_LOWEST, _HIGHEST = 1 / 16, 16.0


def froc_figure(evaluation: Evaluation) -> bytes | None:
    """Draw the FROC curve of all lesions with its band, and beside it those of the classes.

    Returns SVG, the same for the same evaluation; None where there is no lesion. The classes are
    those with a lesion, if there is more than one class.
    """
    if not evaluation.lesions:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    classes = [item for item in evaluation.classes if item.lesions]
    panels = 2 if len(evaluation.classes) > 1 else 1
    with matplotlib.rc_context():
        # A class name may hold a dollar sign, which must not start a formula.
        matplotlib.rcParams.update({"svg.hashsalt": "medvision", "text.parse_math": False})
        matplotlib.rcParams.update({"font.size": 10, "axes.edgecolor": _GREY})
        figure = Figure(figsize=(5.2 * panels, 3.9), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_overall(axes[0], evaluation)
        if panels == 2:
            _draw_classes(axes[1], classes)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _draw_overall(axes: Axes, evaluation: Evaluation) -> None:
    froc = evaluation.overall.any_class
    if froc.band_rates:
        axes.fill_between(
            froc.band_rates, froc.band_low, froc.band_high, color=_COLORS[0], alpha=0.18, lw=0
        )
    _draw_curve(axes, froc, _COLORS[0], "-")
    values = [item.value or 0.0 for item in froc.sensitivity]
    axes.plot(froc.rates, values, "o", color=_COLORS[0], ms=4)
    _dress(axes, f"All lesions (n = {evaluation.lesions})")
    axes.set_ylabel("Sensitivity")


def _draw_classes(axes: Axes, classes: Sequence[ClassResult]) -> None:
    for number, item in enumerate(classes):
        color, dash = _COLORS[number % len(_COLORS)], _DASHES[number % len(_DASHES)]
        label = f"{item.name} (n = {item.lesions})"
        _draw_curve(axes, item.any_class, color, dash, label)
    _dress(axes, "By class, found by any finding")
    axes.legend(loc="lower right", frameon=False, fontsize=9, handlelength=3)


def _draw_curve(axes: Axes, froc: Froc, color: str, dash: object, label: str = "") -> None:
    # Zero has no place on a logarithmic axis: the curve enters from beyond the left edge.
    rates = [max(rate, _LOWEST / 100) for rate in froc.curve_fp_per_scan]
    values = list(froc.curve_sensitivity)
    axes.plot(
        [*rates, max(rates[-1], _HIGHEST)],
        [*values, values[-1]],
        color=color,
        ls=dash,
        lw=1.8,
        label=label,
    )


def _dress(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(_LOWEST, _HIGHEST)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(FROC_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.minorticks_off()
    axes.grid(color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, length=3)
    axes.set_xlabel("False positives per scan")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
