"""Thousands of works in flight at once."""

from ringfold.comm.progress import Progress
from ringfold.comm.transport.local import LocalTransport, World
from ringfold.comm.work import Receipt, Steps, Work


def test_a_start_does_not_advance_all_others_each_time() -> None:
    """4,000 receives posted early took 40 s: each advanced all before it."""
    advanced, count = 0, 1000
    over = False

    def steps() -> Steps:
        nonlocal advanced
        while not over:
            advanced += 1
            yield []

    transport = LocalTransport(World(1), (0,), 0)
    receipt = Receipt("recv", "message", "local", 1, 0)
    progress = Progress(60, threads=False)
    works = [
        progress.start(lambda: Work(steps(), receipt, transport, progress), False)
        for _ in range(count)
    ]
    assert count <= advanced < count**2 / 5  # by chance of the clock; all each time: half of it
    over = True
    for work in works:
        work.wait()
    assert not progress.works
