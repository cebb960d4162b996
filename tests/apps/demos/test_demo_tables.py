"""The pages Models and Results: what they list, draw and hand out, and their API over the wire."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import weights
from apps.catalog import ModelFacts, catalog
from apps.demos import charts, downloads, models, results
from apps.errors import UsageError

REPORTS = Path(__file__).resolve().parents[3] / "benchmarks" / "claims" / "results"
SVG = "{http://www.w3.org/2000/svg}"


def words_of(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


def one(name: str) -> ModelFacts:
    return next(facts for facts in models.found(name, "") if facts.name == name)


def test_families_are_those_of_the_list():
    assert set(models.FAMILIES) == {facts.family for facts in catalog(None, everything=False)}


def test_models_are_found_by_part_pattern_and_family():
    everything = models.found("", "")
    assert len(everything) > 50
    assert {facts.name for facts in models.found(" LITv2_S ", "")} == {"litv2_small"}
    assert all(facts.name.startswith("biformer_") for facts in models.found("biformer_*", ""))
    tap = models.found("base", "tap")
    assert tap and all(facts.family == "tap" and "base" in facts.name for facts in tap)


@pytest.mark.parametrize(
    ("pattern", "family", "words"),
    [
        ("nothing_like_it", "", "no model of the suite is called like 'nothing_like_it'"),
        ("litv2", "tap", "no model of tap is called like 'litv2'"),
        ("", "swin", "there is no family 'swin': expected one of biformer"),
    ],
)
def test_what_is_no_model_is_said(pattern: str, family: str, words: str):
    with pytest.raises(UsageError, match=re.escape(words)):
        models.found(pattern, family)


def test_published_and_counted_are_told_apart():
    points = {point.name: point for point in models.points(models.found("", ""))}
    both = {name: point for name, point in points.items() if point.published_x}
    assert {"litv2_small", "litv2_base_384", "biformer_tiny", "biformer_base"} <= set(both)
    assert all(point.x == pytest.approx(point.published_x, rel=0.05) for point in both.values())
    assert points["tap_fan_base_16_p4_hybrid"].published_x is None  # of which the paper prints none
    drawn = models.drawings(list(points.values()))[1]
    rings = [e for e in ElementTree.fromstring(drawn).iter() if e.get("fill") == "none" and len(e)]
    assert len(rings) == len(both)
    assert "3.72 GMACs counted here, 3.7 published" in words_of(drawn)
    told = models.facts_about(one("litv2_small"))
    assert "Counted here: 27.84 M parameters, 3.72 GMACs" in told and "Published: 82 % top-1, 3.7 GMACs" in told
    assert "Published: no figure" in models.facts_about(one("litv2_nano"))


def test_plot_keeps_a_familys_shape_and_its_marks_inside():
    alone = models.drawings(models.points(models.found("litv2", "")))[1]
    assert "<circle" not in alone and charts.VERMILLION in alone
    root = ElementTree.fromstring(models.drawings(models.points(models.found("", "")))[1])
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width and 0 <= float(element.attrib["y"]) <= height
    assert "None of these" in words_of(models.drawings([])[1])


def test_names_in_a_plot_are_escaped():
    drawn = charts.standalone(charts.scatter([charts.Point("<b>&", "<i>", 1.0, 2.0, 80.0)], {}), 720, 460)
    assert "<b>&" in words_of(drawn) and "<i>" in words_of(drawn)


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.3, 47, True), (-6.7, 1.2, False), (0, 0.021, False), (5, 5.2, False)]
)
def test_ticks_are_few_and_inside(low: float, high: float, log: bool):
    axis = charts.Axis(low, high, 10, 310, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    assert axis.at(low) == 10 and axis.at(high) == 310


@pytest.mark.parametrize("name", ["shapes_biformer", "tf_efficientnet_lite0", "litv2_nano"])
def test_lines_to_load_do_load(name: str):
    space: dict[str, Any] = {}
    exec(models.how_to_load(one(name))[0], space)
    parameters = sum(p.numel() for p in space["model"].parameters()) / 1e6
    assert parameters == pytest.approx(one(name).params, rel=0.4)  # a head of ten classes makes a small network smaller


def test_every_model_has_its_lines():
    for facts in models.found("", ""):
        python, shell = models.how_to_load(facts)
        compile(python, facts.name, "exec")
        assert facts.name in python and "\n" not in python + shell
        words = shlex.split(shell)
        assert words[:2] in (["attnsuite", verb] for verb in ("classify", "segment", "train"))
        assert words[words.index("--model") + 1] == facts.name
        assert ("pretrained=True" in python) == (facts.source is not None and not facts.source.startswith("package"))


def test_commands_are_taken_by_the_command_line(run):
    for name in ("shapes_biformer", "litv2_nano", "psa_hrnet_w48_ocr"):
        verb = shlex.split(models.how_to_load(one(name))[1])[1:]
        done = run(*["nowhere/" if word == "photos/" else word for word in verb])
        assert done.code == 2 and "nowhere" in done.err  # what it lacks is the pictures


def test_every_claim_of_the_reports_is_on_the_page_and_in_the_file():
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob("*.json"))]
    wanted = [(report["method"], claim["claim"], claim["verdict"]) for report in reports for claim in report["claims"]]
    rows = results.found("", "")
    assert [(row["method"], row["claim"], row["verdict"]) for row in rows] == wanted
    page = ElementTree.fromstring(f"<div>{results.as_page(rows).replace('<br>', '<br/>')}</div>")
    items = [" ".join(item.itertext()) for item in page.iter("li")]
    assert len(items) == len(wanted)
    assert all(any(claim in item and verdict in item for item in items) for _, claim, verdict in wanted)
    assert {report["command"] for report in reports} == {code.text for code in page.iter("code")}
    file = ElementTree.fromstring(results.as_file(rows))
    squares = [e for e in file.iter(f"{SVG}polygon") if e.get("fill") == charts.VERMILLION]
    assert len(squares) == 1 + sum(verdict == "contradicted" for *_, verdict in wanted)  # and the legend's


def test_an_interval_is_drawn_where_its_numbers_are():
    rows = results.found("HiLo attention", "")
    axis = charts.Axis(-0.4, 0.6, 0, 100)
    assert axis.at(0) == 40
    report = json.loads((REPORTS / "hilo.json").read_text(encoding="utf-8"))
    for row, claim in zip(rows, report["claims"], strict=True):
        assert row["difference"] == pytest.approx(claim["difference"], rel=1e-3)
        assert row["interval"] == pytest.approx(claim["interval"], rel=1e-3)
        assert row["unit"] == "times as fast"
    page = results.as_page(rows)
    zero = float(re.findall(r"--zero:([\d.]+)px", page)[0])
    marks = re.findall(r'<circle cx="([\d.]+)" cy="12.0"', page)
    assert len(marks) == sum(row["verdict"] == "shown" for row in rows)
    assert all(float(x) > zero for x in marks)  # what was shown lies right of zero
    counted = results.found("Bi-level routing attention", "", "saves memory")
    assert counted and all(row["interval"] is None for row in counted)


def test_a_claim_that_goes_on_says_from_which():
    rows = results.found("HiLo attention", "", "full attention")
    going_on = next(row for row in rows if row["claim"].startswith("…"))
    assert going_on["after"] == "A HiLo layer is faster than window attention"
    assert "A HiLo layer is faster than window attention; " in results.as_page(rows)


def test_claims_are_found_by_method_verdict_and_words():
    against = results.found("", "contradicted")
    assert len(against) >= 10 and {row["verdict"] for row in against} == {"contradicted"}
    assert {row["method"] for row in results.found("OAT", "")} == {"OAT"}
    assert results.found("", "", "WINDOW attention") == results.found("HiLo attention", "", "window")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Swin", "", ""), "there is no method 'Swin': expected one of A-STAR"),
        (("", "proven", ""), "there is no verdict 'proven': expected one of shown, not shown at this scale"),
        (("OAT", "contradicted", "<b>"), "no claim fits OAT and “contradicted” and “<b>”"),
    ],
)
def test_what_is_no_claim_is_said(arguments: tuple[str, str, str], words: str):
    with pytest.raises(UsageError, match=re.escape(words)):
        results.found(*arguments)


def test_rows_are_handed_out_as_csv_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    rows = results.found("Bi-level routing attention", "")
    path = downloads.handed_out("rows.csv", downloads.as_csv(rows))
    read = list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"))))
    assert [row["claim"] for row in read] == [row["claim"] for row in rows]
    assert read[0]["interval"] == "" and len(read[-1]["interval"].split()) == 2
    assert downloads.handed_out("rows.csv", downloads.as_csv(rows)) == path
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["rows.csv"]
    assert downloads.as_csv([]) == "\n"


def test_pages_are_drawn_without_torch_or_timm():
    code = (
        "import sys; from apps.demos.home import build; from apps.demos.host import Host\n"
        "build(Host(), 'models'); build(Host(), 'results')\n"
        "print([name for name in ('torch', 'timm', 'transformers', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "[]"


def test_both_pages_answer_over_the_wire(serve: Any):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(serve(), verbose=False)
    rows = client.predict(pattern="litv2_s", family="", api_name="/models")
    assert rows == [facts.as_dict() for facts in catalog("litv2_s", everything=False)]
    assert len(client.predict(api_name="/models")) == len(catalog(None, everything=False))
    with pytest.raises(AppError, match="&lt;script&gt;"):
        client.predict(pattern="<script>", family="", api_name="/models")
    against = client.predict(method="OAT", verdict="contradicted", api_name="/results")
    assert against == results.found("OAT", "contradicted")
    with pytest.raises(AppError, match="There is no verdict"):
        client.predict(method="", verdict="x", api_name="/results")
    api: Any = client.view_api(return_format="dict", print_info=False)
    api = api["named_endpoints"]
    assert [p["parameter_name"] for p in api["/models"]["parameters"]] == ["pattern", "family"]
    assert [p["parameter_name"] for p in api["/results"]["parameters"]] == ["method", "verdict", "search"]
    assert "Lists the models" in api["/models"]["description"]


def test_published_multiply_adds_stand_in_the_manifest():
    assert weights.entry("litv2_medium.in1k").gmacs == 7.5
    assert weights.entry("tap_fan_base_16_p4_hybrid.in1k").gmacs is None
