"""Give a forked process the pages of mapped files that its parent has."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path

MADV_POPULATE_READ = 22  # asm-generic/mman-common.h, Linux 5.14
PRESENT = bytes(49 if value & 0x80 else 48 for value in range(256))  # the highest byte of a page's entry -> "1" or "0"


def resident_file_pages() -> list[tuple[int, int]]:
    """Return (address, bytes) of the runs of pages of mapped files, of libraries above all, that this process has.

    Source: man 5 proc_pid_maps, proc_pid_pagemap.
    """
    page, found = mmap.PAGESIZE, []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            if inode == "0" or not access.startswith("r"):
                continue
            entries = os.pread(pagemap.fileno(), (end - start) // page * 8, start // page * 8)
            runs = re.finditer(b"1+", entries[7::8].translate(PRESENT))
            found += [(start + run.start() * page, (run.end() - run.start()) * page) for run in runs]
    return found


def map_file_pages(runs: Iterable[tuple[int, int]]) -> None:
    """Map pages of `resident_file_pages` of the parent, which a fork leaves out of the child's page tables.

    Without, they would come back one by one and count as memory of whatever runs then.
    """
    madvise = ctypes.CDLL(None).madvise
    for address, nbytes in runs:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_POPULATE_READ)
