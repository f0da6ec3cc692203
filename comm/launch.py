"""Run ranks as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from .arguments import require_callable, whole
from .communicator import Communicator
from .errors import PeerLost
from .settings import Settings
from .transport.local import LocalTransport, World

Result = TypeVar("Result")


def run_local(
    size: int, main: Callable[[Communicator], Result], *, settings: Settings | None = None
) -> list[Result]:
    """Call main(comm) on `size` ranks, each a thread of this process; needs no MPI.

    Returns: what main returned, by rank.
    Raises: what main raised on the rank that failed first; the others get PeerLost where they wait
    for it. ValueError for a size below 1; TypeError for another that is no whole number.
    """
    size = whole("size", size, 1)
    require_callable("main", main)
    world = World(size)
    results: dict[int, Result] = {}
    errors: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        try:
            with Communicator.over(
                LocalTransport(world, tuple(range(size)), rank), settings
            ) as comm:
                results[rank] = main(comm)
            world.lose(rank, "its main has returned", failed=False)
        except BaseException as error:
            errors.append((rank, error))
            world.lose(rank, f"it failed with {type(error).__name__}: {error}", failed=True)

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # A lost peer is the consequence of another rank's failure, which says more.
        first = next((pair for pair in errors if not isinstance(pair[1], PeerLost)), errors[0])
        first[1].add_note(f"raised on rank {first[0]} of {size}")
        raise first[1]
    return [results[rank] for rank in range(size)]
