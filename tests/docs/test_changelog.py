"""CHANGELOG.md and the version: one number, and the newest one comes first."""

import re
from datetime import date
from pathlib import Path

from packaging.version import Version

import qexp

TEXT = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = [
    (version, rest.removeprefix(" - "))
    for version, rest in re.findall(r"^## \[(.+?)\](.*)$", TEXT, re.MULTILINE)
    if version != "Unreleased"
]


def test_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    assert RELEASES[0][0] == qexp.__version__


def test_versions_fall_and_dates_do_not_rise() -> None:
    found = [(Version(version), date.fromisoformat(day)) for version, day in RELEASES]
    assert len(found) >= 2 and found == sorted(found, reverse=True)
    assert len({version for version, _ in found}) == len(found)
