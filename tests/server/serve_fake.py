"""Runs the fake engine behind `run_server` in its own process: serve_fake.py TOKEN_DELAY DRAIN_TIMEOUT [CERT KEY]"""

from __future__ import annotations

import sys

from fake_engine import FakeEngine

from triptych.server.options import ServerOptions
from triptych.server.run import run_server
from triptych.text.tokenizer import Tokenizer

if __name__ == "__main__":
    engine = FakeEngine(Tokenizer.deepseek(), max_context=100_000)
    engine.token_delay = float(sys.argv[1])
    cert, key = sys.argv[3:5] or (None, None)
    options = ServerOptions(port=0, drain_timeout=float(sys.argv[2]), keep_alive=0.2, tls_cert=cert, tls_key=key)
    run_server(engine, options, ready=lambda url: print(url, flush=True))
    print("ended in order", "engine stopped" if engine.stopped else "engine runs", flush=True)
