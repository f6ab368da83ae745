"""Captions: where they are looked for, and what becomes of them."""

import logging

import pytest

from ldm.captions import prompts_of

PROMPT = "a sks dog"


@pytest.fixture
def images(tmp_path):
    names = ["on the beach.png", "on_the_hill_2.jpg", "in the snow (3).png", "class_00007.png"]
    for name in names:
        (tmp_path / name).touch()
    return [tmp_path / name for name in names]


def test_text_files(tmp_path, images):
    (tmp_path / "on the beach.txt").write_text("[prompt] on  the\nbeach, [prompt]\n", encoding="utf-8-sig")
    (tmp_path / "on_the_hill_2.caption").write_text("a hill")
    (tmp_path / "in the snow (3).txt").write_text(" \n")
    assert prompts_of(tmp_path, images, PROMPT, "text_files") == [
        "a sks dog on the beach, a sks dog", "a hill", PROMPT, PROMPT,
    ]  # fmt: skip
    (tmp_path / "on the beach.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="on the beach.txt"):
        prompts_of(tmp_path, images, PROMPT, "text_files")


def test_file_names(tmp_path, images):
    assert prompts_of(tmp_path, images, PROMPT, "file_names") == [
        "on the beach", "on the hill", "in the snow", PROMPT,
    ]  # fmt: skip
    other = [tmp_path / name for name in ("[prompt] asleep.png", "IMG_1234.jpg", "00000.png", "DSC01234.jpg")]
    assert prompts_of(tmp_path, other, PROMPT, "file_names") == ["a sks dog asleep", PROMPT, PROMPT, PROMPT]
    of_class = [tmp_path / "a lazy cat.png", tmp_path / "[prompt] at rest.png"]
    assert prompts_of(tmp_path, of_class, "a dog", "file_names", is_class=True) == ["a dog", "a dog at rest"]


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '{"file_name": "on the beach.png", "text": "[prompt], wet"}\n\n'
                       '{"file_name": "gone.png", "text": "x"}\n'),
    ("metadata.csv", 'file_name,text\non the beach.png,"[prompt], wet"\ngone.png,x\n'),
    ("img_txt.csv", 'dir,text\non the beach.png,"[prompt], wet"\ngone.png,x\n'),
])  # fmt: skip
def test_tables(tmp_path, images, name, text, caplog):
    (tmp_path / name).write_text(text)
    assert prompts_of(tmp_path, images, PROMPT, "table") == ["a sks dog, wet", PROMPT, PROMPT, PROMPT]
    assert "row 2: no such image: gone.png" in caplog.text


@pytest.mark.parametrize("name, text, message", [
    ("metadata.jsonl", "{not", "metadata.jsonl: line 1: not readable as JSON"),
    ("metadata.jsonl", "[1]", "line 1: must be .*file_name"),
    ("metadata.jsonl", '{"file_name": "a.png"}', "row 1 must have file_name"),
    ("metadata.csv", "image,text\na.png,b\n", "row 1 must have file_name"),
])  # fmt: skip
def test_tables_that_are_refused(tmp_path, images, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts_of(tmp_path, images, PROMPT, "table")


def test_a_table_that_is_asked_for_must_be_there(tmp_path, images):
    with pytest.raises(ValueError, match="captions=table, but there is none of metadata.jsonl"):
        prompts_of(tmp_path, images, PROMPT, "table")
    assert prompts_of(tmp_path, images, PROMPT, "table", is_class=True) == [PROMPT] * 4  # of a class


def test_captions_that_are_not_asked_for_are_mentioned_in_one_line(tmp_path, images, caplog):
    caplog.set_level(logging.INFO)
    assert prompts_of(tmp_path, images, PROMPT, "none") == [PROMPT] * 4 and not caplog.text
    (tmp_path / "on the beach.txt").write_text("x")
    assert prompts_of(tmp_path, images, PROMPT, "none") == [PROMPT] * 4
    assert "1 caption files not used (--captions=text_files takes them as prompts)" in caplog.text
    (tmp_path / "on the beach.txt").unlink(), (tmp_path / "metadata.csv").touch()
    prompts_of(tmp_path, images, PROMPT, "none")
    assert "metadata.csv not used (--captions=table" in caplog.text
