import pytest

from dist_siglip.data.remote import connections
from tests.support.servers import serve


@pytest.fixture
def server(monkeypatch):
    """A web server, and retries without pauses."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(connections, "_FIRST_PAUSE_SECONDS", 0.01)
    with serve() as running:
        yield running
