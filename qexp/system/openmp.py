"""How OpenMP's threads wait for their next loop: asleep, unless the user has decided.

PyTorch's threads spin between two loops, some milliseconds by default, to be there at once. Beside another program they
take its core from it, and when the kernel takes the core of one of them in the middle of a loop, the others spin for a
turn of the scheduler: on two cores, a step of 45 ms then took seconds. A thread that sleeps is woken in some 10 µs.
The runtime reads these variables when it is loaded, with torch.
Source: OpenMP 5.2, section 21.7 (OMP_WAIT_POLICY); libgomp's manual, GOMP_SPINCOUNT; LLVM's, KMP_BLOCKTIME.
"""

from __future__ import annotations

from collections.abc import Mapping

WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
DECIDED_BY = (*WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever sets one of them has decided


def waiting_asleep(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment, none if it says already how threads wait."""
    return {} if any(name in environment for name in DECIDED_BY) else dict(WAIT_POLICY)
