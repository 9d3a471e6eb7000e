"""What the pages say is what the code does."""

import ast
import json
import re
from pathlib import Path

import pytest

from wmtp_worker.errors import EXIT_CODES
from wmtp_worker.settings import load

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def anchor_of(heading):
    """GitHub's: lower case, spaces become hyphens, all other punctuation goes."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", page.read_text())
    for target, anchor in links:
        path = page.parent / target
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in set(map(anchor_of, headings))


def test_every_page_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    pages = [str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if page not in readme] == []


def test_the_readme_has_the_exit_codes():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == dict(EXIT_CODES)


def test_each_message_that_troubleshooting_explains_is_one_of_ours():
    source = "\n".join(
        re.sub(r"\"\n\s*f?\"|\s+", lambda found: "" if '"' in found[0] else " ", path.read_text())
        for path in [*ROOT.glob("wmtp_worker/**/*.py"), *ROOT.glob("entrypoint/*.sh")]
    )
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)`", page, re.MULTILINE)
    assert len(messages) > 15
    pieces = [piece.strip(" ;,") for message in messages for piece in message.split("…")]
    assert [piece for piece in pieces if piece and piece not in source] == []


def test_each_setting_that_a_message_names_is_there():
    settings = set(load(environ={}).flat())
    settings |= {name.rpartition(".")[0] for name in settings}
    # sections that are no file's and no object's name as well
    named = re.compile(r"(?<![\w./])(?:parallel|host|training|evaluation|logging)(?:\.[a-z_]+)+(?!\w|/)")
    wrong = []
    for path in ROOT.glob("wmtp_worker/**/*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                names = (name for name in named.findall(node.value) if not name.endswith(".log"))
                wrong += [f"{path.name}:{node.lineno}: {name}" for name in names if name not in settings]
    assert wrong == []


def test_each_benchmark_is_in_the_list_and_records_its_machine():
    page = (ROOT / "benchmarks/README.md").read_text()
    scripts = {path.name: path.read_text() for path in ROOT.glob("benchmarks/*.py")}
    assert [name for name, text in scripts.items() if "__main__" in text and f"`{name}`" not in page] == []
    listed = re.findall(r"^\| `(\w+\.py)` ", page, re.MULTILINE)
    assert listed
    assert [name for name in listed if "record(" not in scripts[name]] == []


def operations_of_s3():
    """What the code calls on S3's client, as boto3 names it; obstore's get and put are GetObject and PutObject."""
    found = {"get_object", "put_object"}
    for path in ROOT.glob("wmtp_worker/storage/s3*.py"):
        text = path.read_text()
        found |= set(
            re.findall(r"control\.((?:head|get|put|list|copy|delete|create|upload|complete|abort)_\w+)\(", text)
        )
        found |= set(re.findall(r"get_paginator\(\"(\w+)\"\)", text))
    return found - {"get_paginator"}


# https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
S3_ACTIONS = {
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "complete_multipart_upload": {"s3:PutObject"},
    "copy_object": {"s3:GetObject", "s3:PutObject"},
    "create_multipart_upload": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject"},
    "get_object": {"s3:GetObject"},
    "head_bucket": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "list_objects_v2": {"s3:ListBucket"},
    "list_parts": {"s3:ListMultipartUploadParts"},
    "put_object": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
}


def test_the_policy_allows_what_the_code_calls_on_s3_and_nothing_else():
    page = (ROOT / "docs/hosts/ec2.md").read_text()
    policy, of_instances = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    called = operations_of_s3()
    assert called <= set(S3_ACTIONS), "say in S3_ACTIONS which action the new operation needs"
    assert allowed == {action for operation in called for action in S3_ACTIONS[operation]}
    on_buckets = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
    for statement in policy["Statement"]:
        assert statement["Resource"].endswith("/*") != (set(statement["Action"]) <= on_buckets)
    assert set(of_instances["Statement"][0]["Action"]) == {"ec2:StopInstances", "ec2:TerminateInstances"}


def test_the_costs_of_the_example_add_up():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/hosts/costs.md").read_text(), re.MULTILINE | re.DOTALL)
    names, told = {}, []
    for line in "".join(blocks).splitlines():
        exec(line, names)
        if result := re.search(r"# = ([\d,.]+)$", line):
            told.append((line, result[1], f"{names[line.split()[0]]:,.2f}"))
    assert len(told) > 15
    assert [one for one in told if one[1] != one[2]] == []
