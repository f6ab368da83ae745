"""Files that appear whole or not at all, and what is left of those that do not."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ldm import files
from ldm.files import (
    appears_whole,
    cache_folder,
    fingerprint,
    folder_appears_whole,
    partial_path,
    remove_partial_files,
    write_text,
)


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new/file"
    with appears_whole(path) as file:
        file.write(b"some")
        assert not path.exists() and len(list(path.parent.iterdir())) == 1
    assert path.read_bytes() == b"some" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, replace):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError), appears_whole(path, replace=replace) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_is_there_is_not_replaced_unless_asked(tmp_path, monkeypatch, has_links):
    def refuse(*_):
        raise OSError("no hard links here")

    if not has_links:
        monkeypatch.setattr(files.os, "link", refuse)
    path = tmp_path / "file"
    for expected in ("first", "first"):
        try:
            with appears_whole(path, replace=False) as file:
                file.write(expected.encode())
        except FileExistsError:
            assert path.exists()
        assert path.read_text() == expected
        with pytest.raises(FileExistsError), appears_whole(path, replace=False) as file:
            file.write(b"second")
    write_text(path, "third")
    assert path.read_text() == "third" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with folder_appears_whole(tmp_path / "folder") as partial:
        write_text(partial / "file", "x")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder/file").read_text() == "x"
    with pytest.raises(RuntimeError), folder_appears_whole(tmp_path / "other") as partial:
        write_text(partial / "file", "x")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_partial_files_of_processes_that_are_gone_are_removed_and_nothing_else(tmp_path):
    program = "import os; print(os.getpid())"
    gone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip()
    mine = partial_path(tmp_path / "class_00001.png")
    theirs = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{gone}."))
    elsewhere = mine.with_name(f".class_00001.png.another-host.{gone}.part")
    kept = {mine, elsewhere, tmp_path / "class_00000.png", tmp_path / ".notes.part"}
    for path in kept | {theirs}:
        path.write_text("")
    remove_partial_files(tmp_path)
    assert set(tmp_path.iterdir()) == kept
    remove_partial_files(tmp_path, is_locked=True)
    assert set(tmp_path.iterdir()) == {tmp_path / "class_00000.png", tmp_path / ".notes.part"}


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1"), b.write_bytes(b"1")
    assert len({fingerprint([a]), fingerprint([b]), fingerprint([a, b]), fingerprint([])}) == 4
    a.rename(tmp_path / "caf\udce9")  # a name that is no UTF-8
    assert fingerprint([tmp_path / "caf\udce9"]) != fingerprint([b])


def test_a_file_system_that_cannot_say_when_names_are_on_the_disk(tmp_path, monkeypatch):
    """A drive in a network or in user space; an error of the disk is one all the same."""
    fsync = files.os.fsync

    def refuse(handle, number=22):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "fsync")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", refuse)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    monkeypatch.setattr(files.os, "fsync", lambda handle: refuse(handle, 5))
    with pytest.raises(OSError):
        write_text(tmp_path / "b", "x")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dreambooth-mindspore"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/dreambooth-mindspore")
    # a relative one is to be ignored; and a user whom a container does not know has no home
    monkeypatch.setattr(files.os.path, "expanduser", lambda path: path)
    for given in ("here", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == Path(tempfile.gettempdir(), f"cache-{os.getuid()}", "dreambooth-mindspore")
