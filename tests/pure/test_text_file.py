"""A file that is written at once: readers find the old text or the new; pipes stay pipes."""

import os
import threading
from pathlib import Path

import pytest

from ringfold.comm.text_file import why_unwritable, write_whole


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["report"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """It became a file, and whoever read from it waited for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(path.read_text()), daemon=True)
    reader.start()
    assert why_unwritable(path) == ""
    write_whole(path, "new")
    reader.join(20)
    assert found == ["new"] and path.is_fifo()


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_replaced(tmp_path: Path, there: bool) -> None:
    link, path = tmp_path / "link", tmp_path / "folder" / "report"
    path.parent.mkdir()
    link.symlink_to(path)
    if there:
        path.write_text("old")
    assert why_unwritable(link) == ""
    write_whole(link, "new")
    assert link.is_symlink() and path.read_text() == "new"


def test_a_link_into_no_folder_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "no" / "report")
    assert f"there is no folder {tmp_path / 'no'}" in why_unwritable(link)
    assert "is a folder" in why_unwritable(tmp_path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report"]


def test_names_as_long_as_they_may_be_and_longer(tmp_path: Path) -> None:
    """A report under a name of 240 letters was lost when training had ended."""
    path = tmp_path / ("x" * 255)
    assert why_unwritable(path) == ""
    write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == [path.name]
    assert why_unwritable(tmp_path / ("x" * 256)).endswith("x: File name too long")
