"""Taking turns: the order, what is measured, and the arithmetic of ratios. No real clock is read."""

from __future__ import annotations

import pytest

from normconv.numerics import peak_memory, quartiles, ratios_by_turn, take_turns


class Clock:
    """Time that passes only where a work or a pause says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append("pause")
        self.now += seconds

    def work(self, name: str, *seconds: float):
        """Return a work that takes these seconds, one call after the other; the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_works_take_turns_in_an_order_that_is_turned_round() -> None:
    clock = Clock()
    works = [clock.work(name, 1.0) for name in "abc"]
    take_turns(works, seconds=0.0, least=3, clock=clock, sleep=clock.sleep)
    assert "".join(clock.log) == "abc" + "cba" + "abc"


def test_calls_before_the_measured_ones_are_not_counted() -> None:
    clock = Clock()
    work = clock.work("a", 50.0, 1.0, 2.0, 50.0, 3.0, 4.0)
    (turns,) = take_turns(
        [work],
        seconds=0.0,
        least=2,
        calls=2,
        unmeasured=1,
        pause=7.0,
        clock=clock,
        sleep=clock.sleep,
    )
    assert turns == [[1.0, 2.0], [3.0, 4.0]]
    assert clock.log == ["pause", "a", "a", "a"] * 2


def test_no_round_is_begun_after_the_time_is_up_and_each_is_whole() -> None:
    clock = Clock()
    works = [clock.work("a", 1.0), clock.work("b", 2.0)]
    first, second = take_turns(works, seconds=7.0, least=1, clock=clock, sleep=clock.sleep)
    # Rounds begin at 0, 3 and 6 seconds; at 9 the time is up.
    assert first == [[1.0]] * 3
    assert second == [[2.0]] * 3


def test_a_ratio_compares_calls_of_one_turn() -> None:
    """A machine that is twice as slow in the second turn does not show."""
    clock = Clock()
    works = [clock.work("a", 1.0, 2.0, 1.0), clock.work("b", 3.0, 6.0, 3.0)]
    first, second = take_turns(works, seconds=0.0, least=3, clock=clock, sleep=clock.sleep)
    assert ratios_by_turn(second, first) == [3.0, 3.0, 3.0]
    assert ratios_by_turn(first, second) == pytest.approx([1 / 3] * 3)


def test_a_call_that_something_interrupted_does_not_turn_a_ratio() -> None:
    assert ratios_by_turn([[2.0, 100.0, 2.0]], [[1.0, 1.0, 1.0]]) == [2.0]


def test_works_that_took_different_numbers_of_turns_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios_by_turn([[1.0]], [[1.0], [1.0]])


def test_quartiles_are_those_of_the_values_in_order() -> None:
    assert quartiles([9.0, 1.0, 5.0]) == (3.0, 5.0, 7.0)
    assert quartiles([2.5]) == (2.5, 2.5, 2.5)


def test_memory_that_is_given_back_within_still_counts() -> None:
    with peak_memory() as peak:
        block = bytearray(64 << 20)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 <= peak.bytes < 200 << 20


def test_memory_held_before_does_not_count() -> None:
    held = bytearray(64 << 20)
    with peak_memory() as peak:
        pass
    assert held
    assert peak.bytes is None or peak.bytes < 32 << 20


def test_a_system_that_does_not_tell_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normconv.numerics.memory._forget_peak", lambda: False)
    with peak_memory() as peak:
        pass
    assert peak.bytes is None
