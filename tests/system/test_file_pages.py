from tests.fresh_process import run_python

FORK = """
import os, numpy, numpy.linalg
from qexp.system.memory import host_memory
from qexp.system.file_pages import map_file_pages, resident_file_pages
pages, parent = resident_file_pages(), host_memory().file_bytes
if os.fork() == 0:
    before = host_memory().file_bytes
    map_file_pages(pages)
    print(parent, before, host_memory().file_bytes, sum(nbytes for _, nbytes in pages), flush=True)
    os._exit(0)
os.wait()
"""


def test_forked_process_gets_the_file_pages_of_its_parent() -> None:
    parent, before, after, counted = map(int, run_python(FORK).split())
    assert before < 0.8 * parent  # what a fork leaves out, without which the rest shows nothing
    assert 0.97 * parent <= after <= 1.1 * parent
    assert counted >= 0.97 * parent  # it also counts pages that were written to, which the kernel counts as anonymous
