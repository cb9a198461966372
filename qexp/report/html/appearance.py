"""Colors of backends and markers of offloads: the same in every report, whatever else it shows.

A name that is not listed (a backend of one's own, a mixture of libraries) has a color by its checksum. Each color has a
variant for a dark page; both have a contrast of 3:1 or more to their background.
"""

from __future__ import annotations

import zlib

UNQUANTIZED = "none"
FAMILIES = {  # library -> (on white, on black); told apart by color-blind eyes
    UNQUANTIZED: ("#5f6670", "#aab2bd"),
    "bitsandbytes": ("#0a66b2", "#5cb0f0"),
    "torchao": ("#c4500a", "#f08a4b"),
    "quanto": ("#0a7d59", "#3fc495"),
    "gguf": ("#a03d83", "#e08cc6"),
    "qexp_packed": ("#8a6500", "#d9b23c"),
    "mixed": ("#5b4bb5", "#a99cf0"),
}
SPARE = (("#b3263e", "#f2788b"), ("#00757f", "#35bfca"), ("#5c7a00", "#a9c93f"), ("#7a5236", "#c99a78"))

MARKERS = {"none": "circle", "leaf": "square", "block": "diamond", "model": "triangle", "sequential": "cross"}
SPARE_MARKERS = ("plus", "wedge", "star")


def family_colors(family: str) -> tuple[str, str]:
    """Return the colors of a backend's family (`backend_family`): on a light and on a dark page."""
    return FAMILIES.get(family) or SPARE[_checksum(family) % len(SPARE)]


def offload_marker(offload: str) -> str:
    """Return the shape for an offload as it stands in a label: 'none', 'leaf→disk', 'block×2→cpu'."""
    strategy = offload.partition("→")[0].partition("×")[0]
    return MARKERS.get(strategy) or SPARE_MARKERS[_checksum(strategy) % len(SPARE_MARKERS)]


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode())
