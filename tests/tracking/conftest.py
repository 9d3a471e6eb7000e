import pytest

from tests.servers import mlflow


@pytest.fixture(scope="session")
def tracking_server(s3_server):
    """MLflow with PostgreSQL and a bucket for artifacts, behind nginx with Basic Auth."""
    address = {**s3_server.environ, "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint}
    with mlflow.running(f"s3://{s3_server.make_bucket()}/mlflow-artifacts", address) as server:
        yield server


@pytest.fixture
def logged_in(tracking_server, monkeypatch):
    """The server, with its address and password in the environment."""
    for name, value in tracking_server.environ.items():
        monkeypatch.setenv(name, value)
    return tracking_server
