"""A JupyterLab over a folder of notebooks, and a page of Chromium; without it these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], str]]:
    """A function from a folder to the address of a JupyterLab over it."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    servers: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> str:
        config = tmp_path_factory.mktemp("config")
        overrides = {
            "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
            "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        }
        (config / "labconfig").mkdir()
        (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(overrides))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
        command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
        command += ["--ServerApp.disable_check_xsrf=True"]  # tests end sessions
        command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(config), "PYTHONPATH": str(ROOT)}
        with (folder / "lab.log").open("w") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        servers.append(server)
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api/status", server, folder / "lab.log")
        return address

    yield start
    for server in servers:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture
def page() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sync_api.expect.set_options(timeout=20_000)  # a machine that does much else is slow
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def run_all(page: Any, address: str, notebook: str) -> None:
    """Open a notebook and run all of its cells, as a person does."""
    page.goto(f"{address}/lab/tree/{notebook}?reset")
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
