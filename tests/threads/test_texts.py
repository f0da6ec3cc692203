"""Texts that ranks tell each other."""

import os

from ringfold import run_local
from ringfold.comm.texts import gather_texts


def test_texts_of_paths_that_are_no_utf8() -> None:
    """The rank that had one ended with UnicodeEncodeError, and the others waited."""
    text = f"{os.fsdecode(bytes([0x42, 0xFC]))}.json is a folder"
    told = run_local(2, lambda comm: gather_texts(comm, text if comm.rank else ""))
    assert told == [["", "B\\udcfc.json is a folder"]] * 2
