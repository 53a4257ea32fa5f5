import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.report.chart import WIDTH, Panel, chart, log_ticks, tick_text, ticks
from distill_trainer.report.marks import Line

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


def drawn(panels, **options):
    return ElementTree.fromstring(chart(panels, "what it shows", **options))


def curves(root):
    """Coordinates of every line over the axes, not of those in the legend."""
    paths = [path.get("d") for path in root.iter("path") if path.get("class") == "line" and "h18" not in path.get("d")]
    return [[tuple(map(float, pair.split())) for pair in re.split("[ML]", d)[1:]] for d in paths]


def texts(root):
    return [text.text for text in root.iter("text")]


def test_points_lie_where_their_values_are():
    root = drawn([Panel([Line("a", [(0, 1.0), (5, 3.0), (10, 2.0)], "red")])])
    ((left, low), (middle, high), (right, between)) = curves(root)[0]
    assert middle - left == pytest.approx(right - middle, abs=0.11)
    # The vertical axis grows upwards.
    assert high < between < low and between - high == pytest.approx(low - between, abs=0.11)


def test_a_tick_stands_at_its_value():
    root = drawn([Panel([Line("", [(0, 0.0), (4, 100.0)], "red")], from_zero=True)])
    (_, bottom), (_, top) = curves(root)[0]
    grid = [float(path.get("d").split()[1].split("H")[0]) for path in root.iter("path") if path.get("class") == "grid"]
    values = [float(text) for text in texts(root)[: len(grid)]]
    assert values[0] == 0 and len(values) >= 3
    for y, value in zip(grid, values, strict=True):
        assert y == pytest.approx(bottom + (top - bottom) * value / 100, abs=0.2)


def test_equal_factors_are_equally_far_apart_on_a_logarithmic_axis():
    root = drawn([Panel([Line("", [(0, 0.1), (1, 1.0), (2, 10.0)], "red")], log=True)])
    (_, a), (_, b), (_, c) = curves(root)[0]
    assert a - b == pytest.approx(b - c, abs=0.11) and a > b > c
    assert {"0.1", "1.0", "10.0"} <= set(texts(root))


def test_a_line_is_broken_where_there_is_no_value_and_a_lonely_point_stays_visible():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None)]
    root = drawn([Panel([Line("", points, "red")])])
    assert [len(curve) for curve in curves(root)] == [2]
    assert len(list(root.iter("circle"))) == 1


def test_steps_hold_their_value_until_the_next():
    svg = chart([Panel([Line("", [(0, 1.0), (1, 2.0)], "red", steps=True)])], "")
    assert re.search(r'class="line" [^>]*d="M[\d. ]+H[\d.]+V[\d.]+"', svg)


def test_stacked_areas_fill_the_axes():
    lines = [Line(name, [(0, share), (1, share)], "red") for name, share in (("a", 0.25), ("b", 0.75))]
    root = drawn([Panel(lines, stacked=True, percent=True)])
    areas = [path.get("d") for path in root.iter("path") if path.get("d").endswith("z")]
    heights = []
    for area in areas:
        ys = [float(pair.split()[1]) for pair in re.split("[ML]", area.rstrip("z"))[1:]]
        heights.append(max(ys) - min(ys))
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3) and {"0 %", "100 %"} <= set(texts(root))


def bars(root):
    """Left, right, lower and upper end of every bar, line by line."""
    shapes = [path.get("d") for path in root.iter("path") if path.get("d").endswith("z")]
    ends = [re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+z", shape) for shape in shapes]
    return [[tuple(map(float, (left, right, low, high))) for left, low, right, high in line] for line in ends]


def test_a_stack_of_one_value_is_a_bar_over_its_tick():
    lines = [Line(name, [(20, share)], "red") for name, share in (("a", 0.25), ("b", 0.75))]
    root = drawn([Panel(lines, stacked=True, percent=True)])
    ((left, right, bottom, middle),), ((_, _, start, top),) = bars(root)
    assert right - left > 200 and start == middle and middle - top == pytest.approx(3 * (bottom - middle), abs=0.3)
    (tick,) = [text for text in root.iter("text") if text.get("text-anchor") == "middle"]
    assert tick.text == "20" and float(tick.get("x")) == pytest.approx((left + right) / 2, abs=0.1)


def test_a_line_of_one_value_is_a_point_over_its_tick():
    root = drawn([Panel([Line("", [(20, 0.4)], "red")], from_zero=True)])
    (tick,) = [text for text in root.iter("text") if text.get("text-anchor") == "middle"]
    (point,) = root.iter("circle")
    assert tick.text == "20" and 100 < float(point.get("cx")) == float(tick.get("x"))


@pytest.mark.parametrize("values", [[0, 1, 2, 3], [1, 11], [26, 27], list(range(48))])
def test_slots_hold_bars_and_points_that_stand_over_each_other_and_apart_from_their_neighbours(values):
    shares = Line("a", [(x, 0.5) for x in values], "red")
    root = drawn([Panel([shares], stacked=True, percent=True, slots=True)])
    (found,) = bars(root)
    points = Line("", [(x, 0.5) for x in values], "red", marker="dot")
    over = drawn([Panel([points, Line("", [(values[0], 1.0)], "red")], percent=True, from_zero=True, slots=True)])
    assert len(found) == len(values)
    assert all(after[0] > before[1] + 1 for before, after in zip(found, found[1:], strict=False))
    centres = [(left + right) / 2 for left, right, _, _ in found]
    assert [float(circle.get("cx")) for circle in over.iter("circle")][: len(values)] == pytest.approx(
        centres, abs=0.2
    )
    _, _, width, _ = map(float, root.get("viewBox").split())
    assert found[0][0] > 30 and found[-1][1] < width


def test_markers_say_their_value_and_the_legend_names_every_line():
    lines = [Line("x & y", [(1, 2.5)], "red", marker="dot"), Line("level", [(0, 1.0), (2, 1.0)], "blue", dashes="4 2")]
    root = drawn([Panel(lines, title="a < b", x_label="step")])
    assert [title.text for title in root.iter("title")] == ["x & y: 2.5 at 1"]
    assert {"x & y", "level", "a < b", "step"} <= set(texts(root))
    assert root.get("aria-label") == "what it shows" and root.get("role") == "img"


def test_names_stand_in_place_of_numbers():
    root = drawn([Panel([Line("", [(1, 1.0), (2, 2.0), (3, 3.0)], "red")], x_names=["few", "some", "many"])])
    places = {text.text: float(text.get("x")) for text in root.iter("text") if text.get("text-anchor") == "middle"}
    assert list(places) == ["few", "some", "many"]
    assert [x for x, _ in curves(root)[0]] == pytest.approx(list(places.values()), abs=0.11)


def test_marks_stand_inside_the_axes_only():
    panel = Panel([Line("", [(10, 1.0), (20, 2.0)], "red")])
    root = drawn([panel], marks=[5, 15, 20])
    assert [path.get("class") for path in root.iter("path")].count("mark") == 1


@settings(deadline=None, max_examples=60)
@given(low=NUMBERS, size=st.floats(1e-6, 1e9), count=st.integers(2, 8), whole=st.booleans())
def test_ticks_are_few_even_and_inside(low, size, count, whole):
    high = low + size
    found = ticks(low, high, count, whole=whole)
    assert len(found) <= count + 1
    air = 1e-6 * max(abs(low), abs(high), size, 0.1 * whole)
    assert all(low - air <= value <= high + air for value in found)
    assert not whole or all(value == round(value) for value in found)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(NUMBERS, min_size=1, max_size=9), flags=st.sampled_from(["", "from_zero", "x_from_zero"]))
def test_any_values_are_drawn_inside_the_chart(values, flags):
    values = [abs(value) for value in values] if flags else values
    panel = Panel([Line("all", list(enumerate(values)), "red", marker="dot")], **({flags: True} if flags else {}))
    root = drawn([panel])
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == WIDTH
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= width and 0 <= float(circle.get("cy")) <= height


def test_ticks_have_as_many_decimals_as_they_need():
    assert [tick_text(value, [0.25, 0.5]) for value in (0.25, 0.5)] == ["0.25", "0.50"]
    assert tick_text(2000, [1000, 2000]) == "2,000" and tick_text(0.3, [0.3], percent=True) == "30 %"
    assert log_ticks(0.09, 1.1) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert log_ticks(1e-3, 1e3) == pytest.approx([10.0**power for power in range(-3, 4)])
    assert ticks(3.0, 3.0, 4) == [3.0]
