import logging
import os
import stat
from pathlib import Path

import pytest

from amct_pytorch import files
from amct_pytorch.errors import (
    AmctError,
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    FileAccessError,
    FileMissingError,
    RecordError,
)
from amct_pytorch.files import check_writable, read_text, write_whole

needs_permissions = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_written_and_its_folders_made(tmp_path, caplog):
    target = tmp_path / "a" / "b" / "c.json"
    write_whole(str(target), b"text")
    assert target.read_bytes() == b"text"
    assert entries(tmp_path) == ["a", "a/b", "a/b/c.json"]
    assert not caplog.records


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_whole(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_overwriting_is_one_warning_that_names_the_file_and_keeps_the_mode(tmp_path, caplog):
    target = tmp_path / "c.json"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    [record] = caplog.records
    assert record.name == "amct_pytorch"
    assert record.levelno == logging.WARNING
    assert str(target) in record.getMessage()


def test_a_flow_that_rewrites_its_own_file_can_be_quiet(tmp_path, caplog):
    write_whole(tmp_path / "c", b"1")
    write_whole(tmp_path / "c", b"2", announce=False)
    assert not caplog.records


def test_a_writer_gets_a_path_in_the_same_folder(tmp_path):
    seen = []

    def writer(path):
        seen.append(path)
        path.write_text("by hand")

    write_whole(tmp_path / "c", writer)
    assert seen[0].parent == tmp_path
    assert seen[0].name != "c"
    assert (tmp_path / "c").read_text() == "by hand"
    assert entries(tmp_path) == ["c"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_when_a_writer_fails_the_old_file_stays_and_nothing_else(tmp_path, error, caplog):
    (tmp_path / "c").write_bytes(b"old")

    def writer(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        write_whole(tmp_path / "c", writer)
    assert (tmp_path / "c").read_bytes() == b"old"
    assert entries(tmp_path) == ["c"]
    assert not caplog.records


def test_a_full_disk_is_an_access_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileAccessError, match=r"record_file: .*r\.txt.*No space left"):
        write_whole(tmp_path / "r.txt", b"x", what="record_file")
    assert entries(tmp_path) == []


def test_a_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_checking_creates_nothing(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    assert check_writable(tmp_path / "x" / "y" / "z", "config_file") == tmp_path / "x" / "y" / "z"
    check_writable(tmp_path / "old", "config_file")
    assert entries(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_relative_name_without_a_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_whole("c.json", b"x")
    assert entries(tmp_path) == ["c.json"]


@pytest.mark.parametrize(
    "call", [check_writable, lambda path, what: write_whole(path, b"", what=what)]
)
class TestRefusedTargets:
    def check(self, call, path, *parts):
        with pytest.raises(FileAccessError) as caught:
            call(path, "record_file")
        assert isinstance(caught.value, OSError)
        for part in ("record_file", str(path), *parts):
            assert part in str(caught.value)

    def test_a_folder(self, call, tmp_path):
        self.check(call, tmp_path, "it is a folder")

    def test_a_parent_that_is_a_file(self, call, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        self.check(call, tmp_path / "file" / "x", "file", "not a folder")
        self.check(call, tmp_path / "file" / "x" / "y", "file", "not a folder")

    def test_a_device(self, call, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        self.check(call, tmp_path / "pipe", "not a regular file")
        self.check(call, Path(os.devnull), "not a regular file")

    def test_a_name_too_long(self, call, tmp_path):
        self.check(call, tmp_path / ("x" * 300))

    @needs_permissions
    def test_a_read_only_folder(self, call, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        self.check(call, tmp_path / "locked" / "x", "not writable")
        self.check(call, tmp_path / "locked" / "y" / "x", "not writable")

    @needs_permissions
    def test_a_read_only_file(self, call, tmp_path):
        (tmp_path / "c").write_bytes(b"")
        (tmp_path / "c").chmod(0o400)
        self.check(call, tmp_path / "c", "read-only")


def test_what_the_system_says_of_folders_is_heeded(tmp_path, monkeypatch):
    """The permission test for those who run the tests as root."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(FileAccessError, match="not writable"):
        check_writable(tmp_path / "a" / "b", "save_path")


@pytest.mark.parametrize("call", [check_writable, read_text])
@pytest.mark.parametrize("path", [None, 3, b"c.json", ["c.json"], True])
def test_paths_of_other_types(call, path):
    with pytest.raises(
        ArgumentTypeError, match=rf"config_file .*{type(path).__name__}.*str"
    ) as caught:
        call(path, "config_file")
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("call", [check_writable, read_text])
@pytest.mark.parametrize("path", ["", "folder/", "a\0b"])
def test_paths_that_name_no_file(call, path):
    with pytest.raises(ArgumentValueError, match="config_file"):
        call(path, "config_file")


def test_reading_drops_a_byte_order_mark(tmp_path):
    (tmp_path / "c").write_bytes("\ufeffgrüße 层".encode())
    assert read_text(tmp_path / "c", "config_file") == "grüße 层"


def test_a_missing_file(tmp_path):
    with pytest.raises(FileMissingError, match=r"config_file.*nothing\.json") as caught:
        read_text(tmp_path / "nothing.json", "config_file")
    assert isinstance(caught.value, FileNotFoundError)


def test_reading_a_folder(tmp_path):
    with pytest.raises(FileAccessError, match=r"config_file: cannot read"):
        read_text(tmp_path, "config_file")


@pytest.mark.parametrize("error", [ConfigError, RecordError])
def test_text_that_is_not_utf8(tmp_path, error):
    (tmp_path / "c").write_bytes(b"one\ntwo \xff")
    with pytest.raises(error, match="c: line 2: not UTF-8") as caught:
        read_text(tmp_path / "c", "config_file", error=error)
    assert isinstance(caught.value, AmctError)
