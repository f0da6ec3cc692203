"""The command line judges a user's algorithm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringfold
from ringfold import cli, units
from ringfold.builders import ALL_ROOTS, Builder
from ringfold.cli import MOST_PROVEN, main
from ringfold.comm.text_file import prepare_file
from ringfold.output import CUT_OFF

OWN = """
from dataclasses import replace
from ringfold.comm.algorithms import build
from ringfold.comm.collective import ALLREDUCE
from ringfold.comm.schedule import All, Peers, Round, Schedule, Shift

def around(size):
    return Schedule(ALLREDUCE, size, 1, tuple(
        Round(Shift(1), All(), reduce=True) for _ in range(size - 1)))

def number(size):
    return 5

def powers(size):
    if size & (size - 1):
        raise KeyError("a power of two")
    if size == 8:
        raise SystemExit(0)
    return build("allreduce", "recursive_doubling", size)

def at_root(size, root=0):
    whole = build("broadcast", "tree", size, root)
    return replace(whole, rounds=whole.rounds[:-1]) if root == 2 else whole

def of_roots(size, root):
    return build("broadcast", "tree", size, root)

def of_one(size):
    return build("broadcast", "tree", size)

def of_another(size, root):
    return build("broadcast", "tree", size)

def nothing(size):
    return Schedule(ALLREDUCE, size, 1, ())

class Next(Peers):
    def dst(self, rank, size):
        return rank + 1

    def src(self, rank, size):
        return rank - 1

def beyond(size):
    return Schedule(ALLREDUCE, size, 1, (Round(Next(), All(), True),))

def by_node(size, nodes, root=0):
    return build("reduce", "hierarchical", size, root, nodes)

def of_no_node(size, root, nodes):
    raise KeyError(nodes.size)

variable = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def test_a_built_in_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "allreduce:ring", "--sizes", "2-9,16"]) == 0
    assert (
        "allreduce:ring: proven for 9 sizes (9 schedules, 2 to 16 ranks)" in capsys.readouterr().out
    )
    assert main(["verify", "broadcast:tree", "--sizes", "1-3"]) == 0
    assert "(6 schedules" in capsys.readouterr().out


def test_a_broken_one_is_refused(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{own}:around", "--sizes", "2-4"]) == 1
    out = capsys.readouterr().out
    assert "refused: size 3: round 1, rank 1, chunk 0: would add the contribution of rank 0" in out
    assert "refused for 2 of 3 sizes" in out


def test_a_function_that_fails_for_one_size_is_judged_for_the_others(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"{own}:powers", "--sizes", "2-5"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "raised KeyError: 'a power of two', at own.py:1" in out[0]
    assert out[0].startswith("refused: size 3: ") and out[1].startswith("refused: size 5: ")
    assert out[2].endswith("refused for 2 of 4 sizes")
    assert main(["verify", f"{own}:powers", "--sizes", "8"]) == 1
    assert "powers(8) raised SystemExit: 0, at own.py:" in capsys.readouterr().out
    assert main(["simulate", f"{own}:powers", "--ranks", "3"]) == 1
    assert "powers(3) raised KeyError" in capsys.readouterr().out


def test_a_function_of_roots_is_judged_for_all_of_them(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"{own}:at_root", "--sizes", "2-4"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("refused: size 3, root 2: ") and "refused for 2 of 3 sizes" in out
    assert main(["verify", f"{own}:of_roots", "--sizes", "2-4"]) == 0
    assert "(9 schedules, 2 to 4 ranks)" in capsys.readouterr().out
    assert main(["verify", f"{own}:of_one", "--sizes", "2-4"]) == 0
    assert "; for one root alone, as the function takes no `root`" in capsys.readouterr().out
    assert main(["verify", f"{own}:of_another", "--sizes", "2"]) == 1
    assert "of_another(2, root=1) returned a schedule for root 0" in capsys.readouterr().out
    assert Builder(lambda size, root: None, roots=True).roots_of(5) == [*range(5)]  # type: ignore
    many = Builder(lambda size, root: None, roots=True).roots_of(1000)  # type: ignore
    assert len(many) == ALL_ROOTS and (many[0], many[-1]) == (0, 999)


@pytest.mark.parametrize(
    "command", ["verify allreduce:ring --sizes 2-9 --draw", "simulate allreduce:ring"]
)
def test_a_reader_that_has_enough_ends_it_quietly(command: str) -> None:
    script = f"import sys; from ringfold.cli import main; sys.exit(main({command.split()!r}))"
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (CUT_OFF, b"")


@pytest.mark.parametrize(
    "output, status, told",
    [
        ("/dev/full", 1, "ringfold: the output cannot be written: No space left on device\n"),
        ("&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written_ends_it_in_a_line(
    output: str, status: int, told: str
) -> None:
    """A traceback."""
    command = f'"{sys.executable}" -m ringfold simulate allreduce:ring >{output}'
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (status, told)


def test_rounds_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "allreduce:ring", "--sizes", "3", "--draw"])
    assert "0: 0>1:0+ 1>2:1+ 2>0:2+" in capsys.readouterr().out


def test_a_hundred_thousand_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "simulate allreduce:ring --ranks 100000 --nbytes 1GiB --latency 5us --bandwidth 25GB/s"
    )
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "199998" in out and "1.086 s" in out and "(simulated)" in out


def test_what_is_priced_is_proven_where_it_is_small(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An allreduce without rounds took 0 ns; of a rank beyond the last there was a traceback."""
    assert main(["simulate", f"{own}:nothing", "--ranks", str(MOST_PROVEN)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("refused: size 64: rank 0, chunk 0: ends without the contribution of ")
    for many in (3, MOST_PROVEN + 1):
        for nodes in ("1", "2"):
            words = ["--ranks", str(many), "--ranks-per-node", nodes]
            assert main(["simulate", f"{own}:beyond", *words]) == 1
            said = f"round 0, rank {many - 1}: sends to rank {many} of {many}"
            assert capsys.readouterr().out == f"refused: size {many}: {said}\n"
    for name, many, proven in (
        (f"{own}:around", 2, True),
        (f"{own}:around", MOST_PROVEN + 1, False),
        ("allreduce:ring", MOST_PROVEN + 1, True),
    ):
        assert main(["simulate", name, "--ranks", str(many)]) == 0
        assert ("not proven, above 64 ranks" in capsys.readouterr().out) is not proven


def test_a_price_that_takes_long_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "LONG_SECONDS", 8 * 14 * cli.RANK_SECONDS)
    assert main(["simulate", "broadcast:ring", "--ranks", "8"]) == 0
    assert "14 of 14 rounds differ and are priced one by one" in capsys.readouterr().err
    assert main(["simulate", "allreduce:pairwise", "--ranks", "8"]) == 0
    assert capsys.readouterr().err == ""


def test_node_groups_follow_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    command = "simulate allreduce:hierarchical --ranks 64 --ranks-per-node 8"
    assert main(command.split()) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["rounds:", "28"]


def test_a_function_of_ones_own_may_depend_on_the_nodes(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lacked an argument, whatever was said of nodes."""
    assert main(["verify", f"{own}:by_node", "--sizes", "2-7"]) == 0
    capsys.readouterr()
    mine, built_in = [], []
    for found, name in ((mine, f"{own}:by_node"), (built_in, "reduce:hierarchical")):
        for words in ("--ranks-per-node 4", "--ranks-per-node 4 --map-by node", ""):
            assert main(["simulate", name, "--ranks", "16", *words.split()]) == 0
            out = capsys.readouterr().out
            found.append([line for line in out.splitlines() if "(simulated)" in line])
    assert mine == built_in and mine[0] != mine[2]
    assert main(["verify", f"{own}:of_no_node", "--sizes", "4"]) == 1
    told = "of_no_node(4, root=0, nodes=2 nodes of 2) raised KeyError"
    assert told in capsys.readouterr().out


def test_ranks_may_lie_round_robin(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight messages leave a node at once then, where one does among neighbours."""
    command = "simulate allreduce:ring --ranks 32 --ranks-per-node 8 --latency 0 --nbytes 32MiB"
    took = []
    for way in ("slot", "node"):
        assert main([*command.split(), "--map-by", way, "--bandwidth", "1GB/s"]) == 0
        found = re.search(r"time \(simulated\): +([0-9.]+) ms", capsys.readouterr().out)
        assert found is not None
        took.append(float(found[1]))
    assert took == [65.01, 520.1]
    command = "simulate allreduce:hierarchical --ranks 64 --ranks-per-node 8 --map-by node"
    assert main(command.split()) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["rounds:", "28"]


def test_a_barrier_sends_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "barrier:dissemination", "--ranks", "64", "--latency", "5us"]) == 0
    out = capsys.readouterr().out
    assert "30 us" in out and out.splitlines()[4].split()[-1] == "0"


def test_a_file_may_import_what_lies_beside_it(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "user.py").write_text("from own import around as again\n")
    assert main(["verify", f"{tmp_path / 'user.py'}:again", "--sizes", "2"]) == 0


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "\nx = int('abc')",
            "ValueError: invalid literal for int() with base 10: 'abc', at bad.py:2",
        ),
        ("def f(size)\n    pass", "SyntaxError: expected ':', at bad.py:1"),
        (
            "import no_such_module",
            "ModuleNotFoundError: No module named 'no_such_module', at bad.py:1",
        ),
        ("import helper_of_it", "OSError: none, at helper_of_it.py:2"),
        (
            "import numpy as np\nnp.stack([])",
            "ValueError: need at least one array to stack, at bad.py:2",
        ),
        ("import sys\nsys.exit(0)", "SystemExit: 0, at bad.py:2"),
        (
            OWN + "\nSchedule(ALLREDUCE, 0, 1, ())",
            "ScheduleError: expected size >= 1 and num_chunks",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(
    text: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ValueError was shown alone, others as tracebacks; a file that exits was as if proven."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "helper_of_it.py").write_text("\nraise OSError('none')\n")
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert main(["verify", f"{path}:f", "--sizes", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"ringfold: {path} cannot be imported: {told}")


def test_where_a_table_cannot_be_written_is_known_before_it_is_measured(tmp_path: Path) -> None:
    assert prepare_file(tmp_path / "new" / ".tuning.1") == ""
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert "file" in prepare_file(tmp_path / "file" / ".tuning.1")


@pytest.mark.parametrize(
    "command, text",
    [
        ("verify ring", "expected FILE.py:FUNCTION or COLLECTIVE:NAME, got 'ring'"),
        ("verify allreduce:foo", "there is: ring"),
        ("verify nowhere.py:f", "no file nowhere.py"),
        (f"verify {'x' * 300}.py:f", "no file xxx"),
        ("verify OWN:missing", "has no function 'missing'"),
        ("verify OWN:variable", "has no function 'variable'"),
        ("verify OWN:number", "returned int, expected a Schedule"),
        ("verify allreduce:ring --sizes 0-3", "sizes of 1 or more"),
        ("verify allreduce:ring --sizes some", "expected sizes such as"),
        ("verify allreduce:ring --sizes 1-100000000000000", "sizes of 1 or more, 1000000 at the m"),
        ("verify allreduce:ring --sizes 1000000000000", "sizes of 1 or more, 1000000 at the most"),
        ("verify allreduce:ring --sizes 3,5-2", "the lower end of a range first, got '3,5-2'"),
        ("simulate allreduce:ring --ranks 0", "--ranks must be 1 or more"),
        ("simulate allreduce:ring --ranks 99999999999", "--ranks must be 1 or more, 1000000 at"),
        ("simulate allreduce:ring --latency 5parsec", "expected a time"),
        ("simulate allreduce:ring --bandwidth 5", "expected a bandwidth"),
        ("simulate allreduce:ring --nbytes many", "expected a size"),
        ("simulate allreduce:ring --nbytes 1e30GB", "expected nbytes and itemsize of 11529"),
    ],
)
def test_misuse_is_told(
    command: str, text: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.replace("OWN", own).split()) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "algorithm", ["allreduce:ring", "allgather:ring", "reduce_scatter:ring", "alltoall:pairwise"]
)
def test_algorithms_that_fill_the_links_have_their_bus_bandwidth(
    algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alltoall had that of all ranks' buffers together, eight times as much."""
    assert main(f"simulate {algorithm} --latency 0 --bandwidth 25GB/s".split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"busbw \(simulated\): +25 GB/s\n", out)
    times = 2 if algorithm.startswith("allreduce") else 1
    assert re.search(rf"bytes sent per rank, at most: +{times * (7 << 23)}\n", out)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """As its sources have it, src/*.cu: its text names neither gather nor scatter."""
    part = ("allgather", "alltoall", "gather", "reduce_scatter", "scatter")
    assert {name: factor(4) for name, factor in units.BUSBW.items()} == {
        "allreduce": 1.5, **dict.fromkeys(part, 0.75)
    }  # fmt: skip


def test_units() -> None:
    assert units.read_nbytes("64KiB") == 65536 and units.read_nbytes("25MB") == 25_000_000
    assert units.read_nbytes("4") == 4 and units.read_nbytes(".5KiB") == 512
    assert units.read_seconds("5us") == pytest.approx(5e-6)
    assert units.read_seconds("2e-3") == pytest.approx(2e-3)
    assert units.read_rate("25GB/s") == 25e9 and units.read_rate("1Gbit/s") == 125e6
    assert units.read_sizes("1,2,5-8,2,7-9") == (1, 2, 5, 6, 7, 8, 9)
    assert units.show_nbytes(1 << 20) == "1 MiB" and units.show_nbytes(5) == "5 B"
    assert units.show_seconds(1.5e-6) == "1.5 us" and units.show_seconds(0) == "0 ns"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"ringfold {ringfold.__version__}\n")
