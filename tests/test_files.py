"""A file is whole, or as it was."""

import os

import pytest

from echolora_kernels.files import write_text


def test_a_new_file_and_a_replaced_one(tmp_path):
    path = tmp_path / "new" / "file.json"
    for text in ("one\n", "two\r\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_who_may_read_it_is_as_for_any_other_file(tmp_path):
    (tmp_path / "other").write_text("")
    write_text(tmp_path / "file", "")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_all_is_as_it_was(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "file.json"
    path.write_text("before")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(type(error)):
        write_text(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
