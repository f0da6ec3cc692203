"""Actions print, parse back and know what they wait for."""

import pytest

from ringfold.parallel.actions import Action, Kind, parse_actions


def test_text_form_round_trips():
    text = "F0 F1 B0 F12 B1 B12"
    actions = parse_actions(text, stage=2)
    assert " ".join(map(str, actions)) == text
    assert actions[2] == Action(Kind.BACKWARD, 0, stage=2)
    assert {action.stage for action in actions} == {2}


@pytest.mark.parametrize("word", ["G0", "F", "F-1", "B1x", "f0", "0F"])
def test_parse_names_the_bad_word(word):
    with pytest.raises(ValueError, match=f"stage 1, word 1: .*{word}"):
        parse_actions(f"F0 {word}", stage=1)


def needs(word, stage, num_stages):
    (action,) = parse_actions(word, stage)
    return {(str(need), need.stage) for need in action.needs(num_stages)}


def test_needs_at_the_ends_and_in_the_middle():
    assert needs("F3", 0, 3) == set()
    assert needs("F3", 1, 3) == {("F3", 0)}
    assert needs("B3", 1, 3) == {("F3", 1), ("B3", 2)}
    assert needs("B3", 2, 3) == {("F3", 2)}
