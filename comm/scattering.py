"""A scatter on a board, whose root alone knows what is scattered."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..kernels.records import Note, Place, Status
from . import fused, header
from .board import Board
from .buffer import Buffer, address_in, address_of, allocator
from .call_codes import code_of
from .dtypes import DTYPES
from .fused_rows import INPUT, OUTPUT, Rows
from .meeting import Call, Meeting


class Scattering(Meeting):
    """A scatter, ready to run any number of times.

    The ranks meet where the root shows a description of its rows, a broadcast of fixed length, and
    pause: what follows is lowered for what was told. The form is the root's choice, as no other
    rank shows a buffer.
    """

    def __init__(self, board: Board, root: int, buffer: Buffer | None) -> None:
        """buffer: the root's, a row for each rank; None elsewhere."""
        self._words = np.zeros(header.NBYTES, np.uint8)
        shape = board.shape(header.NBYTES, 1, root)
        code = code_of("scatter", "", "uint8")
        super().__init__(board, Call("scatter", code, shape, address_of(self._words), shape.nbytes))
        self._root, self._source = root, 0
        self._result: Any = None
        self._heard = b""
        self.form, self._note[Note.PLACE] = "told", Place.UNUSED
        if buffer is not None:
            self._source = address_of(buffer.flat)
            self.form = self._shows(self._source, buffer.flat.nbytes)
            if self.form != "shared":
                shape = board.shape(buffer.flat.size, buffer.dtype.itemsize, root)
                self.form = fused.private_form("scatter", shape, board.reads)
            row = buffer.shape[1:]
            self._words[:] = header.pack(buffer.family, buffer.dtype.name, row, self.form)
        self._begin = self.launch
        del self.launch  # so that it is the method, without a cycle of references

    def launch(self) -> int:
        """Start, and go on with what is told while nobody has to be waited for."""
        if self.flying:
            return Status.REFUSED
        self._take(self._program)
        self._own[INPUT] = self._own[OUTPUT] = self._call.address
        status = self._begin()
        if status == Status.OTHERWISE:
            self._go_on(self._otherwise())
            status = self._advance(self.address)
        return status

    def take(self) -> Any:
        """Return the row that the last run has brought, a new array."""
        result, self._result = self._result, None
        return result

    def _lowered(self) -> Rows:
        return fused.announced(self._call.shape)

    def _otherwise(self) -> Rows:
        """Return the program of what the root has told."""
        told = self._words.tobytes()
        if told != self._heard:
            self._heard, self._row = told, self._lower(told)
        make, rows = self._row
        self._result = make()
        self._own[INPUT], self._own[OUTPUT] = self._source, address_in(self._result)
        return rows

    def _lower(self, told: bytes) -> tuple[Callable[[], Any], Rows]:
        """Return what makes a row that was told of, and the program that brings it."""
        family, name, row, form = header.unpack(np.frombuffer(told, np.uint8))
        dtype = DTYPES[name]
        count = math.prod(row) * self._board.size
        shape = self._board.shape(count, dtype.itemsize, self._root)
        rows = fused.lower(form, "scatter", shape)
        return partial(allocator(family, dtype), tuple(row)), rows
