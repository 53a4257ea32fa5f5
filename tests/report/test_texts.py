import pytest
from read_page import Page

from distill_trainer.report.markdown import markdown_page
from distill_trainer.report.page import html_page
from distill_trainer.report.wording import command_line


def pages(report):
    return Page(html_page(report, [])).text, markdown_page(report, [])


def test_passages_stand_with_the_bits_of_every_model(report):
    for text in pages(report):
        assert "1,423 passages" in text
        for figure in ("2.10", "1.40", "1.20", "1.10", "3.90", "3.80", "3.71", "1.30"):
            assert figure in text
    html, markdown = html_page(report, []), markdown_page(report, [])
    assert html.index("Nearest to the teacher") < html.index("great satisfaction") < html.index("Farthest behind")
    assert markdown.index("best: It is") < markdown.index("worst: Mr. Seward")


def test_samples_stand_side_by_side_with_the_text_itself(report):
    for text in pages(report):
        order = ["The people of the", "the the the", "United States and", "United States have", "several States have"]
        places = [text.index(words) for words in order]
        assert places == sorted(places)


def test_texts_cannot_break_the_pages(report):
    html, markdown = html_page(report, []), markdown_page(report, [])
    assert "<i>that</i>" not in html and "<i>that</i>" in Page(html).text and "<b>of</b>" not in html
    assert "<i>" not in markdown and "\\*ultimo\\*" in markdown
    row = next(line for line in markdown.splitlines() if "Seward" in line)
    assert "note \\| of the 26th" in row
    report["samples"][0]["student"] = "\x00\u202e</main>"
    assert "··&lt;/main&gt;" in html_page(report, [])


@pytest.mark.parametrize("missing", ["baseline", "student_before"])
def test_a_model_that_is_not_there_leaves_no_trace(report, missing):
    for kind in ("best", "worst"):
        report["passages"][kind][0][missing] = None
    del report["samples"][0][missing]
    for name in ("by_frequency", "by_position"):
        for found in report["retention"][name]:
            found["kl_divergence"][missing] = found["top1_agreement"][missing] = None
    report[missing] = None
    report["gap"] = None
    label = {"baseline": "no teacher", "student_before": "before"}[missing]
    text = Page(html_page(report, [])).text
    shown = text.split("Best and worst passages")[1].split("Figures")[0]
    assert label not in shown and "None" not in text
    shown = markdown_page(report, []).split("Best and worst passages")[1].split("Token figures")[0]
    assert label not in shown and "distilled" in shown
    assert label not in text.split("Retention")[1].split("same first")[0]


def test_groups_stand_on_both_pages(report):
    for text in pages(report):
        for figure in (
            "1 to 9",
            "10 to 99",
            "from 100",
            "4.512",
            "4.231",
            "3.987",
            "26.8 %",
            "1,713",
            "8 to 15",
            "1.066",
        ):
            assert figure in text


def test_parts_that_were_not_measured_are_left_out(report):
    report["passages"], report["samples"] = None, []
    report["retention"] |= {"by_frequency": [], "by_position": None}
    for text in pages(report):
        for words in ("passages", "What the models write", "occurrences", "None"):
            assert words not in text


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("run_distillation.py configs/demo.yaml", "python run_distillation.py configs/demo.yaml"),
        ("/usr/bin/tool --x", "/usr/bin/tool --x"),
        (None, ""),
    ],
)
def test_the_command_can_be_run_again(report, command, shown):
    report["environment"]["command"] = command
    assert command_line(report) == shown
