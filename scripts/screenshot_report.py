"""Make docs/images/report.png: a real sweep of the embedded model, its report.html in a browser, and a picture of it.

    python scripts/screenshot_report.py              # some minutes: 18 experiments
    python scripts/screenshot_report.py report.html  # of a report that is there

Needs Chromium (apt-get install chromium) and the extra qexp[dev].
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "images" / "report.png"
BACKENDS = "none,bitsandbytes,bitsandbytes_int8,torchao,torchao_float8wo,quanto_int2,quanto_int4,gguf_q4_0,packed_uint3"
SWEEP = f"-m backend={BACKENDS} seed=0,1 task.num_images=8 tracking=none sweep.name=formats"
WIDTH, HEIGHT, COLORS = 1400, 1000, 256
MARGIN = 24  # pixels below the plot
READY = "document.documentElement.dataset.ready === 'true'"


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Take the picture of a report for the documentation.")
    parser.add_argument("report", type=Path, nargs="?", help="a report.html (default: of a sweep that is run now)")
    parser.add_argument("--target", type=Path, default=TARGET, help=f"where the picture goes (default: {TARGET.name})")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        report = options.report or run_sweep(Path(folder))
        options.target.write_bytes(shrink(take_picture(report.resolve())))
    print(f"wrote {options.target}: {options.target.stat().st_size / 1000:.0f} kB")
    return 0


def run_sweep(folder: Path) -> Path:
    """Run the sweep in a folder and return its report."""
    for arguments in (SWEEP.split(), ["report", "formats", "--baseline", "torchao int8wo"]):
        subprocess.run([sys.executable, "-m", "qexp", *arguments], cwd=folder, check=True)
    return folder / "outputs/sweeps/formats/report.html"


def take_picture(report: Path) -> bytes:
    """Return the page down to the end of its plot, as PNG."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        sys.exit("chromium is missing: apt-get install chromium, or set CHROMIUM to its program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.as_uri())
        page.wait_for_function(READY)
        plot = page.locator("#plot").bounding_box()
        if plot is None:
            sys.exit(f"{report} has no plot")
        height = plot["y"] + plot["height"] + MARGIN
        data = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        browser.close()
    return data


def shrink(data: bytes) -> bytes:
    """Return the picture with a palette: a third of the bytes."""
    method = Image.Quantize.MAXCOVERAGE  # keeps rare colors, those of small points; the median cut does not
    picture = Image.open(io.BytesIO(data)).convert("RGB").quantize(COLORS, method, dither=Image.Dither.NONE)
    found = io.BytesIO()
    picture.save(found, "PNG", optimize=True)
    return found.getvalue()


if __name__ == "__main__":
    sys.exit(main())
