"""A fake accelerator: tests of code for GPUs, on a machine that has none.

    torch.device("fake", 0)                 three devices (`DEVICES`); torch.get_device_module("fake") has their streams

It is a backend of torch's PrivateUse1 key, in Python. A tensor there is real host memory with another device tag
(`memory.py`), and a kernel is the CPU's kernel (`backend.py`), so results equal those of the CPU; but it behaves as an
accelerator does where bugs hide:

* an operation over tensors on different devices raises;
* a copy on a side stream is late: its destination is poisoned (NaN) at once, and the bytes arrive when somebody waits
  for them (`streams.py`, `copies.py`); memory that is not initialized is poisoned too;
* pinned host memory is told from pageable: copies of the latter make the host wait;
* bytes, copies, host synchronizations, live and peak memory are counted (`counters.py`);
* a happens-before checker reports what another scheduling of the streams would have broken (`races.py`): an
  overwrite that does not wait for a reader gives the right output here, and is reported all the same.

    with measure() as seen:
        model(x)
    assert seen.h2d_bytes == payload and seen.host_syncs == 0 and seen.races == []

There is one PrivateUse1 key, and a process that has registered a backend has it until it ends: so tests that use this
device run in a process of their own (`tests/own_process.py` says how to set a folder of such tests up).

Not here: torch.Stream and torch.Event (use those of the device module), autograd on side threads, random numbers per
device, `out=` arguments that have to grow.
"""
