"""A file is whole, or as it was."""

import os

import pytest

from echolora_kernels.files import write_text


def test_a_new_file_and_a_replaced_one(tmp_path):
    path = tmp_path / "new" / "file.json"
    for text in ("one\n", "two\r\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode() and path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


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
