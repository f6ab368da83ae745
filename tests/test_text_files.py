"""Files of prompts and options as people's editors write them."""

import codecs
import dataclasses

import pytest

from ldm.config import read_mapping
from ldm.drawings import read_prompts
from ldm.sample_options import SampleOptions
from ldm.text_files import NotText, read_lines, read_text
from ldm.values import ConfigError

TEXT = "a dog – žluťoučký 犬 🐕\na cat"


@pytest.mark.parametrize("content", [
    TEXT.encode(), TEXT.encode("utf-8-sig"), codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), TEXT.replace("\n", "\r\n").encode() + b"\r\n",
    TEXT.replace("\n", "\r").encode(),
])  # fmt: skip
def test_what_editors_write_is_read(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_lines(tmp_path / "a.txt") == TEXT.split("\n")


@pytest.mark.parametrize("content, words", [
    ("a dog\na café".encode("latin-1"), "a.txt: line 2, character 6: not UTF-8; save the file as UTF-8"),
    (codecs.BOM_UTF16_LE + b"a\0\n\0b\0\x00\xd8c\0", "a.txt: line 2, character 2: not UTF-16LE; save"),
    ("a\nb".encode("utf-16-le"), "a.txt: line 1 holds bytes that are no text"),
])  # fmt: skip
def test_other_encodings_are_refused_by_name_and_place(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(NotText, match=words):
        read_text(tmp_path / "a.txt")


def test_files_of_options_too(tmp_path):
    (tmp_path / "a.json").write_bytes('{"epochs": 2, "instance_prompt": "a café"}'.encode("utf-16"))
    assert read_mapping(tmp_path / "a.json") == {"epochs": 2, "instance_prompt": "a café"}
    (tmp_path / "a.json").write_bytes('{"epochs": 2, "instance_prompt": "a café"}'.encode("cp1252"))
    with pytest.raises(ConfigError, match="a.json: line 1, character 40: not UTF-8; save the file as UTF-8"):
        read_mapping(tmp_path / "a.json")


@pytest.mark.parametrize("prompts, negatives, pairs", [
    ("a\nb\nc\n", "x\n\nz\n", [("a", "x"), ("b", ""), ("c", "z")]),
    ("a\n\nc\n", "x\ny\nz\n", [("a", "x"), ("c", "z")]),  # line n belongs to line n
    ("a\nb\n", "x\n\n", [("a", "x"), ("b", "")]),
    ("a\nb\n\n\n", "x\n", [("a", "x"), ("b", "x")]),
    ("a\nb\nc", "x\n\n", [("a", "x"), ("b", "x"), ("c", "x")]),
    ("a\nb", "", [("a", ""), ("b", "")]),
    ("a\u2028 still a\n", "x", [("a\u2028 still a", "x")]),
    ("a\nb\nc\n", "x\ny\n", "must have 1 line or 3 .line n belongs to line n of the prompts., got 2"),
    ("\n \n", "x", "must hold one prompt per line, got none"),
    ("", "x", "must hold one prompt per line, got none"),
])  # fmt: skip
def test_prompts_and_negative_prompts_belong_together_by_line(tmp_path, prompts, negatives, pairs):
    (tmp_path / "prompts.txt").write_text(prompts, newline="")
    (tmp_path / "negatives.txt").write_text(negatives, newline="")
    options = dataclasses.replace(
        SampleOptions(),
        data_path=str(tmp_path / "prompts.txt"),
        negative_data_path=str(tmp_path / "negatives.txt"),
    )
    if isinstance(pairs, str):
        with pytest.raises(ConfigError, match=pairs):
            read_prompts(options)
    else:
        assert [(line.prompt, line.negative_prompt) for line in read_prompts(options)] == pairs
