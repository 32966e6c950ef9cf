"""Memory of new files in huge pages, where the system allows it for shared memory.

A page of 2 MiB is zeroed in one go and mapped by one entry; 512 small ones cost a page fault, or a search, each.
"""

import functools
import mmap
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # not in Python's `mmap`


def allocate_huge_pages(descriptor: int) -> None:
    """Allocate the pages of a new file. Does nothing if the file is smaller than a huge page, or the system has none."""
    if not _are_allowed():
        return
    try:
        with mmap.mmap(descriptor, 0) as mapping:
            whole = len(mapping) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
            if whole:
                mapping.madvise(mmap.MADV_HUGEPAGE)
                mapping.madvise(_MADV_POPULATE_WRITE, 0, whole)
    except OSError:  # the pages are then allocated when they are written
        return


@functools.cache
def _are_allowed() -> bool:
    """Whether files in shared memory get huge pages on request."""
    try:
        setting = _SETTING.read_text(encoding="ascii")
    except OSError:
        return False
    return any(f"[{value}]" in setting for value in ("advise", "within_size", "always", "force"))
