"""Kernels that have imported everything already: a process imports once what notebooks do, each kernel is its fork.

A kernel of its own spends six seconds on imports and two on loading the built-in model, and every notebook has one. Run
as a program, this file is one of two things. `serve` imports and loads, and forks a kernel for whoever asks at its
socket. `ask` is what Jupyter starts as a kernel: it asks for one, passes interrupts on, and ends when it ends; when it
is killed, so is its kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What takes long in notebooks, and starts no threads.
IMPORTED = (
    "seaborn", "scipy.stats", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
    "transformer_lens.model_bridge.sources.transformers", "kcwb.models.loading", "kcwb.models.selfcheck",
    "kcwb.discovery.methods", "kcwb.editing.registry", "kcwb.workbench.panels.edit", "kcwb.workbench.plots.charts",
    "sklearn.metrics", "bs4", "tinycss2",
)  # fmt: skip


@contextmanager
def forked_kernels(folder: Path) -> Iterator[type]:
    """A kernel manager whose kernels are forks of one process, which ends with the block."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    place = str(folder / "kernels")
    argv = [sys.executable, "-S", "-E", __file__, "ask", place, "-f", "{connection_file}"]

    class ForkedKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as a kernel sets it
    server = subprocess.Popen([sys.executable, __file__, "serve", place], stdout=subprocess.PIPE, env=env)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield ForkedKernel
    finally:
        server.terminate()
        server.wait()


def serve(place: str) -> None:
    """Import, and load the built-in model, then fork a kernel for each that asks."""
    for name in IMPORTED:
        importlib.import_module(name)
    _load()
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while True:
            asking, _ = listener.accept()
            if os.fork():
                asking.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wanted = json.loads(asking.makefile().readline())
            os.chdir(wanted["cwd"])
            os.environ.clear()
            os.environ.update(wanted["env"])
            asking.sendall(f"{os.getpid()}\n".encode())
            threading.Thread(target=_end_with, args=[asking], daemon=True).start()
            IPKernelApp.launch_instance(wanted["arguments"])
            os._exit(0)


def _load() -> None:
    """Have `kcwb.load_model()` give a model that is there already; a fork that edits it has its own weights."""
    import torch

    import kcwb

    threads, load = torch.get_num_threads(), kcwb.load_model
    torch.set_num_threads(1)  # a fork has no threads but the one that forks
    model = load()
    torch.set_num_threads(threads)
    kcwb.load_model = lambda *args, **settings: load(*args, **settings) if args or settings else model  # type: ignore[assignment]


def _end_with(asking: socket.socket) -> None:
    asking.recv(1)
    os._exit(1)


def ask(place: str, *arguments: str) -> None:
    """Be the kernel's stand-in for whoever starts and stops it."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        wanted: dict[str, Any] = {"cwd": os.getcwd(), "env": dict(os.environ), "arguments": arguments}
        asking.sendall(json.dumps(wanted).encode() + b"\n")
        answers = asking.makefile()
        kernel = int(answers.readline())
        signal.signal(signal.SIGINT, lambda *_: os.kill(kernel, signal.SIGINT))
        answers.readline()  # the kernel has ended


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
