import copy
import json
import math
import os
import re
import stat
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from read_page import Page

from distill_trainer.report import headline_table, write_report
from distill_trainer.report.build import finite, write_atomically
from distill_trainer.report.markdown import markdown_page
from distill_trainer.report.page import html_page
from distill_trainer.report.plots import draw_plots
from distill_trainer.report.series import Plot, series
from distill_trainer.report.tables import TOKEN_HEADER, benchmark_note, benchmark_table, sections, token_rows
from distill_trainer.report.wording import (
    case_sentence,
    model_rows,
    number,
    outcome,
    parameters,
    percent,
    perplexity,
    router_sentence,
    sentences,
    short,
    steps_sentence,
    unscored_sentence,
    verdict,
)

SECTIONS = {
    "training": ["bits_per_byte", "losses", "schedules"],
    "router": ["layers", "expert_load", "router", "reliability"],
    "gap": ["gap"],
    "retention": ["by_frequency", "by_position"],
}
PLOT_NAMES = [name for names in SECTIONS.values() for name in names]
PLOTS = [
    Plot(name, f"About {name}", f"What {name} shows", f"<svg><text>{name}</text></svg>", section)
    for section, names in SECTIONS.items()
    for name in names
]


def with_bits(report, student, baseline):
    changed = copy.deepcopy(report)
    changed["student"]["bits_per_byte"] = student
    changed["baseline"] = None if baseline is None else changed["baseline"] | {"bits_per_byte": baseline}
    return changed


def test_the_folder_holds_all_files_that_the_markdown_names(report, log_history, baseline_log_history, tmp_path):
    path = write_report(report, log_history, tmp_path, baseline_log_history=baseline_log_history, phases=[0.3, 0.6])
    assert path == tmp_path / "report" / "report.html"
    plots = {f"{name}.svg" for name in PLOT_NAMES}
    files = {file.name for file in path.parent.iterdir()}
    assert files == plots | {"report.json", "report.md", "report.html"}
    assert json.loads((path.parent / "report.json").read_text()) == report
    markdown = (path.parent / "report.md").read_text()
    assert set(re.findall(r'src="(.*?)"', markdown)) == plots
    page = path.read_text()
    for name in plots:
        content = (path.parent / name).read_text()
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(root) > 5
        assert "prefers-color-scheme:dark" in content
        # The page holds the same drawing.
        assert content.split("</style>")[1].strip() in page


def test_plots_of_an_earlier_run_are_removed_and_other_files_stay(report, log_history, tmp_path):
    folder = write_report(report, log_history, tmp_path).parent
    (folder / "own.svg").touch()
    write_report(report, [], tmp_path)
    measured = {"layers", "reliability", "gap", "by_frequency", "by_position"}
    assert {file.stem for file in folder.glob("*.svg")} == {"own", *measured}


def test_pages_show_the_settings_and_the_command_that_trains_from_them(report):
    report["environment"]["settings"] = {"datasets": ["a<b>.txt"], "max_steps": 6}
    for text in (Page(html_page(report, [])).text, markdown_page(report, [])):
        assert "- a<b>.txt" in text and "max_steps: 6" in text and text.count("Settings") == 1
        assert "python run_distillation.py tiny-llama/training_config.yaml --output_dir outputs/again" in text
    del report["environment"]["settings"]
    assert "Settings" not in html_page(report, []) + markdown_page(report, [])


def test_the_page_is_one_file(report, log_history, tmp_path):
    page = Page(write_report(report, log_history, tmp_path).read_text())
    assert not any({"src", "srcset", "href"} & tag.keys() for _, tag in page.tags)
    assert len(page.all("svg")) == len(PLOT_NAMES) and all(drawing["aria-label"] for drawing in page.all("svg"))


def test_the_page_needs_no_scripts_and_no_network(report):
    html = html_page(report, PLOTS)
    page = Page(html)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_all_figures_of_the_headline_stand_on_every_page(report):
    for text in (Page(html_page(report, PLOTS)).text, markdown_page(report, PLOTS), headline_table(report)):
        for figure in ("2.8311", "2.3225", "2.2758", "1.7203", "1.7021", "2.15 M", "12.4 M"):
            assert figure in text
        assert verdict(report) in text and all(sentence in text for sentence in sentences(report))


def test_pages_list_the_single_figures_and_the_command(report):
    expected = {"5.77", "83 %", "3.91×", "0.6123", "61.9 %", "0.811", "21.7 %", "0.913", "1,912,345", "96.5 %"}
    for text in (Page(html_page(report, [])).text, markdown_page(report, [])):
        assert all(figure in text for figure in expected)
        assert "run_distillation.py configs/demo.yaml --seed 0" in text
        assert "dropped: short windows" in text and "torch 2.13.0" in text and "wandb" not in text
        assert "402,113" in text and report["data"]["eval_sha256"] not in text


def test_pages_show_the_benchmarks_of_all_students(report):
    assert benchmark_table(report) == [
        ("task", "metric", "shots", "examples", "student before", "student, no teacher", "student, distilled"),
        (
            *("arc_easy", "acc (higher is better)", "0", "2,376"),
            *("0.2634 ± 0.0090", "0.2881 ± 0.0093", "0.3127 ± 0.0095"),
        ),
        (
            *("lambada", "perplexity, strict (lower is better)", "5", "5,153"),
            *("912.4000", "700.2500", "612.5000"),
        ),
    ]
    for text in (Page(html_page(report, [])).text, markdown_page(report, [])):
        assert all(cell in text for row in benchmark_table(report) for cell in row)
        assert "lm_eval 0.4.13" in text and "Only the first" not in text
    report["benchmarks"]["limit"] = 1000
    assert "Only the first 1,000 examples of each task" in benchmark_note(report)


@pytest.mark.parametrize("rows", [0, 2])
def test_a_task_without_a_score_is_named(report, rows):
    report["benchmarks"] |= {"unscored": ["silent", "mute"], "rows": report["benchmarks"]["rows"][:rows]}
    for text in (Page(html_page(report, [])).text, markdown_page(report, [])):
        assert "Benchmarks" in text and "It gave no score for silent, mute." in text
        assert ("arc_easy" in text) is (rows > 0)


def test_without_benchmarks_the_pages_do_not_speak_of_them(report):
    for nothing in (None, {"harness": "0.4.13", "limit": None, "rows": []}):
        report["benchmarks"] = nothing
        assert benchmark_table(report) == []
        for text in (html_page(report, []), markdown_page(report, [])):
            assert "Benchmarks" not in text


def test_what_models_are_called_cannot_break_the_pages(report, tmp_path):
    report["student"]["name"] = report["teacher"]["name"] = '<b>"a|b"</b>\nc'
    report["environment"]["command"] = "run <script>alert(1)</script>\n# x"
    html = html_page(report, [])
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and '<b>"a|b"</b>' in page.text
    markdown = markdown_page(report, [])
    assert "<b>" not in markdown and "\\|" in markdown and "\n# x" not in markdown


def test_of_an_absolute_path_the_last_part_is_shown(report):
    report["student"]["name"], report["teacher"]["name"] = "/home/somebody/runs/mine", "outputs/theirs"
    page = Page(html_page(report, []))
    assert "mine" in page.text and "outputs/theirs" in page.text and "somebody" not in page.text
    assert "somebody" not in markdown_page(report, [])


def test_markdown_tables_have_as_many_cells_in_every_row(report):
    report["student"]["name"] = "a|b"
    lines = markdown_page(report, []).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 20
    for before, line in zip(lines, lines[1:], strict=False):
        if before.startswith("|") and line.startswith("|"):
            assert before.replace("\\|", "").count("|") == line.replace("\\|", "").count("|")


def test_a_report_with_nothing_to_tell_is_still_written(tmp_path):
    keys = ("teacher", "student_before", "student", "baseline", "compression", "retention", "router", "gap", "data")
    path = write_report({"schema": 1, **dict.fromkeys(keys)}, [], tmp_path)
    page = Page(path.read_text())
    assert "No verdict" in page.text and not page.all("svg")
    assert {file.name for file in path.parent.iterdir()} == {"report.json", "report.md", "report.html"}


def test_null_figures_are_left_out_and_do_not_read_as_numbers(report):
    for section in ("router", "gap", "student_aware_teacher", "compression"):
        report[section] = dict.fromkeys(report[section])
    report["student_before"] = dict.fromkeys(report["student_before"])
    report["benchmarks"] = report["samples"] = report["passages"] = None
    titles = [title for title, _ in sections(report)]
    assert "Router" not in titles and "Compression" not in titles and "Retention" in titles
    for text in (Page(html_page(report, [])).text, markdown_page(report, []), headline_table(report)):
        assert "None" not in text and "student before" not in text and "router makes" not in text


def test_json_holds_no_value_that_json_cannot(report, tmp_path):
    report["retention"]["kl_divergence"] = math.nan
    report["student"]["word_perplexity"] = math.inf
    report["router"]["gap"] = torch.tensor(0.5)
    report["router"]["expert_load"] = np.array([0.5, 0.25, 0.25])
    report["environment"]["where"] = tmp_path
    path = write_report(report, [], tmp_path)
    written = json.loads((path.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["retention"]["kl_divergence"] is None and written["student"]["word_perplexity"] is None
    assert written["router"]["gap"] == 0.5 and written["router"]["expert_load"] == [0.5, 0.25, 0.25]
    assert written["environment"]["where"] == str(tmp_path)
    assert finite((True, 3, "x", {1: math.nan})) == [True, 3, "x", {"1": None}]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    write_atomically(target, b"old")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(_ordinary_file(tmp_path).stat().st_mode)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "ordinary"}


def _ordinary_file(folder):
    path = folder / "ordinary"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("student", "baseline", "result", "words"),
    [
        (2.2758, 2.3225, "paid", "Distillation paid: the student needs 2.2758 bits per byte, 0.0467 fewer"),
        (2.3225, 2.2758, "lost", "Fine-tuning alone did better: without a teacher the same student needs 2.2758"),
        (2.3225, 2.3230, "draw", "A draw: the distilled student (2.3225 bits per byte)"),
        (2.3230, 2.3225, "draw", "A draw"),
        (2.2758, None, "unknown", "No verdict: without a baseline"),
        (
            2.9,
            None,
            "worse",
            "Training made the student worse: it needed 2.8311 bits per byte before, and needs 2.9000",
        ),
        (
            2.9,
            3.0,
            "worse",
            "Training made the student worse: it needed 2.8311 bits per byte before, and needs 2.9000",
        ),
        (2.9, 2.8, "lost", "Fine-tuning alone did better"),
    ],
)
def test_the_verdict_says_whether_the_teacher_helped(report, student, baseline, result, words):
    changed = with_bits(report, student, baseline)
    assert outcome(changed) == result
    assert verdict(changed).startswith(words)
    assert f'class="verdict {result}"' in html_page(changed, [])


def test_the_case_says_how_much_there_was_to_learn(report):
    assert "closed 50 % of that gap, fine-tuning alone closed 46 % of that gap." in case_sentence(report)
    report["retention"]["gap_closed_baseline"] = None
    assert case_sentence(report).endswith("closed 50 % of that gap.")
    report["teacher"]["bits_per_byte"] = 2.9
    assert "little to learn" in case_sentence(report)
    report["student_before"]["bits_per_byte"] = None
    assert case_sentence(report) == ""


@pytest.mark.parametrize(
    ("student", "closed", "words"),
    [
        (2.9, -0.0622, "Distillation ended 0.0689 worse than that start, fine-tuning alone closed 46 % of that gap."),
        (1.7, 1.0183, "Distillation ended 0.0203 better than the teacher, fine-tuning alone closed 46 % of that gap."),
    ],
)
def test_a_student_that_ends_outside_the_gap_did_not_close_a_share_of_it(report, student, closed, words):
    report["student"]["bits_per_byte"], report["retention"]["gap_closed"] = student, closed
    assert case_sentence(report).endswith(words)
    for text in (Page(html_page(report, [])).text, headline_table(report)):
        assert words in text and "closed -" not in text
    tiles = Page(html_page(report, [])).text
    assert ("6 % wider gap to the teacher" in tiles) == (closed < 0)
    assert "of the gap to the teacher closed" not in tiles
    assert ("0.0203 bits per byte better than the teacher" in tiles) == (closed > 0)


EARLY = "Early stopping, each by its own evaluations: distillation ended after step 360 of 480, scored is step {}; "
STEPS = {
    "both stopped": ((360, 240), (120, 120), EARLY.format(240) + "fine-tuning alone ended after step 120"),
    "one stopped": ((360, 360), (480, 480), EARLY.format(360) + "fine-tuning alone ended after step 480 of 480"),
    "none stopped": ((480, 240), (480, 480), "Best checkpoint, each by its own evaluations: distillation ended"),
    "no baseline": ((360, 360), None, "Early stopping: distillation ended after step 360 of 480, scored is step 360."),
}


@pytest.mark.parametrize(("student", "baseline", "words"), STEPS.values(), ids=STEPS)
def test_trainings_that_were_scored_at_other_steps_are_told_so(report, student, baseline, words):
    ends = {"student": student, "baseline": baseline}
    steps = {role: pair and dict(zip(("ended", "scored"), pair, strict=True)) for role, pair in ends.items()}
    report["data"]["steps"] = {"planned": 480, **steps}
    assert words in headline_table(report) and words in Page(html_page(report, [])).text
    # Then they did not read the same batches.
    assert "on the same text without a teacher" in verdict(report)


def test_trainings_that_ran_to_the_end_are_not_told_apart(report):
    whole = {"ended": 480, "scored": 480}
    report["data"]["steps"] = {"planned": 480, "student": whole, "baseline": whole}
    assert steps_sentence(report) == "" and "on the same batches" in verdict(report)


def test_bytes_that_were_not_scored_are_told_on_every_page(report):
    assert unscored_sentence(report) == ""
    report["data"] |= {"scored_bytes": 401_000, "eval_max_length": 8}
    words = (
        "1,113 of 402,113 held-out bytes were left out, for every model alike: no window of 8 student tokens holds "
        "them, up to the next place where both tokenizers cut, with text before them."
    )
    assert unscored_sentence(report) == words
    for text in (Page(html_page(report, [])).text, markdown_page(report, []), headline_table(report)):
        assert words in text
    report["data"] = {"scored_bytes": 401_000}
    assert unscored_sentence(report) == ""


@pytest.mark.parametrize(
    ("aware", "words"),
    [(1.7021, "the teacher itself better"), (1.8, "the teacher itself worse"), (1.7204, "as good as it was")],
)
def test_a_router_that_harms_the_teacher_is_named(report, aware, words):
    report["student_aware_teacher"]["bits_per_byte"] = aware
    assert words in router_sentence(report) and "22 % of the anchors" in router_sentence(report)


def test_the_best_model_and_the_student_are_marked(report):
    page = Page(html_page(report, []))
    rows = [row["class"] for row in page.all("tr") if "class" in row]
    assert rows == ["", "", "student", "", "best"]
    assert [role for role, _ in model_rows(report)][-1] == "student_aware_teacher"
    assert [row[0] for row in token_rows(report)] == [
        "student before",
        "student, no teacher",
        "student, distilled",
        "teacher",
    ]


def test_the_token_table_shows_speeds_of_reading_and_writing_and_what_a_model_takes(report):
    assert dict(zip(TOKEN_HEADER, token_rows(report)[2], strict=True)) == {
        "model": "student, distilled",
        "name": "tiny-llama",
        "token perplexity": perplexity(2 ** (2.2758 * 3.3)),
        "tokens read per second": "4.19 k",
        "tokens written per second": "140",
        "text written per second": "465 B/s",
        "on disk": "4.3 MB",
        "peak memory": "812 MB",
    }


def test_the_terminal_table_is_aligned_ascii(report):
    table = headline_table(report).splitlines()
    rows = table[: 3 + len(model_rows(report))]
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= 80
    assert headline_table(report).isascii()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (999.0, "999"),
        (999.6, "1 k"),
        (12_400_000, "12.4 M"),
        (1.3e9, "1.3 B"),
        (0.5, "0.5"),
    ],
)
def test_large_numbers_are_short(value, text):
    assert short(value) == text


def test_numbers_are_written_for_people():
    assert short(14_000, "B/s") == "14 kB/s" and short(5, "B/s") == "5 B/s"
    assert number(1234.5678, 2) == "1,234.57" and number(None) == "-" and number(3, 0, " MB") == "3 MB"
    assert percent(0.1234, 1) == "12.3 %" and percent(None) == "-"
    assert perplexity(1326.49) == "1,326.5" and perplexity(3e7) == "3.0e+07" and perplexity(None) == "-"
    assert parameters({"parameters": 2e6, "active_parameters": 2e6}) == "2 M"
    assert parameters({"parameters": 2e6, "active_parameters": 1e6}) == "2 M (1 M active)"


def test_a_series_skips_entries_without_the_value():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2},
        {"step": 3, "loss": None},
        {"loss": 9.0},
        {"step": 4, "loss": 0.0},
    ]
    assert series(history, "loss") == [(1, 2.0), (4, 0.0)]


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (("eval_",), ["bits_per_byte"]),
        (("distill/loss_",), ["losses"]),
        (("distill/expert_load_",), ["expert_load"]),
        (("distill/top_k", "distill/temperature"), ["schedules"]),
        (("distill/changed", "distill/router_entropy", "distill/capacity", "distill/gap"), ["router"]),
        (("distill/changed", "distill/router_entropy", "distill/capacity"), ["router"]),
        (("distill/gap",), []),
        (("loss", "grad_norm"), []),
    ],
)
def test_only_what_was_logged_is_drawn(report, log_history, prefixes, names):
    report["router"] = report["gap"] = report["retention"] = None
    kept = [{key: entry[key] for key in entry if key == "step" or key.startswith(prefixes)} for entry in log_history]
    plots = draw_plots(report, kept, [], [])
    assert [plot.name for plot in plots] == names


def test_losses_that_stay_off_are_not_drawn():
    history = [{"step": step, "distill/loss_kl": 0.0} for step in range(5)]
    assert draw_plots({}, history, [], []) == []


def test_what_was_measured_at_the_end_has_no_steps_and_no_phases(report, log_history):
    at_the_end = ["layers", "reliability", "gap", "by_frequency", "by_position"]
    assert [plot.name for plot in draw_plots(report, [], [], [])] == at_the_end
    for plot in draw_plots(report, log_history, [], [0.5]):
        over_steps = plot.name not in at_the_end
        assert ("optimizer step" in plot.svg) == over_steps, plot.name
        assert ('class="mark"' in plot.svg) == over_steps, plot.name


def test_figures_that_are_null_are_not_drawn(report):
    report["router"]["reliability"][0]["observed"] = None
    report["gap"]["deciles"] = [found | {"baseline": None} for found in report["gap"]["deciles"]]
    for found in report["retention"]["by_frequency"]:
        found["kl_divergence"]["baseline"] = None
    plots = {plot.name: plot.svg for plot in draw_plots(report, [], [], [])}
    assert set(plots) == {"layers", "reliability", "gap", "by_frequency", "by_position"}
    found = [name for name in ("gap", "by_frequency", "by_position") if "no teacher" in plots[name]]
    assert found == ["by_position"]
    report["router"]["reliability"] = report["gap"]["deciles"] = report["retention"]["by_frequency"] = None
    report["retention"]["by_position"], report["router"]["layers"] = [], None
    assert draw_plots(report, [], [], []) == []


def test_phases_and_the_baseline_show_in_the_plots(report, log_history, baseline_log_history):
    def picture(baseline, phases):
        kept = [entry for entry in log_history if "eval_loss" in entry]
        return draw_plots(report, kept, baseline, phases)[0].svg

    plain = picture([], [])
    assert picture([], []) == plain
    assert picture([], [0.5]) != plain and picture(baseline_log_history, []) != plain
    # 0 and 1 are the ends of the run and no change of phase.
    assert picture([], [0.0, 1.0]) == plain
