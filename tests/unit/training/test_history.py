"""What a training says about the head that it trained."""

from __future__ import annotations

from nformer_edge.training.history import Best, Stage, head_notes


def stages(backbone_map, best):
    head = Stage((), None if best is None else Best(1, best), 1.0, backbone_map=backbone_map)
    return {"backbone": Stage((), None, 1.0), "head": head}


def test_a_head_by_which_held_out_people_lose_is_said():
    (note,) = head_notes(stages(0.917, 0.677))
    assert "held-out people lose by the head: mAP 91.7 by the backbone alone, 67.7 with it" in note
    assert "--no-head" in note


def test_a_head_by_which_they_gain_is_not():
    assert head_notes(stages(0.8, 0.85)) == ()


def test_a_head_that_nobody_was_held_out_for_is_not_known_to_help():
    assert "--holdout 0.1" in head_notes(stages(None, None))[0]
    assert head_notes({"backbone": Stage((), None, 1.0)}) == ()
