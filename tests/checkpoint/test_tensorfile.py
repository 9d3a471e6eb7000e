"""Our safetensors files against the stock library."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from wmtp_worker.checkpoint.staging import Buffers, Content, Copies
from wmtp_worker.checkpoint.tensorfile import LiveFile, digest_of, read_file, write_file

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8)


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"x.{dtype}": (torch.rand(5, 3, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "ünïcode": torch.ones(1),
    }


def staged(contents):
    buffers, copies = Buffers(), Copies()
    buffers.lay_out(contents)
    buffers.fill(contents, copies)
    copies.wait()
    copies.synchronize()
    return buffers.files


@pytest.mark.parametrize("live", [True, False], ids=["live", "staged"])
def test_the_stock_library_reads_what_we_write(tmp_path, live):
    tensors = some_tensors()
    source = LiveFile(tensors) if live else staged({"f": Content(tensors)})["f"]
    entry = write_file(tmp_path / "f", source, lambda size: None)
    data = (tmp_path / "f").read_bytes()
    loaded = load_file(tmp_path / "f")
    assert loaded.keys() == tensors.keys()
    assert all(
        loaded[name].dtype == value.dtype and torch.equal(loaded[name], value) for name, value in tensors.items()
    )
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert digest_of(source) == entry
    assert source.nbytes == len(data)


def test_the_bytes_are_those_of_the_stock_serialiser(tmp_path):
    tensors = {"b": torch.rand(3, 4), "a": torch.ones(7, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    write_file(tmp_path / "f", LiveFile(tensors), lambda size: None)
    assert (tmp_path / "f").read_bytes() == save(tensors)


def test_metadata_is_in_the_header_and_does_not_misalign(tmp_path):
    content = Content(some_tensors(), {"pieces": '{"a": 1}'})
    write_file(tmp_path / "f", staged({"f": content})["f"], lambda size: None)
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert opened.metadata() == {"pieces": '{"a": 1}'}
    loaded = load_file(tmp_path / "f")
    assert all(torch.equal(loaded[name], value) for name, value in content.tensors.items())


def test_a_file_without_tensors(tmp_path):
    write_file(tmp_path / "f", staged({"f": Content({})})["f"], lambda size: None)
    assert load_file(tmp_path / "f") == {}


def test_buffers_are_kept_where_the_layout_is_the_same():
    buffers = Buffers()
    buffers.lay_out({"a": Content({"x": torch.zeros(3)}), "b": Content({"y": torch.zeros(2)})})
    first, gone = buffers.files["a"], buffers.files["b"]
    buffers.lay_out({"a": Content({"x": torch.ones(3)}), "b": Content({"y": torch.zeros(4)})})
    assert buffers.files["a"] is first
    assert buffers.files["b"] is not gone
    buffers.lay_out({"a": Content({"x": torch.ones(3, dtype=torch.int32)})})
    assert set(buffers.files) == {"a"}
    assert buffers.files["a"] is not first


def test_what_was_written_is_read_and_hashed_in_one_pass(tmp_path):
    tensors, sizes = some_tensors() | {"large": torch.arange(5 << 20)}, []
    entry = write_file(tmp_path / "f", LiveFile(tensors, {"pieces": "{}"}), lambda size: None)
    found, loaded = read_file(tmp_path / "f", sizes.append)
    assert found == entry
    assert sum(sizes) == entry.size
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert torch.equal(loaded[name], value)
        # as what torch makes itself: the last bits of a matrix product may depend on it
        assert loaded[name].data_ptr() % 64 == 0
    assert len({value.untyped_storage().data_ptr() for value in loaded.values() if value.numel()}) == len(tensors) - 1


def test_a_file_of_the_stock_library_is_read(tmp_path):
    tensors = {"b": torch.rand(3, 4), "a": torch.ones(7, dtype=torch.bfloat16)}
    (tmp_path / "f").write_bytes(save(tensors))
    assert all(
        torch.equal(value, tensors[name]) for name, value in read_file(tmp_path / "f", lambda size: None)[1].items()
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b'"F32"', b'"F64"'),
        lambda data: data.replace(b"[3,4]", b"[9,9]"),
        lambda data: data.replace(b"[3,4]", b"[-3]"),
        lambda data: data.replace(b"[3,4]", b"[[]]"),
        lambda data: data.replace(b"[0,48]", b"[8,56]"),
        lambda data: data.replace(b'{"dtype"', b'["dtype"'),
    ],
)
def test_what_is_no_such_file_is_hashed_only(tmp_path, damage):
    data = damage(save({"b": torch.rand(3, 4)}))
    (tmp_path / "f").write_bytes(data)
    entry, tensors = read_file(tmp_path / "f", lambda size: None)
    assert tensors is None
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_damaged_tensor_has_another_digest(tmp_path):
    entry = write_file(tmp_path / "f", LiveFile({"b": torch.zeros(3, 4)}), lambda size: None)
    data = bytearray((tmp_path / "f").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f").write_bytes(data)
    assert read_file(tmp_path / "f", lambda size: None)[0].sha256 != entry.sha256


def test_the_reading_may_be_ended(tmp_path):
    write_file(tmp_path / "f", LiveFile(some_tensors()), lambda size: None)

    def heed(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_file(tmp_path / "f", heed)


def test_an_error_between_blocks_ends_the_writing(tmp_path):
    def heed(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "f", LiveFile(some_tensors()), heed)


@pytest.mark.gpu
def test_copies_from_a_gpu_come_before_what_is_queued_after_the_gate():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tensors = {f"x{number}": torch.full((1 << 22,), 1.0, device="cuda") for number in range(20)}
    contents = {"f": Content(tensors)}
    buffers, copies = Buffers(), Copies()
    buffers.lay_out(contents)
    assert buffers.files["f"].memory.is_pinned()
    buffers.fill(contents, copies)
    copies.wait()
    for value in tensors.values():
        value.fill_(2.0)
    copies.synchronize()
    assert all((view == 1).all() for view in buffers.files["f"].views.values())
