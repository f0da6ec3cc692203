"""What `ringfold doctor` says of the pages that host tensors lie in; pure."""

from __future__ import annotations

from .findings import Finding, good, note

ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
"""Where Linux tells who gets huge pages: a line of words, the present one in brackets."""

_ASKS = "set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (from glibc 2.35 on) before the start"


def huge_pages(words: str, asking: str) -> list[Finding]:
    """Say whether large tensors get huge pages, nothing where the kernel has none.

    words: what `ENABLED` holds, empty where it cannot be read.
    asking: who asks for them, see settings.asks_for_huge_pages.
    """
    if not words:
        return []
    if "[always]" in words:
        return [good("huge pages", "for all memory that is large enough")]
    if "[never]" in words:
        return [note("huge pages", "switched off on this machine")]
    if asking:
        return [good("huge pages", f"asked for by {asking}")]
    return [note("huge pages", "not asked for; large models train slower on CPUs", _ASKS)]
