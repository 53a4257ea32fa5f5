import copy
import shutil

import pytest
from browser import CHROMIUM, Browser

from distill_trainer.report import write_report
from distill_trainer.report.compare import comparison_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PHONE, DESK = 360, 1100


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(report, log_history, baseline_log_history, tmp_path):
    """The page alone, in a folder without the files that were written beside it."""
    written = write_report(report, log_history, tmp_path, baseline_log_history=baseline_log_history, phases=[0.3, 0.6])
    (tmp_path / "alone").mkdir()
    return shutil.copy(written, tmp_path / "alone" / "report.html")


def assert_sound(found, width):
    assert found["problems"] == [] and found["requests"] == []
    assert found["width"] == width and found["sticking_out"] == [] and found["cut_off"] == []
    assert all(size >= 9 for size in found["letters"])


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_opens_from_disk_alone_without_errors_requests_or_overflow(browser, page, width):
    found = browser.look(page, width=width)
    assert_sound(found, width)
    assert len(found["charts"]) == 10 and all(height > 100 for height in found["charts"])


def test_the_page_is_light_or_dark_like_the_reader_wants_it(browser, page):
    tones = [browser.look(page, width=PHONE, scheme=scheme)["background"] for scheme in ("light", "dark")]
    assert tones == ["rgb(246, 247, 249)", "rgb(14, 18, 23)"]


def test_long_names_many_experts_and_long_words_stay_inside_a_phone(browser, report, log_history, tmp_path):
    loads = [1 / 64] * 64
    report["router"] |= {"expert_load": loads, "gate_load": loads}
    for found in report["router"]["token_classes"]:
        found |= {"expert_load": loads, "gate_load": loads}
    layer = {"expert_load": [1 / 128] * 128, "gate_load": [1 / 128] * 128, "changed_fraction": 0.5}
    report["router"]["layers"] = [{"layer": number, **layer} for number in range(48)]
    report["teacher"]["name"] = report["student"]["name"] = "an/organisation-with-a-name/" + "model-" * 30
    report["environment"]["command"] = "run_distillation.py --datasets " + "x" * 300
    report["passages"]["worst"][0]["text"] = "w" * 400
    report["samples"][0]["student"] = "日本語" * 100
    report["student_before"]["bits_per_byte"], report["student"]["parameters"] = 12345.6789, 1.23e11
    for entry in log_history:
        entry["distill/loss_kl"] = entry.get("distill/loss_kl", 1) * 1e6
    assert_sound(browser.look(write_report(report, log_history, tmp_path), width=PHONE), PHONE)


@pytest.mark.parametrize("numbers", [range(28), [1, 11]])
def test_every_rerouted_layer_has_room_on_a_phone(browser, report, log_history, tmp_path, numbers):
    (first, _) = report["router"]["layers"]
    report["router"]["layers"] = [first | {"layer": number} for number in numbers]
    page = write_report(report, log_history[:1], tmp_path)
    assert_sound(browser.look(page, width=PHONE), PHONE)
    assert page.read_text().count("the highest of") == 3


def test_a_page_without_anything_to_tell_is_sound_as_well(browser, tmp_path):
    assert_sound(browser.look(write_report({"schema": 1}, [], tmp_path), width=PHONE), PHONE)


def test_runs_side_by_side_scroll_inside_their_table_on_a_phone(browser, report, tmp_path):
    path = tmp_path / "runs.html"
    path.write_text(comparison_page([("outputs/first", report), ("outputs/second", copy.deepcopy(report))]))
    assert_sound(browser.look(path, width=PHONE), PHONE)


def test_the_browser_sees_errors_requests_and_overflow(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><body><script>console.error('x'); nothing()</script><img src='missing.png'>"
        "<p style='width:500px'>wide</p><svg viewBox='0 0 400 10' width=200><text x=395>cut</text></svg>"
    )
    found = browser.look(path, width=PHONE)
    assert {event["method"] for event in found["problems"]} >= {"Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [url.rsplit("/", 1)[1] for url in found["requests"]] == ["missing.png"]
    assert found["width"] > PHONE and any("wide" in element for element in found["sticking_out"])
    assert found["cut_off"] == ["cut"] and found["letters"] == [6]
