"""Settings that all tests share."""

from hypothesis import settings

# machines are shared and slow at times: an example may take as long as it needs
settings.register_profile("triptych", deadline=None)
settings.load_profile("triptych")
