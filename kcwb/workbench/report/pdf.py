"""A page as PDF, printed by Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from kcwb.errors import KcwbError, SettingError
from kcwb.files import atomic_path
from kcwb.outputs import PDF, PDF_MARK, check_output

_BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
_BROWSERS += ["chrome", "microsoft-edge", "msedge"]
_BROWSER_ON_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def write_pdf(page: str | Path, output: str | Path | None = None, *, force: bool = False) -> Path:
    """Print an HTML file to PDF with Chromium.

    Parameters
    ----------
    page
        The HTML file.
    output
        The PDF; by default beside the page.
    force
        Overwrite also a file that kcwb did not write.

    Raises
    ------
    SettingError
        If there is no Chromium or Chrome, or the PDF cannot be written or would replace a file that is not ours.
    KcwbError
        If it fails or takes more than two minutes.
    """
    page = Path(page)
    target = Path(output) if output is not None else page.with_suffix(".pdf")
    check_output(target, PDF, what="The PDF", inputs=[page], force=force, make_folder=True)
    with tempfile.TemporaryDirectory(prefix="kcwb-chromium-") as profile, atomic_path(target) as draft:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += [f"--user-data-dir={profile}", "--no-pdf-header-footer", "--virtual-time-budget=15000"]
        flags.append("--disable-features=IsolateSandboxedIframes")  # time must pass in the frames of graphs, too
        command = [find_browser(), *flags, f"--print-to-pdf={draft}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
        except subprocess.TimeoutExpired as error:
            raise KcwbError(f"Chromium took more than two minutes to print {page}; the HTML file is whole.") from error
        if done.returncode or not draft.stat().st_size:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise KcwbError(f"Chromium could not print {page} (exit code {done.returncode}): {last}")
        with draft.open("ab") as file:
            file.write(PDF_MARK)
    return target


def find_browser() -> str:
    """The path of Chromium or Chrome; SettingError if there is none."""
    on_mac = _BROWSER_ON_MAC if Path(_BROWSER_ON_MAC).is_file() else None
    found = next(filter(None, map(shutil.which, _BROWSERS)), on_mac)
    if found is None:
        raise SettingError(
            "A PDF needs Chromium or Chrome, and none was found. Install it (for example: apt install chromium), or "
            "open the HTML report in a browser and print it."
        )
    return found
