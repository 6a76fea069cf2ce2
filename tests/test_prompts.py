import io
import json
import random
import re
import sys
import tracemalloc

import numpy as np
import pytest

from rapm.errors import UserError
from rapm.prompts import BUNDLED, LINE_BYTES, Row, load_prompts, read_prompts
from rapm.zoo.make_prompts import make_prompts, read_groups


def test_one_prompt_a_line_in_order_without_blanks_and_repetitions(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dög \na cat\n\t\nein Haus, 家\u2028still one line".encode())
    assert read_prompts(path) == ["a cat", "a dög", "ein Haus, 家\u2028still one line"]
    assert str(load_prompts(path)) == f"3 in {path}, 1 repeated ones left out"


def test_dash_is_the_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_prompts("-") == ["one", "two"]


def test_the_first_ones_are_kept_and_all_are_counted(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i % 700}\n" for i in range(1000)))
    prompts = load_prompts(path, keep=5)
    assert prompts.texts == [f"prompt {i}" for i in range(5)] and (prompts.total, prompts.different) == (1000, 700)
    assert load_prompts(path, keep=800).texts == read_prompts(path)


def test_a_long_file_streams(tmp_path):
    """Of what is not kept eight bytes a line stay: 60,000 lines of a kilobyte cost less than two of their 60 MB."""
    path = tmp_path / "prompts.txt"
    with path.open("w") as file:
        file.writelines(f"{i} {'x' * 1000}\n" for i in range(60_000))
    tracemalloc.start()
    prompts = load_prompts(path, keep=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts.rows) == 10 and prompts.different == 60_000 and peak < 2e6


CAPTIONS = [("a cat, asleep", "blurry"), ("a dog", ""), ("", "blurry"), ("a cat, asleep", ""), ("a dog", "")]
EXPECTED = [Row("a cat, asleep", "blurry"), Row("a dog"), Row("a cat, asleep")]


def table(path, rows=CAPTIONS, names=("caption", "negative_prompt")):
    """`rows` in `path`, beside a column of numbers, as its suffix says."""
    names = ("id", *names)
    rows = [(i, *row) for i, row in enumerate(rows)]
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    else:
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        cells = [mark.join(f'"{cell}"' for cell in row) for row in [names, *rows]]
        path.write_text("\r\n".join(cells), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables(tmp_path, suffix):
    path = table(tmp_path / f"t{suffix}")
    prompts = load_prompts(path)
    assert prompts.rows == EXPECTED and (prompts.total, prompts.different) == (4, 3)
    assert load_prompts(f"{path}:caption", keep=1).rows == EXPECTED[:1]
    assert "1 with a negative prompt of their own" in str(prompts)
    for column in ("nothing", "id" if suffix == ".parquet" else "Caption"):
        with pytest.raises(UserError, match=f"no column '{column}' .*give FILE:COLUMN"):
            load_prompts(f"{path}:{column}")
    table(path, names=("text", "caption"))
    with pytest.raises(UserError, match=r"no column that is plainly the prompts' .*text, caption"):
        load_prompts(path)
    assert load_prompts(f"{path}:text").texts == ["a cat, asleep", "a dog"]
    table(path, names=("Prompt", "other"))
    assert load_prompts(path).texts == ["a cat, asleep", "a dog"]


def test_a_column_without_a_name_is_one(tmp_path):
    """Coverage-guided fuzzing found it: such a row had no cells at all."""
    (tmp_path / "t.jsonl").write_text('{"": "a cat"}\n')
    assert read_prompts(tmp_path / "t.jsonl") == ["a cat"]
    assert load_prompts(table(tmp_path / "t.parquet", names=("", "negative_prompt"))).rows == EXPECTED


def test_cells_of_several_lines_short_rows_and_semicolons(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id;caption\n1;"a cat\nand a dog; both asleep"\n2\n3;a bird\n')
    assert read_prompts(path) == ["a cat and a dog; both asleep", "a bird"]
    (tmp_path / "t.jsonl").write_text('{"caption": "a cat\\nand a dog"}\n{"id": 2}\n{"caption": null}\n')
    assert read_prompts(tmp_path / "t.jsonl") == ["a cat and a dog"]


def test_a_colon_in_a_file_name_is_no_column(tmp_path):
    (tmp_path / "a:b").write_text("a cat\n")
    (tmp_path / "t.csv:caption").write_text("a dog\n")
    assert read_prompts(tmp_path / "a:b") == ["a cat"] and read_prompts(tmp_path / "t.csv:caption") == ["a dog"]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow$"):
        load_prompts(tmp_path / "t.parquet")


LONG = b"a cat\n" + b"x" * (LINE_BYTES + 1)
NOISE = random.Random(0).randbytes(5000)
BAD = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b"\n \r\n\t\n", "is empty"),
    "mark.txt": (b"\xef\xbb\xbf\n", "is empty"),
    "latin.txt": ("a cat\nein Brötchen\n".encode("latin-1"), "line 2 of .* is not UTF-8"),
    "utf16.txt": ("a\nb".encode("utf-16"), "line 1 of .* is not UTF-8"),
    "utf16le.txt": ("a\nb".encode("utf-16-le"), "line 1 of .* holds a NUL byte"),
    "nul.txt": (b"a cat\na\0dog\n", "line 2 of .* holds a NUL byte"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 1 of .* is not UTF-8"),
    "noise.bin": (NOISE, "is not UTF-8|holds a NUL byte"),
    "long.txt": (LONG, f"line 2 of .* more than {LINE_BYTES} bytes"),
    "cut.txt": (b"x" * (LINE_BYTES - 1) + "家\n".encode(), f"line 1 of .* more than {LINE_BYTES} bytes"),
    "list.json": (b'["a cat"]', "is JSON: write one object a line"),
    "empty.csv": (b"", "no column that is plainly the prompts'"),
    "header.csv": (b"caption\n", "is empty"),
    "headless.csv": (b"a cat\na dog\n", r"no column that is plainly the prompts' \(a cat\)"),
    "quote.csv": (b'caption\n"a cat\n' + b"a dog\n" * 30_000, "line .* is not CSV"),
    "nul.csv": (b"caption\na\0cat\n", "line 2 of .* holds a NUL byte"),
    "broken.jsonl": (b'{"caption": "a cat"}\n{"caption": "a', "line 2 of .* is not JSON"),
    "array.jsonl": (b'["a cat"]\n', "line 1 of .* is not a JSON object"),
    "number.jsonl": (b'{"caption": 5}\n', "line 1 of .*: caption is not text"),
    "nul.jsonl": (b'{"caption": "a\\u0000cat"}\n', "a NUL or half a character in it: 'a"),
    "half.jsonl": (b'{"caption": "a cat \\ud83d"}\n', "a NUL or half a character in it: 'a cat"),
    "long.csv": (b'caption\n"' + b"a cat\n" * 12_000 + b'"\n', f"a prompt of more than {LINE_BYTES} characters"),
    "deep.jsonl": (b'{"caption": ' + b"[" * 60_000, "line 1 of .* is not JSON"),
    "empty.parquet": (b"", "is not a readable parquet file"),
    "broken.parquet": (b"PAR1" + bytes(100) + b"PAR1", "is not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_list_of_prompts_is_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(("name", "reason"), [("missing.txt", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"cannot read .*{reason}"):
        read_prompts(tmp_path / name)


def test_the_bundled_list():
    """At least 2,000 different prompts as the script makes them, none nearly another, all short, of every category."""
    prompts = load_prompts(BUNDLED)
    made = make_prompts()
    assert prompts.texts == [prompt for _, prompt in made] and prompts.total == prompts.different >= 2000
    words = [set(re.findall(r"[a-z0-9-]+", prompt.lower())) for prompt in prompts.texts]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    table = np.zeros((len(words), len(vocabulary)), dtype=np.float32)
    for row, mine in zip(table, words, strict=True):
        row[[vocabulary[word] for word in mine]] = 1
    shared, size = table @ table.T, table.sum(1)
    likeness = shared / (size[:, None] + size - shared) - np.eye(len(words))
    assert likeness.max() < 0.7 and len(vocabulary) > 1000
    for prompt in prompts.texts:
        # a token of CLIP's for every three letters begun is more than any of these words takes
        assert 2 + sum(-(-len(word) // 3) for word in re.findall(r"\w+|[^\w\s]", prompt)) <= 77
        assert prompt == " ".join(prompt.split()) and prompt.isascii() and not re.search(r"[#@*{}]", prompt)
        assert not re.search(r"\ba ([aeio]|u(?!ni))|\ban (?!hour)[^aeiouA]|\b(\w+) \2\b", prompt), prompt
    categories = {group.category for group in read_groups()}
    for part in (made[:250], made[-250:]):  # whichever part trajectories use
        assert {category for category, _ in part} == categories
    shares = [sum(category == one for category, _ in made) / len(made) for one in categories]
    assert len(categories) > 15 and min(shares) > 0.01 and max(shares) < 0.1
