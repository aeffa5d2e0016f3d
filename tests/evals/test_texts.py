"""Texts: files of each kind, what is wrong with them, and excerpts."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest

from mlx_kvprune.evals import texts

WORDS = SimpleNamespace(encode=lambda text: text.split())


def test_each_kind_of_file(tmp_path):
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("Grüße.\n", encoding="utf-8")
        assert texts.documents(tmp_path / name) == ["Grüße.\n"]
    lines = "\n".join(json.dumps({"id": i, "text": f"text {i}"}) for i in range(2))
    (tmp_path / "c.jsonl").write_text(lines + "\n\n")
    assert texts.documents(tmp_path / "c.jsonl") == ["text 0", "text 1"]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts.documents(str(tmp_path / "d.jsonl.gz")) == ["text 0", "text 1"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.pdf", b"x", "not a known kind"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt", b" \n", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "line 2"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": 3}', "line 1"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        texts.documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        texts.documents(tmp_path / "none.txt")


def test_the_shipped_document_and_its_absence(tmp_path, monkeypatch):
    assert len(texts.documents()[0]) > 10_000
    monkeypatch.setattr(texts, "__file__", str(tmp_path / "site-packages" / "mlx_kvprune" / "evals" / "texts.py"))
    with pytest.raises(ValueError, match="--data FILE"):
        texts.documents()


def test_an_excerpt_is_of_the_first_text_that_is_long_enough():
    assert texts.excerpt(WORDS, ["a b", "c d e f", "g h i j k"], 3) == ["c", "d", "e"]
    with pytest.raises(ValueError, match="got 4 at most"):
        texts.excerpt(WORDS, ["a b", "c d e f"], 5)


def test_sentences():
    found = texts.sentences(['One  two.\nThree "four!" Five\n\nSix', "Seven?  Eight."], 1000)
    assert found == ["One two.", 'Three "four!"', "Five", "Six", "Seven?", "Eight."]
    assert texts.sentences(["One. Two. Three."], 8) == ["One.", "Two."]


def test_benchmarks_are_read_as_they_are(tmp_path):
    lines = [
        {"context": "A text.", "input": "Who?", "answers": ["Ann", "Anna"], "length": 2},  # LongBench
        {"context": "B text.", "question": "Where?", "answers": {"text": ["here"], "answer_start": [0]}},  # SQuAD
        {"input": "What?", "context": "C text.", "outputs": ["48213"]},
        {"document": "D text.", "query": "When?", "answer": 1912},
        {"text": "E text."},
        {"input": "F text.", "question": "How?", "target": "so"},  # BABILong
        {"index": 0, "input": "G text. G again.\nWhich number? It is\n", "outputs": ["12", "34"], "length": 9},  # RULER
        {"input": "I text.\nI again.\nWhich one?\n\nAnswer:", "outputs": ["12"]},  # RULER with a template
        {"instruction": "Sum up.", "input": "J text.\nJ again.", "output": "J."},
    ]
    path = tmp_path / "bench.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    (tmp_path / "plain.txt").write_text("H text.")
    found = texts.loaded([path, tmp_path / "plain.txt"])
    assert [(d.text[0], d.question, d.answers) for d in found] == [
        ("A", "Who?", ("Ann", "Anna")),
        ("B", "Where?", ("here",)),
        ("C", "What?", ("48213",)),
        ("D", "When?", ("1912",)),
        ("E", "", ()),
        ("F", "How?", ("so",)),
        ("G", "Which number? It is", ("12", "34")),
        ("I", "Which one? Answer:", ("12",)),
        ("J", "", ("J.",)),
        ("H", "", ()),
    ]
    assert [d.name for d in found] == ["bench"] * 9 + ["plain"]
    assert found[6].text == "G text. G again." and found[8].text == "J text.\nJ again."
    assert [d.every for d in found] == [False, False, True, False, False, False, True, True, False, False]


def test_excerpts_take_every_text_in_turn():
    got = texts.excerpts(WORDS, ["a b c d", "e f", "g h i"], 2, 4)
    assert got == [["a", "b"], ["e", "f"], ["g", "h"], ["c", "d"]]
    seeds = [texts.excerpts(WORDS, ["a b c d e f", "g h"], 2, 1, seed)[0][0] for seed in range(5)]
    assert seeds == ["a", "g", "c", "e", "a"], "others with another seed, until there are no more"
    with pytest.raises(ValueError, match="got 4; try --texts 4"):
        texts.excerpts(WORDS, ["a b c d", "e f", "g h i"], 2, 5)


def test_other_forms_of_answers_and_questions(tmp_path):
    lines = [
        {"text": "A.", "question": "How many?", "answer": 0},
        {"text": "B.", "question": "Is it?", "answer": False},
        {"text": "C.", "question": "Who?", "answer": {"value": "Ann", "aliases": ["Anna", "Ann"]}},  # TriviaQA
        {"text": "D.", "question": "Who?", "answers": [{"text": " Ann ", "answer_start": 3}]},
        {"text": "E.", "question": "", "input": "Which?", "answers": [], "answer": "this"},
        {"context": " ", "text": "F.", "question": "What?", "answer": "that"},
        {"input": "G.\nMore of it.", "instructions": ["Who?", "Why?"], "outputs": ["Ann", "So."]},  # L-Eval
        {
            "input": "Answer the question based on the given documents.\n\nH.\nWho?",
            "outputs": ["Ann", "Anna"],
        },  # RULER's QA
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = texts.loaded([path])
    assert [(d.text[0], d.question, d.answers, d.every) for d in found] == [
        ("A", "How many?", ("0",), False),
        ("B", "Is it?", ("False",), False),
        ("C", "Who?", ("Ann", "Anna"), False),
        ("D", "Who?", ("Ann",), False),
        ("E", "Which?", ("this",), False),
        ("F", "What?", ("that",), False),
        ("G", "", ("Ann", "So."), False),
        ("A", "Who?", ("Ann", "Anna"), False),
    ]
    path.write_text('{"text": "a \\ud800 b"}')
    with pytest.raises(ValueError, match="line 1"):
        texts.loaded([path])


def test_a_text_of_long_words_is_read_as_far_as_needed():
    """Tables have many characters to a token; which excerpt is the first does not depend on how many are taken."""
    table = "\n".join(" " * 40 + str(i) for i in range(100))
    assert texts.excerpts(WORDS, [table], 30, 1) == texts.excerpts(WORDS, [table], 30, 3)[:1]
    with pytest.raises(ValueError, match="got 100 at most; try --tokens or --haystack 100"):
        texts.excerpt(WORDS, [table], 200)
