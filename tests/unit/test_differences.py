"""What differs between two configurations, as error messages name it."""

from layerskip.differences import differences


def test_differing_entries_are_named_with_both_values() -> None:
    there = {"seed": 0, "model": "demo", "exits": [1, 2], "top_k": 5}
    assert differences(there, dict(there)) == []
    asked = {"seed": 5, "model": "demo", "exits": [1, 3], "top_k": 5}
    assert differences(there, asked) == ["exits [1, 2], not [1, 3]", "seed 0, not 5"]


def test_an_entry_that_one_side_lacks_differs_from_any_value() -> None:
    assert differences({}, {"seed": 1}) == ["seed None, not 1"]
    assert differences({"seed": 1}, {}) == ["seed 1, not None"]
    assert differences({"seed": None}, {}) == ["seed None, not None"]
