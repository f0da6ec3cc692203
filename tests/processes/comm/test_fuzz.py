"""Random sequences on every way that messages and meetings go; `make fuzz` plays many more."""

import fuzz
import numpy as np
import pytest

import ringfold
from ringfold import Communicator, Settings

WAYS = {
    "default": ({}, 45),
    "staged": ({"cma": False}, 30),
    "messages": ({"shared": False}, 30),
    "plain messages": ({"shared": False, "compiled": False, "segment_bytes": 5000}, 20),
}


@pytest.mark.limit(200)  # on a new machine it compiles a kernel per type and operation
@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", WAYS)
def test_random_sequences_equal_numpy(comm: Communicator, way: str) -> None:
    changes, count = WAYS[way]
    first = 10_000 * comm.size  # other sequences for every number of ranks
    settings = Settings(timeout=20.0, **changes)
    with fuzz.small_limits(), ringfold.Communicator(settings=settings) as other:
        player = fuzz.Player(other)
        for seed in range(first, first + count):
            player.play(seed)
        player.close()


def test_a_wrong_element_is_found_and_the_seed_is_told(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = comm.size
    step = fuzz.Step(
        index=0,
        operation="allreduce",
        group=fuzz.groups_of(size)[0],
        dtype="int32",
        op="sum",
        shape=(5,),
        root=0,
        peer=0,
        tag=0,
        kinds=("plain",) * size,
        waits=("at once",) * size,
        naps=(0.0,) * size,
        planned=(False,) * size,
        algorithm=None,
        repeats=1,
    )
    monkeypatch.setattr(fuzz, "sequence", lambda seed, size: [step])
    player = fuzz.Player(comm)
    player.play(3)
    honest = comm.allreduce

    def wrong(x: np.ndarray, op: str) -> np.ndarray:
        honest(x, op)
        x[4] += 1
        return x

    monkeypatch.setattr(comm, "allreduce", wrong)
    with pytest.raises(AssertionError) as caught:
        player.play(3)
    assert "--first 3 --count 1" in caught.value.__notes__[-1]
    player.close()
