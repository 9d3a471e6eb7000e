"""Names and paths of models, tokenizers and datasets, and what a digest covers."""

import os
import shutil

import pytest

from wmtp_worker.assets.resolve import dataset_digest, dataset_folder, model_folder, tokenizer_folder
from wmtp_worker.data.formats import read_split
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.settings import load


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """`settings("key=value", …)`: settings whose work directory is `work/` below an empty current directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load(overrides=["run.workdir=work", *overrides], environ={})


KINDS = pytest.mark.parametrize(
    ("key", "resolve", "root"),
    [
        ("data.dataset", dataset_folder, "datasets"),
        ("model.path", model_folder, "models"),
        ("model.tokenizer", tokenizer_folder, "models"),
    ],
)


def test_sample_is_in_the_package(settings):
    folder = dataset_folder(settings("data.dataset=sample"))
    assert {any(True for _ in read_split(folder, split)) for split in ("train", "validation")} == {True}
    # whatever a folder of that name may hold
    (settings().run.workdir / "datasets" / "sample").mkdir(parents=True)
    assert dataset_folder(settings("data.dataset=sample")) == folder


@KINDS
def test_name_under_the_work_directory(settings, tmp_path, key, resolve, root):
    (tmp_path / "work" / root / "mine").mkdir(parents=True)
    assert resolve(settings(f"{key}=mine")) == tmp_path / "work" / root / "mine"


@KINDS
def test_a_hub_name_has_a_folder_of_its_own(settings, tmp_path, key, resolve, root):
    plain = tmp_path / "org" / "mine"
    nested = tmp_path / "work" / root / "org" / "mine"
    cached = tmp_path / "work" / root / "org--mine"
    for folder in (plain, nested, cached):  # each goes before the one before
        folder.mkdir(parents=True)
        assert resolve(settings(f"{key}=org/mine")) == folder
    assert resolve(settings(f"{key}=org--mine")) == cached


@KINDS
@pytest.mark.parametrize("form", ["absolute", "relative", "home"])
def test_path(settings, tmp_path, monkeypatch, key, resolve, root, form):
    folder = tmp_path / "some where" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = {"absolute": folder, "relative": "some where/mine", "home": "~/some where/mine"}[form]
    found = resolve(settings(f"{key}={wanted}"))
    assert found == folder
    assert found.is_absolute()


@KINDS
def test_name_goes_before_a_folder_of_that_name_here(settings, tmp_path, key, resolve, root):
    (tmp_path / "mine").mkdir()
    assert resolve(settings(f"{key}=mine")) == tmp_path / "mine"
    (tmp_path / "work" / root / "mine").mkdir(parents=True)
    assert resolve(settings(f"{key}=mine")) == tmp_path / "work" / root / "mine"


@KINDS
def test_neither_names_both_places(settings, tmp_path, key, resolve, root):
    with pytest.raises(InputError, match=rf"{key}='mine' is not there") as caught:
        resolve(settings(f"{key}=mine"))
    assert str(tmp_path / "work" / root / "mine") in caught.value.where
    assert str(tmp_path / "mine") in caught.value.where
    assert f"set {key}" in caught.value.fix


def test_dataset_may_be_a_single_file(settings, tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.touch()
    assert dataset_folder(settings(f"data.dataset={path}")) == path


def test_no_model_path_means_none_and_the_packaged_tokenizer(settings):
    assert model_folder(settings()) is None
    assert tokenizer_folder(settings()) == PACKAGED
    assert load_tokenizer(tokenizer_folder(settings())).eos_token_id == 2


def test_tokenizer_comes_from_the_model_unless_it_is_set(settings, tmp_path):
    for name in ("model", "tokenizer"):
        (tmp_path / "work" / "models" / name).mkdir(parents=True)
    assert tokenizer_folder(settings("model.path=model")).name == "model"
    assert tokenizer_folder(settings("model.path=model", "model.tokenizer=tokenizer")).name == "tokenizer"


# --- digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"first\nsecond\n")
    (tmp_path / "validation.jsonl").write_bytes(b"third\n")
    return tmp_path


def test_equal_content_elsewhere_has_the_same_digest(folder, tmp_path):
    before = dataset_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "train.jsonl", (1, 1))
    assert dataset_digest(copy) == before


def test_files_that_are_not_read_do_not_count(folder):
    before = dataset_digest(folder)
    (folder / "test.jsonl").write_bytes(b"held out")
    (folder / "README.md").write_bytes(b"words")
    assert dataset_digest(folder) == before


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("change", ["byte", "longer", "shorter"])
def test_any_changed_byte_changes_the_digest(folder, name, change):
    before = dataset_digest(folder)
    content = (folder / name).read_bytes()
    changed = {"byte": b"F" + content[1:], "longer": content + b"\n", "shorter": content[:-1]}[change]
    (folder / name).write_bytes(changed)
    assert dataset_digest(folder) != before


def test_moving_a_line_from_one_split_to_the_other_changes_the_digest(folder):
    before = dataset_digest(folder)
    (folder / "train.jsonl").write_bytes(b"first\n")
    (folder / "validation.jsonl").write_bytes(b"second\nthird\n")
    assert dataset_digest(folder) != before


def test_swapping_the_splits_changes_the_digest(folder):
    before = dataset_digest(folder)
    train, validation = ((folder / f"{split}.jsonl").read_bytes() for split in ("train", "validation"))
    (folder / "train.jsonl").write_bytes(validation)
    (folder / "validation.jsonl").write_bytes(train)
    assert dataset_digest(folder) != before


def test_single_file_has_a_digest_too(folder):
    path = folder / "mbpp.jsonl"
    path.write_bytes(b"one")
    before = dataset_digest(path)
    assert dataset_digest(folder) == before  # the single file goes before the split files
    path.write_bytes(b"two")
    assert dataset_digest(path) != before
