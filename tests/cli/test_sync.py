"""`wmtp sync` on real servers: what is copied, what is printed, and how it ends."""

import json
import os
import subprocess
import sys
import time

import pytest

SECRET = "p1anted-s3cret"


@pytest.fixture
def folder(tmp_path):
    """A few files: small, empty, nested, of an odd name, and one of several parts."""
    root = tmp_path / "source"
    (root / "logs" / "deep").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"a" * 10)
    (root / "empty").write_bytes(b"")
    (root / "logs" / "x.log").write_bytes(b"x" * 20)
    (root / "logs" / "deep" / "y é.log").write_bytes(b"y" * 30)
    (root / "big.bin").write_bytes(bytes(range(256)) * 40_000)
    return root


def address(server):
    """`(url, variables)` of an empty bucket."""
    bucket = server.make_bucket()
    if server.provider == "local":
        return bucket, {}
    scheme = {"s3": "s3", "gcs": "gs", "azure": "az"}[server.provider]
    return f"{scheme}://{bucket}/team/copy", server.variables(bucket)


@pytest.fixture(params=["directory", "s3"])
def place(request):
    return address(request.getfixturevalue(f"{request.param}_server"))


def content(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("provider", ["directory", "s3", "gcs", "azure"])
def test_there_and_back(command, folder, request, provider, tmp_path):
    url, variables = address(request.getfixturevalue(f"{provider}_server"))
    first = command("sync", "push", folder, url, **variables)
    assert first.stdout.startswith("5 uploaded (10.2 MB in ")
    assert first.stdout.endswith("0 are the same\n")
    second = json.loads(command("sync", "push", folder, url, "--json", **variables).stdout)
    assert (second["done"], second["bytes"], second["failed"]) == ({"skip": 5}, 0, [])
    back = tmp_path / "back"
    command("sync", "pull", url, back, **variables)
    assert content(back) == content(folder)
    assert command("sync", "pull", url, back, **variables).stdout == "nothing to do; 5 are the same\n"
    # either side may be named first
    for sides in ((back, url), (url, back)):
        assert command("sync", "verify", *sides, **variables).stdout.startswith("5 files are the same, 0 differ")


def test_only_what_changed_travels_and_the_rest_goes_only_when_asked(command, folder, place):
    url, variables = place
    command("sync", "push", folder, url, **variables)
    (folder / "a.txt").write_bytes(b"b" * 10)
    (folder / "empty").unlink()
    planned = command("sync", "push", folder, url, "--delete", "--dry-run", **variables).stdout
    assert planned.splitlines()[-1] == "would be: 1 uploaded, 1 deleted; 3 are the same"
    assert "upload                 10  a.txt" in planned
    assert "delete                  0  empty" in planned
    assert command("sync", "push", folder, url, **variables).stdout.startswith("1 uploaded (0.0 MB")
    assert command("sync", "push", folder, url, "--delete", **variables).stdout.startswith("1 deleted; 4 are")


def test_include_and_exclude(command, folder, place):
    url, variables = place
    command("sync", "push", folder, url, "--include", "*.log", "--include", "a.txt", "--exclude", "deep/*", **variables)
    command("sync", "push", folder, url, "--include", "logs/", "--exclude", "x.log", **variables)
    listed = json.loads(command("sync", "ls", url, "--json", **variables).stdout)
    assert [line["key"] for line in listed] == ["a.txt", "logs/deep/y é.log", "logs/x.log"]


def test_ls(command, folder, place):
    url, variables = place
    assert command("sync", "ls", url, **variables).stdout == "0 objects, 0.0 MB\n"
    assert json.loads(command("sync", "ls", url, "--json", **variables).stdout) == []
    command("sync", "push", folder, url, **variables)
    lines = command("sync", "ls", url, **variables).stdout.splitlines()
    assert [line.split(maxsplit=3)[-1] for line in lines[:-1]] == sorted(content(folder))
    assert lines[1].split()[0] == "10,240,000"
    assert lines[-1] == "5 objects, 10.2 MB"
    listed = json.loads(command("sync", "ls", f"{url}/logs", "--json", **variables).stdout)
    assert [(line["key"], line["size"]) for line in listed] == [("deep/y é.log", 30), ("x.log", 20)]
    assert listed[0]["modified"].endswith("+00:00")


def test_what_differs_ends_with_78(command, folder, place, tmp_path):
    url, variables = place
    command("sync", "push", folder, url, **variables)
    (folder / "a.txt").write_bytes(b"b" * 10)
    (folder / "new").write_bytes(b"1")
    (folder / "empty").unlink()
    done = command("sync", "verify", folder, url, code=78, **variables)
    assert {line.split(":")[0] for line in done.stdout.splitlines()[:-1]} == {
        "differs  a.txt",
        "differs  new",
        "differs  empty",
    }
    assert done.stdout.splitlines()[-1].startswith("3 files are the same, 3 differ")
    report = json.loads(command("sync", "verify", folder, url, "--json", code=78, **variables).stdout)
    assert {line["key"] for line in report["failed"]} == {"a.txt", "new", "empty"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push", "none", "bucket"], ["there is no folder 'none'"]),
        (["push", "s3://b/p", "here"], ["is a URL, and no folder", "wmtp sync push FOLDER URL; `wmtp sync pull`"]),
        (["pull", "bucket", "s3://b/p"], ["is a URL, and no folder", "wmtp sync pull URL FOLDER"]),
        (["push", "file", "bucket"], ["is a file, and no folder", "--include file"]),
        (["push", "empty", "bucket", "--delete"], ["'empty' has no files that take part, and --delete would empty"]),
        (["push", "shell", "bucket", "--delete"], ["'shell' has no files that take part, and --delete would empty"]),
        (["push", "full", "bucket", "--delete", "--include", "*.lgo"], ["no files that take part"]),
        (["pull", "shell", "here", "--delete"], ["there is nothing", "check the URL"]),
        (["pull", "full", "here", "--delete", "--include", "*.lgo"], ["there is nothing"]),
        (["pull", "full/file", "here"], ["is a file, and no folder", "full --include file"]),
        (["push", "full", "s3:bucket"], ["'s3:bucket' is no URL", "write s3://bucket, or ./s3:bucket for a folder"]),
        (["pull", "gs:/b/p", "here"], ["'gs:/b/p' is no URL", "write gs://b/p"]),
        (["verify", "az:/b", "full"], ["write az://b"]),
        (["ls", "s3:b"], ["write s3://b"]),
        (["pull", "none", "here"], ["there is no folder 'none'"]),
        (["pull", "bucket", "here", "--delete"], ["there is nothing", "check the URL"]),
        (["ls", "none"], ["there is no folder 'none'"]),
        (["ls", "file:///no/folder"], ["there is no folder 'file:///no/folder'"]),
        (["ls", "ftp://x/y"], ["ftp:// is no kind of bucket", "s3://bucket/prefix"]),
        (["verify", "s3://a/b", "gs://c/d"], ["both are URLs"]),
        (["verify", "empty", "bucket"], ["there is nothing"]),
        (["push", "empty", "bucket", "--set", "cloud.concurency=3"], ["did you mean cloud.concurrency?"]),
        (["ls", "s3://x", "--set", "cloud.endpoint_url=http://h"], ["is without TLS"]),
    ],
)
def test_mistakes_are_said_in_one_line(command, tmp_path, arguments, words):
    here = tmp_path / "here"
    for name in ("empty", "bucket", "full", "shell/sub/deep"):
        (here / name).mkdir(parents=True)
    for name in ("full/file", "shell/.lock", "shell/sub/.tmp-x"):
        (here / name).write_bytes(b"1")
    (here / "file").write_bytes(b"1")
    done = command("sync", *arguments, code=78)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


def test_no_such_bucket_and_wrong_credentials(command, folder, s3_server):
    bucket = s3_server.make_bucket()
    variables = s3_server.variables(bucket)
    for arguments in (["push", folder, "s3://no-such-bucket/x"], ["ls", "s3://no-such-bucket/x"]):
        assert "no-such-bucket" in command("sync", *arguments, code=78, **variables).stderr
    wrong = variables | {"AWS_SECRET_ACCESS_KEY": SECRET}
    for arguments in (["push", folder], ["ls"]):
        done = command("sync", *arguments, f"s3://{bucket}", code=78, **wrong)
        assert done.stderr.startswith("error: ")
        assert SECRET not in done.stdout + done.stderr


def test_markers_of_folders_are_nothing_to_pull(command, s3_server, seaweed, tmp_path):
    bucket = s3_server.make_bucket()
    for key in ("logs/", "logs/deep/"):
        seaweed.client().put_object(Bucket=bucket, Key=key, Body=b"")
    precious = tmp_path / "folder" / "precious"
    precious.parent.mkdir()
    precious.write_bytes(b"1")
    for arguments in (["pull", f"s3://{bucket}/logs", precious.parent, "--delete"], ["pull", f"s3://{bucket}", "here"]):
        assert "there is nothing" in command("sync", *arguments, code=78, **s3_server.variables(bucket)).stderr
    assert precious.exists()


@pytest.mark.parametrize("provider", ["s3", "gcs", "azure"])
def test_the_url_of_an_object_says_how_to_get_it(command, folder, request, provider):
    url, variables = address(request.getfixturevalue(f"{provider}_server"))
    command("sync", "push", folder, url, "--include", "x.log", **variables)
    for arguments in (["pull", f"{url}/logs/x.log", "here"], ["ls", f"{url}/logs/x.log"]):
        said = command("sync", *arguments, code=78, **variables).stderr
        assert "x.log is an object, and no prefix" in said
        assert f"write {url}/logs --include x.log" in said


def test_an_endpoint_alone_is_enough_for_a_url(command, s3_server):
    bucket = s3_server.make_bucket()
    endpoint = f"cloud.endpoint_url={s3_server.endpoint}"
    shown = command("sync", "ls", f"s3://{bucket}", "--set", endpoint, **s3_server.environ).stdout
    assert shown == "0 objects, 0.0 MB\n"


@pytest.mark.parametrize("provider", ["s3", "gcs"])
def test_a_provider_alone_is_enough_for_a_url(command, folder, s3_server, provider, tmp_path):
    variables = s3_server.variables(bucket := s3_server.make_bucket()) | {"CLOUD_PROVIDER": provider}
    variables.pop("WMTP_CLOUD__BUCKET")
    if provider == "s3":
        command("sync", "push", folder, f"s3://{bucket}/x", **variables)
        assert "5 objects" in command("sync", "ls", f"s3://{bucket}", **variables).stdout
        command("sync", "pull", f"s3://{bucket}/x", tmp_path / "back", **variables)
        assert content(tmp_path / "back") == content(folder)
        command("sync", "verify", folder, f"s3://{bucket}/x", **variables)
    # a folder needs none either
    assert "5 objects" in command("sync", "ls", folder, **variables).stdout
    # what has no URL does
    assert "set CLOUD_BUCKET" in command("assets", "ls", code=78, **variables).stderr


def test_odd_characters_do_not_reach_the_terminal(command, tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "\x1b[31mred").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    for arguments, code in ((["ls", bucket], 0), (["verify", tmp_path / "empty", bucket], 78)):
        shown = command("sync", *arguments, code=code).stdout
        assert "\x1b" not in shown
        assert "\\x1b[31mred" in shown


def test_a_listing_that_nobody_reads_to_the_end_just_ends(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    for number in range(5000):
        (bucket / f"{number:060}").touch()
    program = f"{sys.executable} -m wmtp_worker sync ls {bucket} | head -n 2; echo ${{PIPESTATUS[0]}}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "CLOUD_"))}
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environ
    )
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


def test_a_bar_on_a_terminal_and_none_in_a_pipe(command, folder, tmp_path):
    assert command("sync", "push", folder, tmp_path / "bucket").stderr == ""
    ours, theirs = os.openpty()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "CLOUD_"))}
    arguments = [sys.executable, "-m", "wmtp_worker", "sync", "pull", str(tmp_path / "bucket"), str(tmp_path / "back")]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=theirs, timeout=180, cwd=tmp_path, env=environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert done.returncode == 0
    assert b"pull " in shown
    assert done.stdout.startswith(b"5 downloaded")
