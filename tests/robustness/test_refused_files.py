"""What the system refuses is one error that names the file; earlier files stay as they are."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import onnx
import pytest
from fuzz_cases import X, good, network, wide

import amct_pytorch as amct
from amct_pytorch import files
from amct_pytorch.errors import AmctError, FileAccessError
from amct_pytorch.export.onnx_file import load_onnx, save_onnx
from amct_pytorch.files import WholeFiles, write_whole

LONG = "x" * 300


@pytest.fixture(autouse=True)
def in_a_folder_with_good_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "m.onnx", "record.txt", "net_deploy_model.onnx"):
        Path(name).write_bytes(good(name))
    Path("file").write_bytes(b"")
    Path("folder").mkdir()


def content():
    """Every file but the log; temporary ones too."""
    found = (p for p in Path().rglob("*") if p.is_file() and "amct_log" not in p.parts)
    return {str(p): p.read_bytes() for p in found}


def create(path):
    amct.create_quant_config(path, network(), X)


def quantize_to_onnx(path):
    amct.quantize_model("config.json", path, "r.txt", network(), X)


def quantize_to_record(path):
    amct.quantize_model("config.json", "n.onnx", path, network(), X)


def save(path):
    amct.save_model("m.onnx", "record.txt", path)


def to_qdq(path):
    amct.deploy_to_qdq("net_deploy_model.onnx", path)


def decompose(path):
    amct.auto_decomposition(wide(), path, rank_policy="flops")


WRITERS = [create, quantize_to_onnx, quantize_to_record, save, to_qdq, decompose]


@pytest.mark.parametrize("call", WRITERS)
@pytest.mark.parametrize("path", ["file/x", LONG, f"folder/{LONG}", "/dev/null/x", "/proc/x"])
def test_places_where_no_file_can_be(call, path):
    before = content()
    with pytest.raises(FileAccessError) as caught:
        call(path)
    assert path in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert content() == before


@pytest.mark.parametrize("call", [call for call in WRITERS if call is not save])
def test_a_folder_is_no_file(call):
    with pytest.raises(AmctError, match="folder"):
        call("folder")


@pytest.mark.parametrize("call", WRITERS)
def test_names_of_other_scripts_and_with_spaces(call):
    call("网络 模型/第 一层 ü")
    assert [name for name in content() if name.startswith("网络 模型/第 一层 ü")]


def with_limit(call, path, limit, queue):
    """Runs a call in a process that may write no file beyond a size (EFBIG, not a signal)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        call(path)
        queue.put(("no error", ""))
    except BaseException as error:
        queue.put((type(error).__name__, str(error)))


LIMITS = [(create, 100), (quantize_to_record, 2000), (save, 3000), (to_qdq, 2000), (decompose, 300)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit is for a forked process")
@pytest.mark.parametrize(("call", "limit"), LIMITS)
def test_a_disk_that_takes_no_more(call, limit):
    """A real error of the system, in the middle of writing."""
    call("kept")
    before = content()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=with_limit, args=(call, "kept", limit, queue))
    child.start()
    kind, text = queue.get(timeout=100)
    child.join()
    assert kind == "FileAccessError", text
    assert "File too large" in text
    assert content() == before


@pytest.mark.parametrize("call", WRITERS)
def test_interrupted_by_the_user(call, monkeypatch):
    call("kept")
    before = content()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.TemporaryFile, "fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("kept")
    assert content() == before


def test_a_link_stays_one(monkeypatch):
    Path("link.json").symlink_to("folder/real.json")
    create("link.json")
    assert Path("link.json").is_symlink()
    assert Path("folder/real.json").read_bytes() == good("config.json")


def test_files_that_belong_together_are_exchanged_together():
    write_whole("a", b"old")
    with pytest.raises(FileAccessError), WholeFiles() as together:
        together.write("a", b"new")
        together.write("file/b", b"new")
    assert Path("a").read_bytes() == b"old"


def test_a_dead_process_s_temporary_file_is_removed_a_living_one_s_is_not():
    target = Path("a").absolute()
    first = files.TemporaryFile.claim(target)
    second = files.TemporaryFile.claim(target)
    assert first.path != second.path
    os.close(first._descriptor)  # as the system does when a process dies
    first._descriptor = None
    assert first.path.exists()
    third = files.TemporaryFile.claim(target)
    assert third.path == first.path
    assert second.path.exists()
    for temporary in (second, third):
        temporary.discard()
    assert not list(Path().glob(".amct-*"))


def test_no_model_file_ever_stands_beside_another_s_tensors(monkeypatch):
    old, new = (onnx.load_from_string(good("m.onnx")) for _ in range(2))
    for tensor in new.graph.initializer:
        tensor.raw_data = bytes(len(tensor.raw_data))
    save_onnx(old, "big.onnx", largest_file=1000)
    seen = []
    replace = Path.replace

    def watched(self, target):
        seen.append(Path("big.onnx").exists())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    save_onnx(new, "big.onnx", largest_file=1000)
    assert len(seen) > 1
    assert not any(seen)
    loaded = load_onnx("big.onnx")
    assert [t.raw_data for t in loaded.graph.initializer] == [
        t.raw_data for t in new.graph.initializer
    ]


def write_often(letter):
    for _ in range(150):
        with WholeFiles() as together:
            for name in ("a", "b"):
                together.write(name, letter.encode() * 100_000, announce=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")
def test_two_processes_that_write_the_same_files():
    write_whole("a", b"")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(letter,)) for letter in "xy"]
    for writer in writers:
        writer.start()
    reads = set()
    while any(writer.is_alive() for writer in writers):
        data = Path("a").read_bytes()
        reads.add((len(data), bytes(set(data))))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reads <= {(0, b""), (100_000, b"x"), (100_000, b"y")}
    assert not list(Path().glob(".amct-*"))
