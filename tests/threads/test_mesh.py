"""A mesh has its stages on neighbouring ranks, and says what does not fit."""

import numpy as np
import pytest

from ringfold import Mesh, run_local


@pytest.mark.parametrize(("data", "pipe"), [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (3, 2)])
def test_layout(data, pipe):
    def main(comm):
        with Mesh(comm, data=data, pipe=pipe) as mesh:
            assert mesh.shape == (data, pipe)
            assert mesh.rank_at(*mesh.coordinates) == comm.rank
            stages = mesh.pipe.allgather(np.array([comm.rank]))[:, 0].tolist()
            replicas = mesh.data.allgather(np.array([comm.rank]))[:, 0].tolist()
            return mesh.coordinates, stages, replicas

    for rank, (coordinates, stages, replicas) in enumerate(run_local(data * pipe, main)):
        assert coordinates == divmod(rank, pipe)
        first = rank - rank % pipe
        assert stages == list(range(first, first + pipe))
        assert replicas == list(range(rank % pipe, data * pipe, pipe))


def test_without_data_as_many_replicas_as_fit():
    assert run_local(4, lambda comm: Mesh(comm, pipe=2).shape) == [(2, 2)] * 4


@pytest.mark.parametrize(
    ("data", "pipe", "shown"),
    [
        (2, 2, "data=2 x pipe=2 does not fit 3 ranks"),
        (None, 2, "data=ranks / pipe x pipe=2 does not fit 3 ranks"),
        (-1, -3, "data=-1 x pipe=-3 does not fit 3 ranks"),
        (3, 0, "data=3 x pipe=0 does not fit 3 ranks"),
    ],
)
def test_a_misfit_is_refused_on_every_rank(data, pipe, shown):
    def main(comm):
        with pytest.raises(ValueError, match=shown):
            Mesh(comm, data=data, pipe=pipe)
        return True

    assert run_local(3, main) == [True] * 3


@pytest.mark.parametrize("place", [(2, 0), (0, 2), (-1, 0)])
def test_coordinates_outside(place):
    def main(comm):
        with pytest.raises(IndexError, match="outside of the mesh of 2 x 2"):
            Mesh(comm, data=2, pipe=2).rank_at(*place)

    run_local(4, main)


def test_a_rank_that_fails_within_does_not_close_it_with_the_others(monkeypatch):
    closed = []
    monkeypatch.setattr(Mesh, "close", lambda mesh: closed.append(mesh.data.rank))

    def main(comm):
        with pytest.raises(KeyError), Mesh(comm):
            raise KeyError(comm.rank)
        with Mesh(comm):
            pass

    run_local(2, main)
    assert sorted(closed) == [0, 1]
