import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty directory to work in: no .env of a developer's own is read."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
