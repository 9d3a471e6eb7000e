import pytest

from tests.servers import mlflow


@pytest.fixture(scope="session")
def tracking_server():
    """MLflow with PostgreSQL and a folder for artifacts, behind nginx with Basic Auth."""
    with mlflow.running() as server:
        yield server


@pytest.fixture
def logged_in(tracking_server, monkeypatch):
    """The server, with its address and password in the environment."""
    for name, value in tracking_server.environ.items():
        monkeypatch.setenv(name, value)
    return tracking_server
