"""From settings, or a URL, to a store."""

import pytest

from wmtp_worker.errors import SettingsError
from wmtp_worker.storage.open import open_store, open_url, settings_of_url
from wmtp_worker.storage.retry import RetryingStore


class Test_opening:
    def test_from_settings_it_tries_again(self, s3_server, use_environ):
        use_environ(s3_server.environ)
        bucket = s3_server.make_bucket()
        store = open_store(s3_server.cloud(bucket, prefix="team"))
        assert isinstance(store, RetryingStore)
        store.put("key", b"x")
        store.close()
        store = open_url(f"s3://{bucket}/team/", s3_server.cloud("other"))
        assert [info.key for info in store.list()] == ["key"]
        assert store.url == f"s3://{bucket}/team"
        store.close()

    def test_what_is_said_of_one_provider_is_not_said_of_another(self, s3_server):
        cloud = s3_server.cloud("bucket", sse="AES256", region="eu-west-3", patience=7)
        same = settings_of_url("s3://other/a/b", cloud)
        assert (same.bucket, same.prefix, same.endpoint_url, same.sse) == ("other", "a/b", s3_server.endpoint, "AES256")
        other = settings_of_url("gs://other", cloud)
        assert (other.provider, other.bucket, other.prefix) == ("gcs", "other", "")
        assert (other.endpoint_url, other.sse, other.region, other.patience) == (None, None, None, 7)
        path = settings_of_url("some/folder", cloud)
        assert (path.provider, path.bucket, path.prefix) == ("local", "some/folder", "")
        assert settings_of_url("file:///some/folder", cloud).bucket == "/some/folder"
        assert settings_of_url("az://container/x", cloud).provider == "azure"

    @pytest.mark.parametrize(
        "url", ["", "s3://", "s3:///key", "ftp://host/x", "https://host/x", "s3://bucket/../x", "file://host/x", "a\0b"]
    )
    def test_what_is_no_url(self, s3_server, url):
        with pytest.raises(SettingsError) as caught:
            settings_of_url(url, s3_server.cloud("bucket"))
        assert caught.value.fix

    def test_credentials_in_a_url_are_refused_and_not_repeated(self, s3_server):
        with pytest.raises(SettingsError) as caught:
            settings_of_url("s3://key:sesame@bucket/x", s3_server.cloud("bucket"))
        assert "sesame" not in f"{caught.value} {caught.value!r}"
