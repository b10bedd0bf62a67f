"""What is learned from who came back: which request was continued, where they part, and which kinds return."""

from __future__ import annotations

from triptych.cache.history import KINDS, REACH, Chances, Forks, Return, Visits, kind_of
from triptych.config import PAGE


def keys(*parts: tuple[str, int]) -> list[bytes]:
    """Page keys of a prompt that is made of stretches: (name, pages). A key names all before it, too."""
    out, prefix = [], b""
    for name, pages in parts:
        for page in range(pages):
            prefix += f"{name}{page}.".encode()
            out.append(prefix)
    return out


def left(visits: Visits, pages: list[bytes], prompt: int, start: int = 0, *, now: float = 0.0, turn: int = 0) -> None:
    visits.left(pages, start, prompt, 7, turn, now)


def test_a_next_turn_is_found_with_its_pause_and_where_it_parts() -> None:
    visits = Visits()
    left(visits, keys(("a", 10), ("out", 3)), prompt=10, now=5.0, turn=2)
    whole = visits.came(keys(("a", 10), ("out", 3), ("more", 2)), now=65.0)
    assert whole == Return(60.0, distance=-3, at_end=True, kind=7, turn=2)
    inside = visits.came(keys(("a", 10), ("out", 1), ("other", 2)), now=65.0)
    assert inside is not None and (inside.distance, inside.at_end) == (-1, False)
    before = visits.came(keys(("a", 8), ("edited", 4)), now=65.0)
    assert before is not None and (before.distance, before.at_end) == (2, False)


def test_the_latest_of_those_it_shares_with_is_the_one_it_continues() -> None:
    """Turn two holds all of turn one; turn three continues turn two."""
    visits = Visits()
    left(visits, keys(("a", 4), ("x", 1)), prompt=4, now=1.0)
    left(visits, keys(("a", 4), ("x", 1), ("b", 30)), prompt=35, start=5, now=2.0, turn=1)
    back = visits.came(keys(("a", 4), ("x", 1), ("b", 30), ("c", 2)), now=3.0)
    assert back is not None and back.turn == 1 and back.pause == 1.0


def test_strangers_and_forks_far_from_the_end_continue_nobody() -> None:
    visits = Visits()
    left(visits, keys(("a", 100)), prompt=100)
    assert visits.came(keys(("b", 100)), now=1.0) is None
    assert visits.came(keys(("a", 100 - REACH), ("edited", 3)), now=1.0) is None
    assert visits.came([], now=1.0) is None


def test_old_visits_are_forgotten_first() -> None:
    visits = Visits(limit=2)
    for name in "abc":
        left(visits, keys((name, 3)), prompt=3)
    assert visits.came(keys(("a", 3)), 1.0) is None
    assert visits.came(keys(("b", 3)), 1.0) is not None


def test_every_request_is_of_some_kind_and_turns_differ() -> None:
    kinds = {
        kind_of(turn, pages, output) for turn in range(40) for pages in (0, 1, 9, 9000) for output in (0, 99, 9999)
    }
    assert min(kinds) >= 0 and max(kinds) < KINDS
    assert kind_of(0, 9, 99) != kind_of(1, 9, 99) != kind_of(9, 9, 99)


def test_chances_follow_what_came_back_and_begin_with_the_turn() -> None:
    chances = Chances()
    first, later = kind_of(0, 9, 99), kind_of(9, 9, 99)
    assert chances.of(first) < chances.mean < chances.of(later)
    for _ in range(300):
        chances.left(1)
        chances.left(2)
        chances.back(2, 1.0)
    assert chances.of(2) > 0.9 and chances.of(1) < 0.05
    assert 0.4 < chances.mean < 0.6
    for _ in range(3000):
        chances.left(2)
    assert chances.of(2) < 0.2, "it does not learn any more"


def test_rungs_stand_where_prompts_part() -> None:
    forks = Forks()
    for _ in range(400):
        forks.add(Return(60.0, distance=3, at_end=False, kind=0, turn=0))
    rungs = forks.rungs(3000.0)
    assert next(iter(rungs)) == 3
    assert rungs[3] > 2000.0 and sum(saved for at, saved in rungs.items() if at != 3) < 500.0


def test_one_rung_serves_forks_behind_it_and_a_second_pays_if_they_lie_far_apart() -> None:
    forks = Forks()
    for _ in range(400):
        forks.add(Return(60.0, distance=0, at_end=True, kind=0, turn=0))
        forks.add(Return(60.0, distance=12, at_end=False, kind=0, turn=0))
    rungs = forks.rungs(3000.0)
    assert {0, 12} <= set(rungs) and rungs[12] > rungs[0] > 0.0
    assert rungs[0] <= 13 * PAGE


def test_the_end_of_an_output_matters_as_far_as_outputs_are_continued() -> None:
    into, never = Forks(), Forks()
    for _ in range(400):
        into.add(Return(60.0, distance=-2, at_end=True, kind=0, turn=0))
        never.add(Return(60.0, distance=1, at_end=False, kind=0, turn=0))
    assert into.into_output > 0.9 and never.into_output < 0.05
    assert into.end_worth(3000.0, 500) > 400.0 > 20.0 > never.end_worth(3000.0, 500)
