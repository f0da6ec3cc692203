"""What a checkpoint holds, as data that is written last and read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import Damaged

__all__ = ["HANDED_OVER", "KIND", "Entry", "Manifest", "from_text", "to_text"]

KIND = "ringfold checkpoint"
FORMAT = f"{KIND} 1"
HANDED_OVER = -1


@dataclass(frozen=True)
class Entry:
    """One tensor: where it lies, what it is, and the SHA-256 of its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Describe one whole checkpoint.

    step: training steps done when it was taken; HANDED_OVER for what ranks hold, and no checkpoint.
    ranks: how many wrote it.
    files: name -> bytes.  tensors: full name -> entry.  values: path -> JSON of `values`.
    """

    step: int
    ranks: int
    files: Mapping[str, int]
    tensors: Mapping[str, Entry]
    values: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Return what an error calls it."""
        handed = self.step == HANDED_OVER
        return "the state that ranks hold" if handed else f"the checkpoint of step {self.step}"


def to_text(manifest: Manifest) -> str:
    """Return JSON with a checksum of itself."""
    body = {"format": FORMAT, **asdict(manifest)}
    return json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n"


def from_text(text: str) -> Manifest:
    """Read what `to_text` wrote; Damaged if a single character differs in meaning."""
    try:
        body = json.loads(text)
        claimed = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"manifest.json: cannot be read ({error})") from None
    if body.get("format") != FORMAT:
        raise Damaged(f"manifest.json: expected format {FORMAT!r}, got {body.get('format')!r}")
    try:
        same = claimed == _digest(body)
    except ValueError:  # a number too large to be one
        same = False
    if not same:
        raise Damaged("manifest.json: does not match its own checksum")
    return Manifest(
        step=body["step"],
        ranks=body["ranks"],
        files=body["files"],
        tensors={
            name: Entry(row["file"], row["dtype"], tuple(row["shape"]), row["sha256"])
            for name, row in body["tensors"].items()
        },
        values=body["values"],
    )


def _digest(body: Mapping[str, Any]) -> str:
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()
