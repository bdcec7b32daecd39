"""The order of scores, the weights of tiers."""

import pytest

from kvindex_server.score import Weights, ranked

TIERS = ["gpu", "cpu", "disk", "lmcache"]


def test_best_first_ties_in_the_candidates_order_zeros_included() -> None:
    matches = [("c", 0, 2, 2.0, [2, 0], 0), ("a", 1, 1, 1.0, [1], 0), ("d", 0, 2, 2.0, [2], 0)]
    scores = ranked(["z", "a", "d", "c", "y"], matches, TIERS)
    assert [each.pod for each in scores] == ["d", "c", "a", "z", "y"]
    assert [each.score for each in scores] == [2.0, 2.0, 1.0, 0.0, 0.0]
    assert scores[2].rank == 1 and scores[2].matched_blocks == 1


def test_top_k() -> None:
    matches = [("b", 0, 1, 1.0, [1], 0)]
    assert [each.pod for each in ranked(["a", "b", "c"], matches, TIERS, 2)] == ["b", "a"]
    assert len(ranked(["a", "b", "c"], matches, TIERS, 9)) == 3
    assert len(ranked(["a", "b", "c"], matches, TIERS, 0)) == 3


def test_a_candidate_named_twice_is_answered_once() -> None:
    assert [each.pod for each in ranked(["a", "b", "a"], [], TIERS)] == ["a", "b"]


def test_no_candidates() -> None:
    assert ranked([], [], TIERS) == []


def test_tier_blocks_are_named_and_zeros_left_out() -> None:
    (score,) = ranked(["a"], [("a", 0, 5, 4.0, [3, 0, 0, 2], 0)], TIERS)
    assert score.tier_blocks == {"gpu": 3, "lmcache": 2}


def test_an_unknown_tier_weighs_as_the_lowest() -> None:
    weights = Weights({"gpu": 1.0, "cpu": 0.8, "disk": 0.5})
    assert weights.of(TIERS) == [1.0, 0.8, 0.5, 0.5]
    assert weights.unknown(TIERS) == ["lmcache"]
    assert Weights({"gpu": 0.3, "cpu": 0.7}).of(["disk", "cpu"]) == pytest.approx([0.3, 0.7])
