"""Write docs/mistakes.md: the mistakes in tests/cli/mistakes.yaml and the messages of the command line.

    python scripts/list_mistakes.py            write docs/mistakes.md
    python scripts/list_mistakes.py --print    show the answers alone

Each line is typed in a folder with a few wrong files (`write_files`). A test compares the page with the answers.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import qexp.__main__
import qexp.sweep.job
from qexp.system import devices

ROOT = Path(__file__).parents[1]
LIST, PAGE = ROOT / "tests" / "cli" / "mistakes.yaml", ROOT / "docs" / "mistakes.md"
INTRODUCTION = """\
# Messages for mistakes

Each command has a mistake. Its message comes within seconds, before any weight is read. The current folder has a text
(`notes.txt`), an empty folder (`empty`), a folder with the config.json of a Llama and no weights (`llama`), and files
that are not checkpoints: a web page, a git-lfs pointer, a pickle (`weights.bin`), a truncated file and an empty one.
`python scripts/list_mistakes.py` writes this page.
"""


class ReachedError(Exception):
    """The line was no mistake: an experiment would have run."""


def write_files(folder: Path) -> None:
    """Write the files that the mistakes are about."""
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("some notes\n", encoding="utf-8")
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html></html>", encoding="utf-8")
    (folder / "pointer.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8"
    )
    (folder / "weights.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "cut.safetensors").write_bytes((1000).to_bytes(8, "little") + b'{"a"')
    (folder / "zero.safetensors").touch()
    (folder / "net.py").write_text("class Net:\n    pass\n", encoding="utf-8")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', encoding="utf-8"
    )


def answer(line: str) -> tuple[int, str]:
    """(exit code, everything that is shown) of one command line, typed in the current folder."""
    shown, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["qexp", *shlex.split(line)]),
        mock.patch.object(sys, "path", [os.getcwd(), *sys.path]),
        mock.patch.object(qexp.sweep.job, "run_job", _reached),
        mock.patch.object(devices, "cuda_device_count", lambda: 0),
        mock.patch.dict(os.environ, {"COLUMNS": "120"}),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
        try:
            qexp.__main__.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            shown.write(ended.code + "\n" if isinstance(ended.code, str) else "")
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
    return code, shown.getvalue().replace(os.getcwd(), "<folder>").strip()


def _reached(*_: object, **__: object) -> None:
    raise ReachedError


def page() -> str:
    """Return the whole page, of the answers as they are now."""
    parts = [INTRODUCTION]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files(Path(folder))
        for entry in yaml.safe_load(LIST.read_text(encoding="utf-8")):
            code, text = answer(entry["line"])
            parts.append(f"```\n$ qexp {entry['line']}\n{text}\n```\n")
            assert code != 0, f"{entry['line']} is no mistake"
    return "\n".join(parts)


def main() -> None:
    if "--print" in sys.argv[1:]:
        print(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
