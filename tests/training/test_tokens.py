"""Tokens that are kept on the disk: the same ones, made once, whatever happens to the files."""

import logging
import os
from multiprocessing import get_context

import numpy as np
import pytest

from wmtp_worker.assets.resolve import dataset_folder, tokenizer_folder
from wmtp_worker.data.tokenizer import Sample, load_tokenizer
from wmtp_worker.errors import Interrupted
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import tokens_dir
from wmtp_worker.training.splits import load_split
from wmtp_worker.training.tokens import Cache, Tokens


def some(count=3):
    samples = [Sample(np.arange(n + 2, dtype=np.int32), n, n, 1.0 if n % 2 else float("nan")) for n in range(count)]
    return Tokens(samples, [None, 0, 7][:count])


def plain(tokens):
    samples = [(s.ids.tolist(), s.ids.dtype, s.prompt_length, s.problem, repr(s.reward)) for s in tokens.samples]
    return samples, list(tokens.difficulties)


class Maker:
    """Counts how often samples are made."""

    def __init__(self, samples=None):
        self.count, self.made = 0, some() if samples is None else samples

    def __call__(self):
        self.count += 1
        return self.made


def the_file(workdir):
    (path,) = tokens_dir(workdir).glob("*/tokens.safetensors")
    return path


def test_the_second_time_nothing_is_made(tmp_path):
    make = Maker()
    first = Cache(tmp_path, ("facts",)).tokens(make, lambda: None)
    second = Cache(tmp_path, ("facts",)).tokens(make, lambda: None)
    assert make.count == 1
    assert plain(first) == plain(second) == plain(some())
    assert os.listdir(the_file(tmp_path).parent) == ["tokens.safetensors"]


def test_other_facts_other_tokens(tmp_path):
    make = Maker()
    for facts in (("a", "b"), ("ab",), ("a", None)):
        Cache(tmp_path, facts).tokens(make, lambda: None)
    assert make.count == 3


@pytest.mark.parametrize("where", [0, 9, 100, -1])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, where):
    make = Maker()
    Cache(tmp_path, ()).tokens(make, lambda: None)
    content = bytearray(the_file(tmp_path).read_bytes())
    content[where] ^= 1
    the_file(tmp_path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert plain(Cache(tmp_path, ()).tokens(make, lambda: None)) == plain(some())
    assert make.count == 2
    assert "damaged: made anew" in caplog.text
    assert Cache(tmp_path, ()).tokens(make, lambda: None) is not None
    assert make.count == 2


def test_a_file_cut_short_is_made_anew(tmp_path):
    make = Maker()
    Cache(tmp_path, ()).tokens(make, lambda: None)
    os.truncate(the_file(tmp_path), 50)
    assert plain(Cache(tmp_path, ()).tokens(make, lambda: None)) == plain(some())


def test_what_was_stopped_leaves_nothing_behind(tmp_path):
    def stopped():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        Cache(tmp_path, ()).tokens(stopped, lambda: None)
    assert list(tokens_dir(tmp_path).glob("*/*")) == []


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    make = Maker()
    assert plain(Cache(tmp_path, ()).tokens(make, lambda: None)) == plain(some())
    assert make.count == 1
    assert "not kept" in caplog.text


def test_nothing_to_keep(tmp_path):
    assert Cache(tmp_path, ()).tokens(Maker(some(0)), lambda: None) == some(0)


def _make_slowly(workdir, made):
    import time

    def make():
        time.sleep(0.5)
        made.put(os.getpid())
        return some()

    assert plain(Cache(workdir, ()).tokens(make, lambda: None)) == plain(some())


def test_of_two_at_once_one_waits_for_the_other(tmp_path):
    context = get_context("fork")
    made = context.Queue()
    processes = [context.Process(target=_make_slowly, args=(tmp_path, made)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert made.get(timeout=5)
    assert made.empty()


def test_a_split_is_the_same_from_the_cache(tiny_settings, tmp_path):
    def split(*overrides):
        settings = load(overrides=[*tiny_settings, *overrides], options={"run.workdir": str(tmp_path)}, environ={})
        tokenizer = load_tokenizer(tokenizer_folder(settings))
        return load_split(settings, dataset_folder(settings), "train", tokenizer, lambda: None)

    first, second = split(), split()
    assert plain(first.samples) == plain(second.samples)
    assert first.sampler.rows(0) == second.sampler.rows(0)
    assert len(list(tokens_dir(tmp_path).iterdir())) == 1
    split("data.solutions=all")
    assert len(list(tokens_dir(tmp_path).iterdir())) == 2
