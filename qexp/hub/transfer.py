"""Download files of a repository into huggingface_hub's cache with its `snapshot_download`.

The library handles connections (Xet or plain), retries, locks between processes, and the layout of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from threading import Lock
from typing import Any

from qexp.errors import HubError, first_names
from qexp.system.progress import Progress


def download_files(repo: str, commit: str, nbytes: Mapping[str, int], snapshot: Path) -> None:
    """Download files of a commit to its folder in the cache.

    Args:
        nbytes: name of each file -> its size.
        snapshot: where the files will be.

    Raises:
        HubError: for a download that broke off; also errors of the HTTP client, and OSError for the disk's.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    progress = Progress(repo, "downloading {} files", len(nbytes), sum(nbytes.values()))
    patterns = [escape(name) for name in nbytes]
    try:
        snapshot_download(repo, revision=commit, allow_patterns=patterns, tqdm_class=_bar_class(progress))
    except OSError as error:
        if isinstance(error, HTTPError) or error.errno is not None:
            raise
        if isinstance(error.__cause__, HTTPError):  # what the library hides behind "not in the cache"
            raise error.__cause__ from error
        raise HubError(f"the download broke off ({' '.join(str(error).split())})") from error
    progress.close()
    # without its list of files, the library returns a snapshot as it is
    if missing := [name for name in nbytes if not (snapshot / name).exists()]:
        raise HubError(f"the download of {first_names(missing)} broke off")


def _bar_class(progress: Progress) -> Any:
    """Return a class of silent bars for the library: they count written bytes, and files, in our progress line."""
    from huggingface_hub.utils import tqdm

    lock = Lock()

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            # of two bars of bytes one counts what came over the network, which Xet compresses
            self._in_bytes = options.get("unit") == "B"
            self._counts = not self._in_bytes or str(options.get("desc")).startswith("Reconstructing")

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                with lock:
                    progress.advance(int(n or 0), 0) if self._in_bytes else progress.advance(0, int(n or 0))

    return Bar
