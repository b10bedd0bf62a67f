"""Parts of sanitize.py under compute-sanitizer, each in a process of its own: `make test-gpu SANITIZE=1`.

    python tests/gpu/under_sanitizer.py [part ...] [--tools memcheck racecheck]

A part that the tool does not survive costs only itself. One is known: at `alone` the tool of CUDA 13.0 dies of a
floating point exception on the host, before the kernel runs. racecheck names what warp-specialised kernels do with
barriers in shared memory, also in kernels that have nothing else (docs/log.md), so read what it says.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PARTS = Path(__file__).with_name("sanitize.py")
TOOLS = ("memcheck", "racecheck")


def main() -> int:
    """Run them one after the other; 1 if any of them found something or did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all without any")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    given = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the path; it comes with NVIDIA's CUDA toolkit.", file=sys.stderr)
        return 2
    parts = given.parts or names()
    failed = [f"{part} under {tool}" for tool in given.tools for part in parts if sanitized(tool, part)]
    print(f"{len(parts)} parts, {len(given.tools)} tools; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def names() -> list[str]:
    """All parts, as sanitize.py says them."""
    said = subprocess.run([sys.executable, PARTS, "--list"], capture_output=True, text=True, check=True)
    return said.stdout.split()


def sanitized(tool: str, part: str) -> int:
    """Exit status of a part under a tool. Interrupted, it takes the tool's child with it, which outlives it else."""
    print(f"-- {part} under {tool}", flush=True)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "5"]
    running = subprocess.Popen(
        [*command, sys.executable, PARTS, part],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        start_new_session=True,
    )
    try:
        return running.wait()
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)
        raise


if __name__ == "__main__":
    sys.exit(main())
