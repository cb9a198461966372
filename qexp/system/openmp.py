"""How many threads OpenMP has, and how they wait for their next loop: awake for a moment, unless the user has decided.

PyTorch's threads spin between two loops, some milliseconds by default, to be there at once. Beside another program they
take its core from it, and when the kernel takes the core of one of them in the middle of a loop, the others spin for a
turn of the scheduler: on two cores, a step of 45 ms then took up to seconds. Threads that sleep at once are woken for
each loop, and a small model's loops are that short: a third of its step. So they spin for as long as it takes from one
loop to the next, and then sleep (`scripts/bench_shared.py`).
A runtime starts a thread for each core that the process is bound to and does not read a container's quota. Sixty-four
threads with a quota of two cores use up each period's share in a thirtieth of it, and then all stand still.
These variables are read when the runtime is loaded, with torch.
Source: OpenMP 5.2, section 21.7 (OMP_WAIT_POLICY); libgomp's manual, GOMP_SPINCOUNT; LLVM's, KMP_BLOCKTIME.
"""

from __future__ import annotations

from collections.abc import Mapping

from qexp.system.machine_load import bound_cores, usable_threads

WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",  # of runtimes that do not know the next one: asleep at once
    "GOMP_SPINCOUNT": "10000",  # turns of libgomp, whose own number is 300,000
}
DECIDED_BY = (*WAITING, "KMP_BLOCKTIME")  # whoever sets one of them has decided
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch takes MKL's number if there is one


def openmp_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment: how threads wait, and how many there are under a quota.

    What the environment says already is left as it is.
    """
    added = {} if any(name in environment for name in DECIDED_BY) else dict(WAITING)
    is_counted = any(name in environment for name in THREADS)
    if not is_counted and usable_threads() < bound_cores():
        added[THREADS[0]] = str(usable_threads())
    return added
