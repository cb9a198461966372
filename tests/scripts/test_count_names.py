"""The counts of names and comments, on a file that was counted by hand."""

from collections import defaultdict

from count_names import RoomCounts, count_file, table

FIRST = '''"""A module."""

import os  # noqa: F401


class Sum:
    """Two lines of
    docstring."""

    def total(self):  # one word
        return "# no comment"

    @property
    def size(self):
        return 0

    def __len__(self):
        return 1


async def _read_file(path):
    # why
    def inner():
        return path

    return inner
'''
SECOND = "def _read_file(): pass\n\n\ndef main(): pass\n"


def test_counts_are_those_made_by_hand() -> None:
    rooms = defaultdict(RoomCounts)
    count_file("qexp/one/first.py", FIRST, rooms["one"])
    count_file("qexp/two/second.py", SECOND, rooms["two"])
    one = rooms["one"]
    # import; class; total, 2 lines; size, 3; __len__, 2; _read_file, def and return; inner, 2
    assert one.code_lines == 1 + 1 + 2 + 3 + 2 + 2 + 2
    assert one.comments == 2  # not the one for a tool, nor the text
    assert (one.functions, one.one_word) == (3, 2)  # total, _read_file and inner; not size, __len__
    lines = [line.split() for line in table(rooms).splitlines()]
    assert [line[:3] for line in lines[1:]] == [["one", "13", "1"], ["two", "2", "1"], ["all", "15", "1"]]
