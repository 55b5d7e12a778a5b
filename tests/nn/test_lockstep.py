"""Passes that wait for each other."""

from __future__ import annotations

import threading

import pytest

from amct_pytorch.nn.lockstep import Lockstep


def test_every_layer_is_solved_once_with_what_all_passes_bring_in_their_order() -> None:
    solved: list[tuple[str, list[int]]] = []
    steps: Lockstep[int] = Lockstep("abc", lambda name, items: solved.append((name, list(items))))
    after: list[str] = []

    def walk(number: int) -> None:
        for name in "abc":
            steps.arrive(name, lambda: number)
            # Whoever goes on finds the layer solved.
            assert solved[-1][0] == name
            after.append(f"{name}{number}")

    steps.run([lambda i=i: walk(i) for i in range(3)])
    assert solved == [("a", [0, 1, 2]), ("b", [0, 1, 2]), ("c", [0, 1, 2])]
    assert after == [f"{name}{i}" for name in "abc" for i in range(3)]


def test_passes_that_take_different_ways_do_not_wait_for_each_other() -> None:
    solved: list[tuple[str, list[str]]] = []
    steps: Lockstep[str] = Lockstep("abc", lambda name, items: solved.append((name, list(items))))

    def walk(way: str) -> None:
        for name in way:
            steps.arrive(name, lambda: way)

    steps.run([lambda way=way: walk(way) for way in ("ac", "bc", "c", "")])
    assert solved == [("a", ["ac"]), ("b", ["bc"]), ("c", ["ac", "bc", "c"])]


def test_a_layer_that_is_reached_late_is_not_solved_again() -> None:
    solved: list[str] = []
    steps: Lockstep[None] = Lockstep("ab", lambda name, _: solved.append(name))

    def walk(way: str) -> None:
        for name in way:
            steps.arrive(name, lambda: None)

    steps.run([lambda: walk("a"), lambda: walk("ba")])
    assert solved == ["a", "b"]


@pytest.mark.parametrize("where", ["pass", "solve"])
def test_an_error_ends_all_passes(where: str) -> None:
    before = threading.active_count()

    def solve(name: str, _: object) -> None:
        if where == "solve":
            raise KeyError(name)

    steps: Lockstep[None] = Lockstep("ab", solve)
    ended: list[int] = []

    def walk(number: int) -> None:
        try:
            steps.arrive("a", lambda: None)
            if number == 1 and where == "pass":
                raise KeyError("a")
            steps.arrive("b", lambda: None)
        finally:
            ended.append(number)

    with pytest.raises(KeyError):
        steps.run([lambda i=i: walk(i) for i in range(4)])
    assert sorted(ended) == [0, 1, 2, 3]
    assert threading.active_count() == before
