"""python -m benchmarks NAME [options]: run one benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

_HELPERS = ("__main__", "rows", "transformers_side", "triptych_side")


def main(argv: list[str]) -> int:
    """Dispatch to benchmarks.NAME.main."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in _HELPERS)
    if not argv or argv[0] not in names:
        print("usage: python -m benchmarks NAME [options]\n\nbenchmarks:", *names, sep="\n  ")
        return 0 if not argv or argv[0] in ("-h", "--help") else 2
    module = importlib.import_module(f"benchmarks.{argv[0]}")
    return int(module.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
