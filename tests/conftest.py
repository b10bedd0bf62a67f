"""Settings that all tests share."""

from contextlib import nullcontext

import pytest
from hypothesis import settings

# machines are shared and slow at times: an example may take as long as it needs
settings.register_profile("triptych", deadline=None)
settings.load_profile("triptych")


class _NeverBehind:
    """A stream or an event of a GPU that has nothing left to do."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _done(self, *_: object) -> None:
        pass

    wait_event = record = synchronize = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 1.0


@pytest.fixture
def streams_on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What uses a GPU's streams runs on the processor, where nothing is ever behind."""
    import torch

    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _NeverBehind)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
