"""The page: what it says, that it stands alone, that its pictures show the right place."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medvision import geometry
from medvision.errors import InputError, UsageError
from medvision.evaluation.case import CaseResult
from medvision.evaluation.evaluate import evaluate
from medvision.findings.finding import Finding, ScanFindings
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.labels.masks import write_labels
from medvision.outputs.json_csv import write_findings
from medvision.report.load import ImageReader, image_reader, load_cases
from medvision.report.page import write_report
from medvision.report.pictures import FINDING_COLOR, REFERENCE_COLOR, Marks, draw
from medvision.scans.images import write_image
from medvision.scans.volume import ScanSource, Volume

SHAPE = (12, 120, 100)
# Stored upside down and back to front, with pixels that are not square.
FLIPPED = geometry.make_affine(
    (40.0, 50.0, -20.0), (0, 0, 1), (0, -1, 0), (-1, 0, 0), (2.5, 0.6, 0.9)
)
NAMES = ("solid", "glass")


def lesion(label: int, row: int, class_name: str = "solid", *, ignore: bool = False) -> Annotation:
    mask = np.ones((2, 10, 8), dtype=bool)
    return Annotation(label, class_name, Box(4, row, 30, 6, row + 10, 38), mask, ignore)


def finding(number: int, row: int, score: float, class_name: str = "solid") -> Finding:
    box = Box(4, row, 30, 6, row + 10, 38)
    x, y, z = geometry.index_to_patient(FLIPPED, box.center_index).tolist()
    box_mm = geometry.box_to_patient(FLIPPED, box)
    scores = {name: score if name == class_name else 0.0 for name in NAMES}
    return Finding(number, class_name, score, box, box_mm, (x, y, z), 5, 7.2, 300.0, scores)


def scan(case_id: str, findings: Sequence[Finding], lesions: Sequence[Annotation]) -> CaseResult:
    return CaseResult(case_id, tuple(findings), tuple(lesions), FLIPPED, SHAPE)


def volume_of(case: CaseResult) -> Volume:
    array = np.full(case.shape, -900.0, dtype=np.float32)
    for item in case.annotations:
        assert item.mask is not None
        array[item.box.slices][item.mask] = 40
    return Volume(array, case.affine, ScanSource(modality="CT"))


def pictures_of(cases: Sequence[CaseResult], *, missing: str = "") -> ImageReader:
    volumes = {case.case_id: volume_of(case) for case in cases if case.case_id != missing}
    return volumes.get


def several() -> list[CaseResult]:
    return [
        scan(
            "a", [finding(1, 20, 0.9), finding(2, 90, 0.8)], [lesion(1, 20), lesion(2, 60, "glass")]
        ),
        scan("b", [finding(1, 40, 0.6, "glass")], [lesion(1, 40, "glass")]),
        scan("c", [finding(1, 50, 0.7)], []),
        scan("d", [finding(1, 90, 0.65), finding(2, 20, 0.11)], [lesion(1, 20)]),
        scan("e", [finding(1, 70, 0.64)], [lesion(1, 70, ignore=True)]),
    ]


class Page(HTMLParser):
    """What a page loads, its text, and the alternative texts of its pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.loads: list[str] = []
        self.alts: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loads += [str(named[key]) for key in ("src", "href", "srcset", "data") if key in named]
        if tag == "img":
            self.alts.append(named.get("alt") or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


def write(
    cases: Sequence[CaseResult],
    folder: Path,
    *,
    missing: str = "",
    fp: float = 0.4,
    **words: object,
) -> tuple[Page, dict]:
    result = evaluate(cases, class_names=NAMES, operating_fp=fp, draws=60)
    images = pictures_of(cases, missing=missing)
    html, data = write_report(result, cases, folder / "report.html", images=images, **words)
    return Page(html.read_text()), json.loads(data.read_text(), parse_constant=pytest.fail)


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page, _ = write(several(), tmp_path)
    assert page.loads
    assert all(load.startswith("data:image/") for load in page.loads)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "default-src 'none'; img-src data:" in page.html
    assert not re.search(r"url\(|@import| style=| on\w+=", page.html)


def test_headline_counts_and_warns(tmp_path: Path) -> None:
    page, data = write(several(), tmp_path)
    # Hits .9 and .6, false .8 and .7 within 0.4 a scan, then .65; one is never hit, one at .11.
    assert "Found 1 of 4 lesions at 0.4 false positives per scan (0.25, 95 % CI" in page.text
    assert "For research use only" in page.text
    assert "3 lesions were missed" in page.text
    assert "5 scans, of which 2 without a reference lesion" in page.text
    assert "1 region marked to be ignored" in page.text
    assert "Fewer than 10 lesions: solid (2), glass (2)" in page.text
    assert data["headline"] in page.text
    assert data["evaluation"]["operating"]["detected"] == 1
    assert len(data["evaluation"]["classes"][1]["any_class"]["sensitivity"]) == 7


def test_gallery_has_every_miss_and_says_what_came_closest(tmp_path: Path) -> None:
    page, _ = write(several(), tmp_path)
    assert "Missed (3)" in page.text
    assert "d, lesion 1 : solid, 9.0 mm; closest: finding no. 2, score 0.11" in page.text
    assert "a, lesion 2 : glass, 9.0 mm; no finding hits it; nearest: no. 2, 18 mm" in page.text
    assert "False positives with the highest scores (2 of 2)" in page.text
    assert "c, finding no. 1 : named solid, score 0.70, 7.2 mm; healthy scan" in page.text
    assert "Slices 4, 5, 6" in page.text
    # 3 misses, 2 false positives, 1 hit, and the curves.
    assert len(page.alts) == 7
    assert all(page.alts)


def test_missing_scan_gives_a_caption_without_picture(tmp_path: Path) -> None:
    page, _ = write(several(), tmp_path, missing="d")
    assert len(page.alts) == 6
    assert page.text.count("No picture: the scan is not at hand.") == 1
    assert "1 of 6 entries have no picture" in page.text
    other = volume_of(several()[0])
    moved = Volume(other.array, geometry.crop_affine(other.affine, (1, 0, 0)))
    result = evaluate(several(), class_names=NAMES, draws=0)
    html, _ = write_report(result, several(), tmp_path / "m.html", images=lambda _: moved)
    assert "data:image/png" not in html.read_text()


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(several(), tmp_path / name, title="A title", model={"name": "m"})
    for file in ("report.html", "report.json"):
        one, two = (tmp_path / name / file for name in ("first", "second"))
        assert one.read_bytes() == two.read_bytes()


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>$x_{"
    cases = [
        replace(scan(nasty, [finding(1, 90, 0.5)], [replace(lesion(1, 20), class_name=nasty)])),
        scan("b", [], [lesion(1, 20)]),
    ]
    page, _ = write(
        cases, tmp_path, title=nasty, notes=[nasty], model={"name": nasty}, problems=[nasty]
    )
    assert "script" not in page.tags
    assert page.text.count("alert(1)") > 5


def test_one_scan_reads_as_one_scan(tmp_path: Path) -> None:
    found, _ = write([scan("a", [finding(1, 20, 0.93)], [lesion(1, 20)])], tmp_path, fp=1.0)
    assert "1 of 1 found, as finding no. 1 (score 0.93), with 0 false positives" in found.text
    assert "No lesion was missed." in found.text
    assert "CPM (" in found.text
    assert "per scan (" not in found.text.split("Definitions")[0]
    assert "report.json" in found.text
    several_lesions = [lesion(1, 20), lesion(2, 60), lesion(3, 90)]
    two, _ = write(
        [scan("a", [finding(1, 20, 0.9), finding(2, 90, 0.8)], several_lesions)], tmp_path, fp=1.0
    )
    assert "2 of 3 found, as findings no. 1 and 2, with 0 false positives" in two.text
    assert "Lesion 2 (solid, 9.0 mm) was missed; no finding hits it" in two.text


def test_one_scan_missed_says_so(tmp_path: Path) -> None:
    page, _ = write([scan("a", [finding(1, 90, 0.9)], [lesion(1, 20)])], tmp_path, fp=1.0)
    assert "The lesion was missed: 0 of 1 found, with 1 false positive" in page.text
    none, _ = write([scan("a", [], [lesion(1, 20)])], tmp_path, fp=1.0)
    assert "was missed; no finding in this scan. There is no finding at all." in none.text


def test_healthy_scans_alone_count_false_positives_only(tmp_path: Path) -> None:
    cases = [scan("a", [finding(1, 90, 0.9)], []), scan("b", [], [])]
    page, data = write(cases, tmp_path, fp=1.0)
    assert "No reference lesions in 2 scans: 1 false positive (0.5 per scan)" in page.text
    assert "By class" not in page.text
    assert "Missed" not in page.text
    assert data["evaluation"]["operating"]["sensitivity"]["value"] is None
    empty, _ = write([scan("a", [], [])], tmp_path)
    assert "No reference lesions in this scan: 0 false positives" in empty.text
    assert "There is nothing to show" in empty.text


def _pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_outline_and_box_lie_around_the_lesion_on_a_flipped_grid() -> None:
    case = scan("a", [], [lesion(1, 100)])
    volume = volume_of(case)
    box = finding(1, 100, 0.9)
    shown = _pixels(draw(volume, (5, 104.5, 33.5), 7.0, Marks(case.annotations)).png)
    middle = shown[:, 214 : 214 + 208]
    blue = (middle == REFERENCE_COLOR).all(axis=2)
    bright = middle.min(axis=2) > 200
    # 10 x 0.6 mm by 8 x 0.9 mm at 208 pixels for 64 mm, in the centre of the crop.
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    assert np.ptp(rows) == pytest.approx(6 * 208 / 64, abs=3)
    assert np.ptp(columns) == pytest.approx(7.2 * 208 / 64, abs=3)
    assert rows.mean() == pytest.approx(103.5, abs=1)
    ring = np.argwhere(blue)
    assert ring.min(axis=0) == pytest.approx([rows.min(), columns.min()], abs=4)
    assert ring.max(axis=0) == pytest.approx([rows.max(), columns.max()], abs=4)
    # The row index grows towards the front: the lesion at its upper end is near the front edge,
    # which is up, so nothing of the scan is above it.
    assert (middle[: 103 - 15 * 3, 100] == 0).all()
    assert middle[-1, 100].max() > 0
    boxed = _pixels(draw(volume, (5, 104.5, 33.5), 7.0, Marks(findings=[box])).png)
    orange = np.argwhere((boxed[:, 214 : 214 + 208] == FINDING_COLOR).all(axis=2))
    np.testing.assert_allclose(orange.mean(axis=0), ring.mean(axis=0), atol=1)


def test_picture_says_its_directions_slices_and_window() -> None:
    volume = volume_of(scan("a", [], [lesion(1, 20)]))
    picture = draw(volume, (0, 20, 30), 5.0, Marks())
    assert picture.directions == "top A, left R"
    assert picture.slices == (0, 1)
    assert picture.window.startswith("lung window")
    assert not (_pixels(picture.png) == REFERENCE_COLOR).all(axis=2).any()
    coronal = geometry.make_affine((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1))
    mr = Volume(np.arange(2000, dtype=np.int16).reshape(1, 50, 40), coronal)
    single = draw(mr, (0, 20, 30), 5.0, Marks())
    assert (single.directions, single.slices) == ("top H, left R", (0,))
    assert single.window.startswith("window ")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    out, truth = tmp_path / "out", tmp_path / "truth"
    for case in several():
        found = ScanFindings(
            case.case_id, SHAPE, FLIPPED, case.findings, NAMES, model={"name": "m"}
        )
        write_findings(out / case.case_id, found)
        if case.case_id != "b":
            write_labels(truth / "labels", case.case_id, volume_of(case), case.annotations)
        scan_path = tmp_path / "scans" / f"{case.case_id}.nii.gz"
        scan_path.parent.mkdir(exist_ok=True)
        write_image(scan_path, volume_of(case))
        source = json.dumps({"path": str(scan_path)})
        (out / case.case_id / "source.json").write_text(source)
    write_labels(truth / "labels", "z", volume_of(several()[0]), [lesion(1, 20)])
    (truth / "cases.csv").write_text("case_id,patient_id\na,one\nc,one\n")
    return out, truth


def test_load_cases_pairs_findings_with_labels(folders: tuple[Path, Path]) -> None:
    loaded = load_cases(*folders)
    assert [case.case_id for case in loaded.cases] == ["a", "c", "d", "e"]
    assert [case.patient for case in loaded.cases] == ["one", "one", "", ""]
    assert loaded.without_truth == ("b",)
    assert loaded.without_findings == ("z",)
    assert loaded.problems == ()
    assert loaded.class_names == NAMES
    assert loaded.model == {"name": "m"}
    expected = evaluate([several()[i] for i in (0, 2, 3, 4)], class_names=NAMES, draws=0)
    got = evaluate(loaded.cases, class_names=loaded.class_names, draws=0)
    assert got.operating == expected.operating
    assert got.lesion_results == expected.lesion_results


def test_load_cases_takes_a_labels_folder_too(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    assert len(load_cases(out, truth / "labels").cases) == 4
    assert load_cases(out, truth / "labels").cases[0].patient == "one"


def test_load_cases_passes_over_what_an_interrupted_run_left(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    (out / ".partial-7-a").mkdir()
    (out / ".partial-7-a" / "findings.json").write_text("{")
    assert load_cases(out, truth).problems == ()


def test_load_cases_lists_what_is_wrong_and_goes_on(folders: tuple[Path, Path]) -> None:
    out, truth = folders
    moved = geometry.crop_affine(FLIPPED, (2, 0, 0))
    write_labels(
        truth / "labels", "a", Volume(volume_of(several()[0]).array, moved), [lesion(1, 20)]
    )
    (out / "c" / "findings.json").write_text("{")
    loaded = load_cases(out, truth)
    assert [case.case_id for case in loaded.cases] == ["d", "e"]
    assert len(loaded.problems) == 2
    assert any(text.startswith("a: ") for text in loaded.problems)
    assert any("findings.json" in text for text in loaded.problems)


def test_load_cases_refuses_what_is_not_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out, truth = folders
    with pytest.raises(UsageError):
        load_cases(tmp_path / "no", truth)
    with pytest.raises(UsageError):
        load_cases(out, tmp_path / "no")
    with pytest.raises(InputError, match=r"findings\.json"):
        load_cases(truth, truth)


def test_image_reader_reads_the_scan_where_it_was_or_where_it_is_now(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out, truth = folders
    loaded = load_cases(out, truth)
    volume = image_reader(loaded)("a")
    assert volume is not None
    assert geometry.same_grid(volume.affine, FLIPPED, SHAPE)
    assert image_reader(loaded)("nobody") is None
    (tmp_path / "scans").rename(tmp_path / "moved")
    assert image_reader(loaded)("a") is None
    assert image_reader(loaded, tmp_path / "moved")("a") is not None


def test_benchmark_prints_table_and_json(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "evaluate_sample.py"
    spec = importlib.util.spec_from_file_location("evaluate_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, truth = map(str, folders)
    assert module.main([out, truth, "--draws", "50"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^all +\d/3 ", table, re.MULTILINE)
    assert "always-majority" in table
    assert module.main([out, truth, "--draws", "50", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in figures["rows"]] == ["all", "solid", "glass"]
    assert module.main([out, "/no/such/folder"]) == 2
    assert "A folder is needed" in capsys.readouterr().err


def test_pictures_in_the_page_are_the_pngs(tmp_path: Path) -> None:
    page, _ = write(several(), tmp_path)
    first = next(load for load in page.loads if load.startswith("data:image/png;base64,"))
    assert _pixels(base64.b64decode(first.split(",")[1])).shape == (208, 3 * 208 + 12, 3)
