import re
import xml.etree.ElementTree as ElementTree

import pytest
from read_page import Page

from distill_trainer.report.markdown import markdown_page
from distill_trainer.report.page import html_page
from distill_trainer.report.plots import draw_plots
from distill_trainer.report.router import GAP_STEPS, MAX_EXPERT_ROWS, busiest
from distill_trainer.report.series import Plot
from distill_trainer.report.style import EXPERT_COLORS, STYLE
from distill_trainer.report.terminal import headline_table

NEW_KEYS = ("layers", "token_classes", "reliability", "calibration_error", "examples")


def page_of(report, plots=()):
    return Page(html_page(report, plots))


def pieces(page):
    """Class and title of every piece of the examples, both renderings."""
    return [(tag["class"], tag["title"]) for tag in page.all("span") if "gate" in tag.get("title", "")]


def many_experts(report, count):
    loads = [expert / sum(range(count)) for expert in range(count)]
    report["router"] |= {"expert_load": loads, "gate_load": loads[::-1]}
    for found in report["router"]["token_classes"]:
        found |= {"expert_load": loads, "gate_load": loads[::-1]}
    return loads


def test_many_experts_are_cut_to_the_busiest(report):
    count = 3 * MAX_EXPERT_ROWS
    loads = many_experts(report, count)
    page = Page(html_page(report, []))
    bars = [tag for tag in page.all("i") if tag["class"].startswith("bar")]
    assert len(bars) == 2 * MAX_EXPERT_ROWS
    assert f"The busiest {MAX_EXPERT_ROWS} of {count}; the longest bar is 4.2 %." in page.text
    widths = [float(bar["style"].removeprefix("width:").removesuffix("%")) for bar in bars[::2]]
    assert widths == sorted(widths, reverse=True) and widths[0] == 100
    assert widths[-1] == pytest.approx(100 * loads[-MAX_EXPERT_ROWS] / loads[-1], abs=0.06)


def test_the_bars_of_few_experts_are_shares_of_the_whole(report):
    bars = [tag["style"] for tag in page_of(report).all("i") if tag["class"].startswith("bar")]
    assert bars == [f"width:{share:.1f}%" for share in (31, 52, 44, 28, 25, 20)]


def all_forms(report):
    return page_of(report).text, markdown_page(report, []), headline_table(report)


def test_every_form_of_the_report_names_the_layer_that_the_router_is_shown_of(report):
    for text in all_forms(report):
        assert "In layer 3, the highest of 2 re-routed, it picks another first expert" in text
    for text in all_forms(report)[:2]:
        assert "are those of layer 3, the highest of 2 re-routed, counted from 0. The chart by layer" in text
        assert "The gate is that of the teacher as it is" in text
    assert "| layer | 3, the highest of 2 re-routed |" in markdown_page(report, [])


def test_a_single_rerouted_layer_is_named_without_others(report):
    del report["router"]["layers"][0]
    for text in all_forms(report):
        assert "In layer 3 it picks another first expert" in text and "highest" not in text
    for text in all_forms(report)[:2]:
        assert "are those of layer 3, counted from 0. The gate" in text and "by layer" not in text.lower()
    assert "layers" not in {plot.name for plot in draw_plots(report, [], [], [])}


def test_a_report_that_does_not_know_its_layer_names_none(report):
    del report["router"]["layers"]
    for text in all_forms(report):
        assert "It picks another first expert" in text and "counted from 0" not in text


def layer_plot(report):
    return ElementTree.fromstring(next(plot.svg for plot in draw_plots(report, [], [], []) if plot.name == "layers"))


def test_every_layer_has_a_bar_for_the_router_and_one_for_the_gate_cut_into_the_experts_shares(report):
    root = layer_plot(report)
    shapes = [path.get("d") for path in root.iter("path") if path.get("d").endswith("z")]
    heights = [
        [float(low) - float(high) for low, high in re.findall(r"M[\d.]+ ([\d.]+)H[\d.]+V([\d.]+)", shape)]
        for shape in shapes
    ]
    # Three experts of the router, then of the gate; in each the two layers from the bottom up.
    shares = [(0.2, 0.31), (0.3, 0.44), (0.5, 0.25), (0.61, 0.52), (0.16, 0.28), (0.23, 0.2)]
    assert heights == [pytest.approx([90 * share for share in pair], abs=0.15) for pair in shares]
    texts = [text.text for text in root.iter("text")]
    assert "layer" in texts and texts.count("expert 2") == 1
    assert [title.text for title in root.iter("title")] == ["0.634 at 0", "0.217 at 3"]


def test_of_many_experts_a_layer_shows_the_busiest(report):
    for found, start in zip(report["router"]["layers"], (1, 20), strict=True):
        loads = [((expert * 7 + start) % 128) / 8128 for expert in range(128)]
        found |= {"expert_load": loads, "gate_load": loads[::-1]}
    found = [title.text for title in layer_plot(report).iter("title")]
    assert found[:4] == [f"{side}: 0.01562 at {layer}" for side in ("router", "gate") for layer in (0, 3)]
    assert not [path for path in layer_plot(report).iter("path") if path.get("d").endswith("z")]
    assert "| 0 | 63 % | 2 % (expert 18) | 2 % (expert 109) |" in markdown_page(report, [])


def test_the_figures_of_every_layer_stand_in_a_table(report):
    markdown, page = markdown_page(report, []), page_of(report, draw_plots(report, [], [], []))
    assert "| 0 | 63 % | 20 % / 61 % | 30 % / 16 % | 50 % / 23 % |" in markdown
    assert "| 3 | 22 % | 31 % / 52 % | 44 % / 28 % | 25 % / 20 % |" in markdown
    assert "31 % / 52 %" in page.text and "50 % / 23 %" in page.text


def test_shares_that_broke_and_layers_with_fewer_experts_do_not_break_the_chart(report):
    report["router"]["layers"][0] |= {"expert_load": [None, 0.4], "gate_load": [0.5, 0.5], "changed_fraction": None}
    assert "None" not in page_of(report, draw_plots(report, [], [], [])).text
    assert "| 0 | - | - / 50 % | 40 % / 50 % | - / - |" in markdown_page(report, [])


def test_few_experts_stand_in_their_order_and_many_by_their_load():
    assert busiest([0.1, 0.6, 0.3], 3) == [0, 1, 2]
    assert busiest([0.1, 0.6, None, 0.3], 2) == [1, 3]


def test_loads_by_class_are_stacked_for_router_and_gate_and_said_in_words(report):
    page = page_of(report)
    stacks = [tag["aria-label"] for tag in page.all("span") if tag.get("class", "").startswith("stack")]
    assert stacks == [
        "router: expert 0 30 %, expert 1 50 %, expert 2 20 %",
        "gate: expert 0 60 %, expert 1 30 %, expert 2 10 %",
        "router: expert 0 0 %, expert 1 8 %, expert 2 92 %",
        "gate: expert 0 0 %, expert 1 4 %, expert 2 96 %",
    ]
    assert "word start 70,123" in page.text and "digits 411" in page.text
    cuts = [tag for tag in page.all("i") if tag.get("title", "").startswith(("router,", "gate,"))]
    # Nothing is drawn for a share of zero.
    assert [cut["class"] for cut in cuts] == ["e0", "e1", "e2"] * 2 + ["e1", "e2"] * 2
    assert "30 % / 60 %" in page.text


def test_experts_beyond_the_colours_are_the_others(report):
    loads = many_experts(report, 40)
    page = page_of(report)
    stack = next(tag["aria-label"] for tag in page.all("span") if tag.get("class") == "stack router")
    named = [f"expert {expert}" for expert in range(39, 39 - len(EXPERT_COLORS), -1)]
    assert [part.rsplit(" ", 2)[0] for part in stack.removeprefix("router: ").split(", ")] == [*named, "others"]
    assert stack.endswith(f"others {100 * sum(loads[: -len(EXPERT_COLORS)]):.0f} %")
    assert f"The busiest {len(EXPERT_COLORS)} of 40 experts, the others grey." in page.text
    assert page.text.count("n others") == 2
    # The experts of the examples are among the least busy ones: grey, told apart by their numbers.
    assert {kind for kind, _ in pieces(page) if kind[0] == "e"} == {"ex", "ex other"}
    assert html_page(report, []).count("<sub>") == 4


def test_every_piece_says_expert_gate_and_gap_and_is_marked_where_the_gate_differs(report):
    tokens = [token for example in report["router"]["examples"] for token in example["tokens"]]
    found = pieces(page_of(report))
    titles = [f"expert {t['expert']}, gate {t['gate_expert']}, gap {t['gap']:.2f} nats" for t in tokens]
    by_expert = [f"e{t['expert']}" + " other" * (t["expert"] != t["gate_expert"]) for t in tokens]
    by_gap = [f"g{sum(t['gap'] >= low for low in GAP_STEPS[1:])}" for t in tokens]
    expected = list(zip(by_expert[:5], titles[:5], strict=True)) + list(zip(by_gap[:5], titles[:5], strict=True))
    expected += list(zip(by_expert[5:], titles[5:], strict=True)) + list(zip(by_gap[5:], titles[5:], strict=True))
    assert found == expected
    assert by_gap == ["g0", "g3", "g0", "g1", "g4", "g2"]


def test_pieces_read_as_their_text_with_the_expert_where_it_changes(report):
    text = page_of(report).text
    assert " The1 people2␣.↵↵0" in text and " The people␣.↵↵" in text


def test_the_number_is_left_out_where_the_expert_stays(report):
    assert html_page(report, []).count("<sub>") == 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ('"&', "&quot;&amp;"),
        ("\x00\x1b", "··"),
        ("\u202e", "·"),
        ("a\tb", "a⇥b"),
        ("\t", "⇥"),
        ("  ", "␣␣"),
        ("  x", "x"),
        ("日本 é", "日本 é"),
        ("👩‍🚀", "👩‍🚀"),
        ("�", "�"),
        ("", ""),
    ],
)
def test_whatever_the_text_holds_the_page_shows_it_harmlessly(report, text, shown):
    report["router"]["examples"] = [{"tokens": [{"text": text, "expert": 0, "gate_expert": 0, "gap": 0.1}]}]
    html = html_page(report, [])
    assert "script" not in {tag for tag, _ in Page(html).tags}
    title = "expert 0, gate 0, gap 0.10 nats"
    assert f'<span class="e0" title="{title}">{shown}<sub>0</sub></span>' in html
    assert f'<span class="g0" title="{title}">{shown}</span>' in html


def test_a_line_breaks_at_blanks_only_which_stay_outside_of_the_colour(report):
    html = html_page(report, [])
    assert '> <span class="e1' in html and "<wbr><span" in html and "> The" not in html


def test_a_gap_that_is_unknown_has_no_colour(report):
    report["router"]["examples"][1]["tokens"][0]["gap"] = None
    assert ("", "expert 0, gate 0, gap - nats") in pieces(page_of(report))


def test_colours_are_mixed_with_the_page_for_every_slot_in_both_themes():
    for slot in range(len(EXPERT_COLORS)):
        assert f".e{slot}{{background:color-mix(in srgb,{EXPERT_COLORS[slot]}" in STYLE
    assert len(set(EXPERT_COLORS)) == len(EXPERT_COLORS) == 8


def test_reliability_and_deciles_stand_on_both_pages(report):
    plots = [Plot("reliability", "R", "r", "<svg></svg>", "router"), Plot("gap", "G", "g", "<svg></svg>", "gap")]
    for text in (page_of(report, plots).text, markdown_page(report, plots)):
        for figure in ("0.131", "0.587", "66.1 %", "35,268", "0.0291", "5.347", "4.102", "3.911", "7,054"):
            assert figure in text
        assert "equal size" in text and "regression to the mean" in text and "no teacher" in text


def test_without_a_baseline_the_deciles_say_what_nobody_can_tell(report):
    for found in report["gap"]["deciles"]:
        found["baseline"] = None
    for text in (page_of(report).text, markdown_page(report, [])):
        assert "nobody can tell how much of the change is that" in text
        assert "5.347" in text and "4.102" not in text
    assert "no teacher" not in markdown_page(report, []).split("Gap to the teacher")[1].split("##")[0]


def test_plots_stand_in_their_sections(report):
    sections = (("training", "losses"), ("router", "expert_load"), ("router", "reliability"), ("gap", "gap"))
    html = html_page(report, [Plot(name, name, name, f"<svg>{name}</svg>", section) for section, name in sections])
    places = [html.index(f"<svg>{name}</svg>") for name in ("losses", "gap", "expert_load", "reliability")]
    titles = [html.index(f"<h2>{title}") for title in ("Training", "Where the gap closed", "Student-aware router")]
    assert places == sorted(places) and titles == sorted(titles)
    assert titles[0] < places[0] < titles[1] < places[1] < titles[2] < places[2]


def test_a_report_from_before_these_figures_still_renders(report):
    for key in ("gap", "passages", "samples"):
        del report[key]
    for key in ("by_frequency", "by_position"):
        del report["retention"][key]
    for key in NEW_KEYS:
        del report["router"][key]
    page = page_of(report)
    assert "Expert load on held-out text" in page.text and "kind of token" not in page.text
    assert "The router in the text" not in page.text and "Where the gap closed" not in page.text
    assert "Reliability" not in markdown_page(report, []) and "decile" not in markdown_page(report, [])


def test_figures_that_are_null_leave_their_parts_out(report):
    report["gap"]["deciles"] = None
    report["router"] |= dict.fromkeys(NEW_KEYS)
    text = page_of(report).text
    assert "None" not in text and "Where the gap closed" not in text and "calibration" not in text
    report["router"] = dict.fromkeys(report["router"])
    report["student_aware_teacher"] = {"bits_per_byte": None}
    assert "Student-aware router" not in page_of(report).text


def test_a_router_whose_loads_broke_does_not_break_the_page(report):
    report["router"]["token_classes"][0]["expert_load"] = [None, None, None]
    report["router"]["reliability"][0]["observed"] = None
    assert "None" not in page_of(report).text
