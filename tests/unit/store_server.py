"""A real Valkey or Redis server for tests: the installed one, or Debian's package unpacked without installing it."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVERS = ("valkey-server", "redis-server")
# what the packages link against beyond libraries that every Debian has; some names exist in newer releases only
PACKAGES = {
    "valkey-server": ("valkey-server", "valkey-tools", "libjemalloc2", "liblzf1", "libhiredis1.1.0", "libatomic1"),
    "redis-server": ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libhiredis0.14", "libatomic1"),
}


@functools.cache
def find_server() -> tuple[str, dict[str, str]] | str:
    """(program, environment to run it in), or the reason why there is none."""
    for name in SERVERS:
        if path := shutil.which(name):
            return path, dict(os.environ)
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return "no valkey-server or redis-server on PATH, and no apt to fetch one from"
    cache = Path(tempfile.gettempdir()) / f"triptych-test-server-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        return f"{cache} belongs to somebody else"
    reasons = []
    for name in SERVERS:
        found = _unpacked(name, cache / name)
        if not isinstance(found, str):
            return found
        reasons.append(found)
    return "; ".join(reasons)


def _unpacked(name: str, target: Path) -> tuple[str, dict[str, str]] | str:
    if not target.exists():
        # unpacked elsewhere and renamed as a whole: other test processes may be doing the same
        work = Path(tempfile.mkdtemp(dir=target.parent))
        fetched = [_fetch(package, work) for package in PACKAGES[name]]
        if fetched[0]:
            shutil.rmtree(work)
            return f"apt-get download {name}: {fetched[0]}"
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, work], capture_output=True, check=True)
        try:
            work.rename(target)
        except OSError:
            shutil.rmtree(work)
    libraries = sorted({str(path.parent) for path in target.glob("usr/lib/**/*.so*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    program = target / "usr" / "bin" / name
    tried = subprocess.run([program, "--version"], capture_output=True, text=True, env=environment)
    return (str(program), environment) if tried.returncode == 0 else f"{name} does not start: {tried.stderr.strip()}"


def _fetch(package: str, work: Path) -> str:
    """Empty when it is there, else what apt said."""
    try:
        done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer in 60 s"
    return "" if done.returncode == 0 else done.stderr.strip().split("\n")[-1]


class Server:
    """A server on a socket in a directory of its own. `stop` and `start` keep the address, not the data."""

    def __init__(self, program: str, environment: dict[str, str], directory: Path) -> None:
        self._program = program
        self._environment = environment
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        # socket paths are limited to about a hundred characters, which test directories exceed
        self._socket = Path(tempfile.mkdtemp(prefix="vk")) / "s"
        self.url = f"unix://{self._socket}"

    def start(self, *options: str) -> None:
        """Start it and wait until it listens."""
        base = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", str(self._directory)]
        self._process = subprocess.Popen(
            [self._program, *base, *options], env=self._environment, stdout=subprocess.PIPE, stderr=sys.stderr
        )
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it takes connections: its socket is there a moment earlier."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self._socket))
            except OSError:
                return False
            return True

    def stop(self) -> None:
        """Kill it as a machine that goes away would."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._socket.unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop it and leave nothing behind."""
        self.stop()
        shutil.rmtree(self._socket.parent)
