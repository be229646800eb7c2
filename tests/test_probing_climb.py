"""What is said of the ladder's rungs."""

from autoaccum.probing.climb import Tried, told

MIB = 2**20
SHOWN = {
    "cheap": Tried("cheap", 9 * MIB),
    "middle": Tried("middle", 5 * MIB, fits=True),
    "dear": Tried("dear", 3 * MIB, fits=True),
    "broken": Tried("broken", obstacle="cannot be run, ValueError: no"),
    "gone": Tried("gone"),
    "gone too": Tried("gone too"),
}


def test_the_text_names_each_rung_with_its_peak_and_the_cheapest_that_fits():
    text = told(SHOWN[name] for name in ("cheap", "broken", "middle", "dear"))
    assert "cheap: does not fit, at 9.0 MiB; broken: cannot be run, ValueError: no; middle: fits, at 5.0 MiB" in text
    assert text.endswith('ladder="auto" takes middle, the cheapest that fits')


def test_what_a_whole_probe_showed_is_in_the_text_and_in_the_row():
    probed = {"limit": 14, "micro_batch": 8, "peak_bytes": 4 * MIB, "window_seconds": 0.5, "saver": None}
    tried = Tried("dear", 3 * MIB, fits=True, probed=probed)
    assert tried.text == "fits, at 3.0 MiB, and 14 samples at once"
    assert tried.row == {**probed, "saver": "dear", "same_result": True, "obstacle": "fits"}
    unsaid = Tried("dear", 3 * MIB, fits=True, probed={**probed, "peak_bytes": None})
    assert unsaid.row["peak_bytes"] == 3 * MIB


def test_rungs_with_the_same_answer_share_a_clause_and_none_that_fits_is_said():
    text = told([SHOWN["gone"], SHOWN["gone too"]])
    assert "gone, gone too: ran out of memory" in text
    assert text.endswith("None of them is enough")


def test_what_is_taken_by_name_only_is_said_apart_from_what_auto_takes():
    named = Tried("optimizer_on_host", MIB, fits=True)
    assert told([named]).endswith('Only where it is asked for: ladder="optimizer_on_host"')
    both = told([SHOWN["cheap"], named, SHOWN["dear"]])
    assert both.endswith('ladder="optimizer_on_host". ladder="auto" takes dear, the cheapest that fits')
    assert [each.row["obstacle"] for each in (SHOWN["cheap"], SHOWN["gone"], SHOWN["dear"], named)] == [
        "does not fit", "ran out of memory", "fits", "fits; by name only"
    ]  # fmt: skip
