import io
import sys

import pytest

from rapm.errors import UserError
from rapm.prompts import read_prompts


def test_one_prompt_a_line_in_order_without_blanks_and_repetitions(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dög \na cat\n\t\nein Haus, 家\u2028still one line".encode())
    assert read_prompts(path) == ["a cat", "a dög", "ein Haus, 家\u2028still one line"]


def test_dash_is_the_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_prompts("-") == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf\n"])
def test_no_prompt_is_a_user_error(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.txt is empty"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["a cat\nein Brötchen\n".encode("latin-1"), "a\nb".encode("utf-16")])
def test_not_utf8_names_the_line(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"line [12] of .*prompts.txt is not UTF-8") as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "reason"), [("missing.txt", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"cannot read .*{reason}"):
        read_prompts(tmp_path / name)
