"""What ranks tell each other beside their messages: small, rare, and readable as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .fingerprint import agreed
from .trace import Entry, Ring, Signature


@dataclass(frozen=True)
class Row:
    """One collective that a rank has called, as others need to know it.

    sequence: of the group's collectives.  site: file:line.
    way: the algorithm of its messages, say; "" where it sends none.
    """

    sequence: int
    signature: Signature
    site: str
    way: str

    @classmethod
    def of(cls, entry: Entry) -> Row:
        """Return the row of an operation in the ring."""
        return cls(entry.sequence, entry.signature, entry.site, entry.way)

    def differs(self, other: Row) -> bool:
        """Tell whether two ranks that called these disagree."""
        mine, others = (agreed(row.signature, row.way) for row in (self, other))
        return mine != others

    def __str__(self) -> str:
        return self.told(way=False)

    def told(self, way: bool) -> str:
        """Return it as text.  way: also how its messages go."""
        sig = self.signature
        end = _ENDS.get(sig.operation, "root")
        root = f", {end} {sig.peer}" if sig.peer >= 0 else ""
        by = f", algorithm {self.way or 'None'}" if way else ""
        return f"{sig}, {sig.elements} elements{root}{by}, at {self.site} (#{self.sequence})"


@dataclass(frozen=True)
class Called:
    """The last collectives of a group that a rank has called, the oldest first.

    answer: it does not wait itself, but was told so by the rank that hears this.
    """

    group: str
    rows: tuple[Row, ...]
    answer: bool = False


@dataclass(frozen=True)
class Verdict:
    """The ranks' calls number `sequence` of a group differ, as `text` says."""

    group: str
    sequence: int
    text: str


@dataclass(frozen=True)
class Ask:
    """Tell me what you are at; answer with this number."""

    number: int


@dataclass(frozen=True)
class Report:
    """What a rank is at: its last operation, and where its threads are."""

    number: int
    text: str


@dataclass(frozen=True)
class Standing:
    """A rank whose program waits in a call, until others have made one that fits.

    rank: of the world.  place: in the group.  wait: counts its waits.
    count: of a recv, how many messages from that rank have been received; of a send, how many to
        it were begun, up to this one.
    members: of a collective's group, in the world; of a large one, none.
    """

    rank: int
    place: int
    wait: int
    group: str
    row: Row
    count: int = 0
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Ranks each of which waits for the next; the last, for the rank that hears this.

    number: counts the probes that the first one has sent.
    """

    number: int
    chain: tuple[Standing, ...]


@dataclass(frozen=True)
class Stuck:
    """The rank that hears this waits for ever, if it still is in its wait of this number."""

    wait: int
    text: str


Notice = Called | Verdict | Ask | Report | Probe | Stuck

_KINDS: dict[str, type[Notice]] = {
    kind.__name__: kind for kind in (Called, Verdict, Ask, Report, Probe, Stuck)
}


def encode(notice: Notice) -> bytes:
    """Return a notice as bytes."""
    return json.dumps([type(notice).__name__, asdict(notice)]).encode()


def decode(data: bytes) -> Notice:
    """Return the notice of `encode`d bytes."""
    kind, fields = json.loads(data)
    if "rows" in fields:
        fields["rows"] = tuple(map(_row, fields["rows"]))
    if "chain" in fields:
        fields["chain"] = tuple(
            Standing(**{**one, "row": _row(one["row"]), "members": tuple(one["members"])})
            for one in fields["chain"]
        )
    return _KINDS[kind](**fields)


def _row(fields: dict[str, Any]) -> Row:
    return Row(**{**fields, "signature": Signature(*fields["signature"])})


def calls_of(ring: Ring, group: str, *, messages: bool) -> list[Entry]:
    """Return a rank's last collectives in a group, or its last messages, the oldest first."""
    return [
        entry
        for entry in ring.entries(_LOOK_BACK)
        if entry.group == group and (entry.signature.operation in MESSAGES) is messages
    ]


def rows_of(ring: Ring, group: str, *, messages: bool) -> tuple[Row, ...]:
    """Return the same as others need to know them."""
    return tuple(map(Row.of, calls_of(ring, group, messages=messages)))


DIFFER = "the ranks' calls differ"

_LOOK_BACK = 64

_ENDS = {"send": "to rank", "recv": "from rank"}

MESSAGES = tuple(_ENDS)
"""Operations between two ranks, which the ring counts apart."""

ASSEMBLING = ("split", "close")
"""Operations in which ranks come together whatever they have called before."""
