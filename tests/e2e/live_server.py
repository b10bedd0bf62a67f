"""Starting and stopping a real `triptych serve` in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Server:
    """A running `triptych serve` and where it listens."""

    process: subprocess.Popen[str]
    url: str
    log: Path


def start_server(environment: dict[str, str], folder: Path, *flags: str) -> Server:
    """Start `triptych serve tiny` on a free port and wait until it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "triptych", "serve", "tiny", "--port", str(port), "--kv-memory", "512MiB", *flags]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, text=True)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    for _ in range(1200):
        assert process.poll() is None, f"the server ended at start:\n{log.read_text()}"
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server is not healthy after two minutes:\n{log.read_text()}")


def stop_server(server: Server) -> int:
    """Ask the server to end; its exit status."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise AssertionError(f"the server ignored SIGTERM:\n{server.log.read_text()}") from None
