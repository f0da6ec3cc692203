"""The clock of GPU benchmarks holds the device busy for longer than the host takes to ask."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
MEMSET, KERNEL, ASKING = 1e-4, 5e-6, 4e-5


class Card:
    """A device whose stream is a number: the time at which all that was put on it has ended."""

    def __init__(self) -> None:
        self.host = self.stream = 0.0

    def put(self, seconds: float, asking: float) -> None:
        self.host += asking
        self.stream = max(self.stream, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.stream)

    def cupy(self) -> Any:
        card = self

        class Event:
            def record(self) -> None:
                card.stream = self.at = max(card.stream, card.host)

            def synchronize(self) -> None:
                card.synchronize()

        runtime = SimpleNamespace(
            memsetAsync=lambda *_: self.put(MEMSET, 1e-6), deviceSynchronize=self.synchronize
        )
        cuda = SimpleNamespace(
            runtime=runtime,
            Event=Event,
            get_elapsed_time=lambda first, last: (last.at - first.at) * 1e3,
        )
        return SimpleNamespace(
            cuda=cuda, empty=lambda *_: SimpleNamespace(data=SimpleNamespace(ptr=64))
        )


def test_the_time_of_the_host_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_clock

    card = Card()
    monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: card.host)
    clock = gpu_clock.Clock(card.cupy())
    found = clock.seconds(lambda: card.put(KERNEL, ASKING))
    assert found == pytest.approx(KERNEL)
    assert clock.seconds(lambda: card.put(10 * KERNEL, ASKING)) == pytest.approx(10 * KERNEL)
