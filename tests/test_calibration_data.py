import ast
import json
import re
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcc.calibration_data import contains_answer, describe, digest, held_out, load_prompts, names
from kvcc.calibration_data.code import code
from kvcc.calibration_data.dialogue import dialogue
from kvcc.calibration_data.prompts import Prompt
from kvcc.calibration_data.prose import prose
from kvcc.calibration_data.retrieval_tasks import GENERATORS, Task, needle
from kvcc.calibration_data.sources import chunks
from kvcc.calibration_data.stdlib_text import corpus, is_held_out
from kvcc.calibration_data.vocabulary import domains, passages
from kvcc.errors import DataError

GENERATED = ("prose", "code", "dialogue", "retrieval", "arithmetic")


def render(messages):
    return "".join(f"<{m['role']}>{m['content']}\n" for m in messages)


def load(data, samples=3, length=200, seed=0, **more):
    return load_prompts(str(data), samples=samples, length=length, seed=seed, render=render, **more)


def body(prompt: Prompt) -> str:
    return prompt.text or ""


@pytest.mark.parametrize("name", names())
def test_same_seed_same_prompts_other_seed_other_prompts(name):
    first, again, other = load(name), load(name), load(name, seed=1)
    assert first == again
    assert digest(first) == digest(again) != digest(other)
    assert {body(p) for p in first}.isdisjoint(body(p) for p in other)
    assert len({(p.source, p.index) for p in first}) == 3


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("length", [1, 97, 4096])
def test_texts_reach_the_length_and_do_not_overshoot_wildly(name, length):
    prompts = load(name, samples=5, length=length)
    assert len(prompts) == 5
    for prompt in prompts:
        assert len(body(prompt)) >= 5 * length
        assert len(body(prompt)) <= 6 * length + 9000  # at most one piece too many


def test_prompts_do_not_depend_on_how_many_are_asked_for():
    assert load("mixed", samples=12)[:7] == load("mixed", samples=7)


def test_digest_is_stable_across_versions_of_python():
    """The generated sets are part of a profile's identity: whoever changes them must mean it."""
    prompts = [Prompt("a", None, "x", 0), Prompt(None, ({"role": "user", "content": "é"},), "y", 1)]
    assert digest(prompts) == "f698f65331c6462543b6ff1130360b0b03183f136a2c791cbcd3a762881bef99"
    assert (
        digest(load("mixed", samples=10, length=300))
        == "bfe32bc68138cd0ccfd3b7588a48d80fa9d2177f16b8d69b00a55b622f3faf3a"
    )


def test_digest_sees_every_field_and_the_order():
    a, b = Prompt("a", None, "x", 0), Prompt("b", None, "x", 1)
    variants = [[a, b], [b, a], [a], [Prompt("a", None, "y", 0), b], [Prompt("a", None, "x", 2), b]]
    assert len({digest(variant) for variant in variants}) == len(variants)


def test_describe_names_every_set_in_one_line():
    assert [name for name, _ in describe()] == list(names())
    assert all(line and "\n" not in line for _, line in describe())


def test_mixed_takes_turns_and_equals_its_parts():
    mixed = load("mixed", samples=11)
    assert [p.source for p in mixed[:5]] == list(GENERATED)
    assert [p.index for p in mixed] == [0] * 5 + [1] * 5 + [2]
    assert mixed[5] == load("prose", samples=2)[1]
    assert load(",".join(GENERATED), samples=11) == mixed


def test_dialogue_is_rendered_or_left_as_messages():
    (with_text,) = load("dialogue", samples=1)
    (without,) = load_prompts("dialogue", samples=1, length=200, seed=0)
    assert without.text is None
    assert with_text.messages == without.messages
    assert with_text.text == render(with_text.messages)


@pytest.mark.parametrize("index", range(8))
def test_dialogue_alternates_and_ends_with_the_assistant(index):
    roles = [m["role"] for m in dialogue(0, index, 9000)]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns == ["user", "assistant"] * (len(turns) // 2)
    assert all(m["content"].strip() for m in dialogue(0, index, 9000))


def test_prose_does_not_repeat_itself_within_or_between_samples():
    texts = [prose(3, index, 20_000) for index in range(20)]
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) > 120]
    assert len(set(paragraphs)) == len(paragraphs) > 500


def test_long_prose_has_hardly_a_sentence_twice():
    text = prose(0, 0, 150_000)
    sentences = [s for s in re.split(r"(?<=[.?!])\s+", text) if len(s) > 60]
    assert len(sentences) > 800
    assert len(set(sentences)) > 0.97 * len(sentences)


def test_prose_leaves_no_slot_open_and_uses_every_passage_once():
    joined = "\n".join(prose(0, index, 6000) for index in range(len(passages())))
    assert not re.search(r"[{}|]|  ", joined)
    counts = [joined.count(passage) for passage in passages()]
    assert max(counts) == 1
    assert sum(counts) > 0.6 * len(counts)  # a short sample may end before its passage's turn
    assert sum(map(len, passages())) > 20_000


def test_code_has_no_open_mark_and_its_python_parses():
    for index in range(12):
        text = code(0, index, 6000)
        assert not re.search(r"@[A-Za-z]\w*@", text)
        for piece in text.split("\n\n\n"):
            if piece.startswith(("def ", "class ", "import ")):
                if "HTMLElement" in piece or " from " in piece.split("\n")[0]:
                    continue  # JavaScript
                ast.parse(piece)


def test_arithmetic_is_right():
    text = "\n".join(body(p) for p in load("arithmetic", samples=6, length=2000))
    statements = re.findall(r"(?<![\w*/+(-] )(?<!\w)(\d+) ([-+*]) (\d+) = (\d+)", text)
    assert len(statements) > 300
    for a, sign, b, result in statements:
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert value == int(result), (a, sign, b, result)
    fractions = re.findall(
        r"Add (\S+) and (\S+)\. A common.*\n.*\nIn lowest terms, \S+ equals (\S+)\.\n", text
    )
    assert fractions
    assert all(Fraction(p) + Fraction(q) == Fraction(total) for p, q, total in fractions)


# Held-out texts


def shingles(texts, width=40):
    found = set()
    for text in texts:
        flat = " ".join(text.split())
        found.update(flat[i : i + width] for i in range(len(flat) - width + 1))
    return found


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_held_out_shares_no_forty_characters_with_the_built_in_sets(kind):
    ours = shingles(body(p) for p in load("mixed", samples=60, length=1500))
    theirs = shingles(body(p) for p in held_out(kind, samples=24, length=4000, seed=0))
    assert len(ours) > 200_000
    assert len(theirs) > 100_000
    assert ours.isdisjoint(theirs), sorted(ours & theirs)[:5]


def test_odd_texts_are_five_kinds_that_nothing_else_has():
    texts = [p.text for p in held_out("odd", samples=10, length=100, seed=0)]
    assert texts == [p.text for p in held_out("odd", samples=10, length=100, seed=0)]
    assert len(set(texts)) == 10
    assert all(len(text) >= 4 * 550 for text in texts)
    word, line, delimiters, digits, scripts = texts[:5]
    assert len(set(word.split())) == 1
    assert len(set(line.splitlines())) <= 2
    assert not any(c.isalnum() for c in delimiters)
    assert set(digits) <= set("0123456789abcdef -")
    assert max(map(ord, scripts)) > 0x1F000


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_held_out_and_the_calibration_half_share_no_paragraph(kind):
    def paragraphs(half):
        # More than the whole corpus of topics, so that every one of them is seen.
        texts = corpus(kind, held_out=half, samples=12, chars=30_000, seed=0)
        parts = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
        return {part for part in parts if len(part) > 300}

    mine, other = paragraphs(True), paragraphs(False)
    assert min(len(mine), len(other)) > 100
    assert mine.isdisjoint(other), sorted(mine & other)[:2]


def test_the_halves_depend_on_the_name_alone():
    assert is_held_out("prose", "types") == is_held_out("prose", "types")
    sides = [is_held_out("code", f"module{n}") for n in range(400)]
    assert 140 < sum(sides) < 260


def test_held_out_samples_are_long_and_different():
    prompts = held_out("prose", samples=8, length=1536, seed=0)
    texts = [body(p) for p in prompts]
    assert min(map(len, texts)) >= 1536 * 5
    assert prompts == held_out("prose", samples=8, length=1536, seed=0)
    assert texts != [body(p) for p in held_out("prose", samples=8, length=1536, seed=1)]
    for n, text in enumerate(texts):
        others = shingles(texts[:n] + texts[n + 1 :], 80)
        shared = shingles([text], 80) & others
        assert len(shared) < 0.05 * len(text)


def test_held_out_longer_than_the_corpus_still_reaches_the_length():
    (prompt,) = held_out("prose", samples=1, length=100_000, seed=0)
    assert len(body(prompt)) >= 500_000


def test_held_out_refuses_an_unknown_kind():
    with pytest.raises(DataError, match="use prose, code, odd"):
        held_out("poems", samples=1, length=10, seed=0)


# Files


def test_text_file_gives_contiguous_chunks(tmp_path):
    path = tmp_path / "a, b.txt"  # a comma in a file's name is not a separator
    text = "\n\n".join(f"Paragraph {n} " + "word " * 40 for n in range(100))
    path.write_text(text)
    prompts = load(path, samples=4, length=100)
    assert len(prompts) == 4
    assert text.startswith("".join(body(p) for p in prompts))
    assert all(len(body(p)) >= 500 and body(p).startswith("Paragraph") for p in prompts)
    everything = load(path, samples=10_000, length=100)
    assert "".join(body(p) for p in everything) == text
    assert digest(prompts) == digest(load(path, samples=4, length=100, seed=5))


pieces = st.sampled_from(["word ", "longer-word ", "\n", "\n\n", "\n\n\n", " ", "é", "日本語", ".", "x" * 30])


@given(st.lists(pieces, max_size=80).map("".join), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_chunks_lose_nothing_and_keep_the_order(text, size):
    found = chunks(text, size)
    assert "".join(found) == text
    assert all(len(chunk) >= size for chunk in found[:-1])
    assert not text.strip() or all(chunk.strip() for chunk in found)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_chunks_end_at_paragraphs_when_paragraphs_are_short(lengths):
    text = "\n\n".join("w" * length for length in lengths)
    assert all(chunk.endswith("\n\n") for chunk in chunks(text, 40)[:-1])


def jsonl(tmp_path: Path, *rows) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_text_field_messages_and_blank_rows(tmp_path):
    chat = [{"role": "user", "content": "Hi", "name": "x"}, {"role": "assistant", "content": "Ho"}]
    path = jsonl(
        tmp_path, {"text": "one", "body": "B1"}, "", {"text": "  ", "body": "B2"}, {"messages": chat}
    )
    prompts = load(path)
    assert [p.text for p in prompts] == ["one", "<user>Hi\n<assistant>Ho\n"]
    assert prompts[1].messages == ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    assert [p.text for p in load(path, samples=2, field="body")] == ["B1", "B2"]
    assert [p.index for p in prompts] == [0, 1]


def test_a_line_separator_inside_json_is_not_a_line_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert [p.text for p in load(path)] == ["one\u2028two\x85three"]


def test_files_and_sets_take_turns(tmp_path):
    path = jsonl(tmp_path, {"text": "one"}, {"text": "two"})
    prompts = load(f"prose,{path}", samples=6)
    assert [p.source for p in prompts] == ["prose", str(path), "prose", str(path), "prose"]


BAD_FILES = [
    ("a.txt", b"", "no text"),
    ("a.txt", b" \n\t \n", "no text"),
    ("a.txt", b"abc\0def", "NUL bytes"),
    ("a.txt", b"abc\xff\xfe", "not UTF-8 at byte 3"),
    ("a.csv", b"a,b", r"expected a \.txt or \.jsonl"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: invalid JSON"),
    ("a.jsonl", b"\n" + b"[" * 100_000, "line 2: invalid JSON"),
    ("a.jsonl", b'{"body": "x", "title": "y"}', "no field `text`; fields found: body, title"),
    ("a.jsonl", b"{}", "no field `text`; fields found: none"),
    ("a.jsonl", b"[1]", "line 1: expected a JSON object, found list"),
    ("a.jsonl", b'{"text": 3}', "field `text` is int"),
    ("a.jsonl", b'{"text": ["a"]}', "string `role` and `content`"),
    ("a.jsonl", b'{"text": [{"role": "user"}]}', "string `role` and `content`"),
    ("a.jsonl", b'{"text": " "}\n{"text": []}', "has no text in any line"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_give_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(path, samples=100)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_lists_the_built_in_sets(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt.*prose, code, dialogue") as caught:
        load(tmp_path / "nowhere.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "no data set named"),
        (" , ", "no data set named"),
        ("prose,prose", "twice"),
        ("mixed,code", "twice"),
    ],
)
def test_bad_names(data, message):
    with pytest.raises(DataError, match=message):
        load(data)


def test_folders_and_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a \.txt"):
        load(tmp_path)
    with pytest.raises(DataError, match="at least 1"):
        load("prose", samples=0)
    with pytest.raises(DataError, match="at least 1"):
        held_out("prose", samples=1, length=0, seed=0)


# Hugging Face data sets, with a stand-in for the package


def install(monkeypatch, rows, calls):
    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_rows_are_read_with_split_and_config(monkeypatch):
    calls: list = []
    install(monkeypatch, [{"text": ""}, {"text": "a"}, {"text": "b"}, {"text": "c"}], calls)
    assert [p.text for p in load("hf:some/set@small:test", samples=2)] == ["a", "b"]
    assert load("hf:some/set", samples=1)[0].source == "hf:some/set"
    assert calls == [("some/set", "small", "test", True), ("some/set", None, "train", True)]


def test_hub_errors_are_one_line(monkeypatch):
    install(monkeypatch, ValueError("Unknown split\nmore"), [])
    with pytest.raises(DataError, match=r"hf:a/b:tset: cannot load: Unknown split$"):
        load("hf:a/b:tset")
    install(monkeypatch, [{"body": "x"}], [])
    with pytest.raises(DataError, match="fields found: body"):
        load("hf:a/b")
    install(monkeypatch, [{"text": ""}], [])
    with pytest.raises(DataError, match="no text"):
        load("hf:a/b")
    with pytest.raises(DataError, match="names no data set"):
        load("hf:")


def test_missing_datasets_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'kvcc\[hub\]'"):
        load("hf:some/set")


# Retrieval tasks


@pytest.mark.parametrize("kind", sorted(GENERATORS))
@pytest.mark.parametrize("words", [150, 1200])
@pytest.mark.parametrize("depth", [0.0, 0.5, 0.9, 1.0])
def test_the_fact_stands_once_at_its_depth(kind, words, depth):
    for index in range(6):
        task = GENERATORS[kind](7, index, words, depth=depth)
        assert task.depth == depth
        assert task.context.count(task.answer) == 1
        at = len(task.context[: task.context.index(task.answer)].split()) / len(task.context.split())
        # A fact is moved to the nearest sentence; the other facts of its kind shift it too.
        assert abs(at - depth) < (0.06 if words > 1000 else 0.2)
        assert words <= len(task.context.split()) < words + 160
        assert task.answer in task.candidates
        assert len(set(task.candidates)) == len(task.candidates) >= 4


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_tasks_follow_the_seed_and_spread_over_depths_and_answers(kind):
    generate = GENERATORS[kind]
    tasks = [generate(0, index, 200) for index in range(24)]
    assert tasks == [generate(0, index, 200) for index in range(24)]
    assert tasks[0].context != generate(1, 0, 200).context
    assert len({task.answer for task in tasks}) == 24
    quarters = [int(task.depth * 4) for task in tasks]
    assert all(4 <= quarters.count(quarter) <= 8 for quarter in range(4))
    assert len({task.candidates.index(task.answer) for task in tasks}) >= 3


def test_key_value_distractors_stand_in_the_text_and_needle_ones_do_not():
    records = GENERATORS["key_value"](0, 0, 400)
    assert all(records.context.count(candidate) == 1 for candidate in records.candidates)
    owner = records.question.removeprefix("What is the number of the locker of ").rstrip("?")
    assert f"{owner} has the number {records.answer}." in records.context
    lone = needle(0, 0, 400)
    assert sum(candidate in lone.context for candidate in lone.candidates) == 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.97, 1.0])
def test_variable_tracking_can_be_solved_by_reading_once(depth):
    for index in range(10):
        task = GENERATORS["variable_tracking"](0, index, 300, depth=depth)
        values: dict[str, str] = {}
        for name, verb, source in re.findall(r"Let the variable (\w+) (be|equal) (\w+)\.", task.context):
            values[name] = source if verb == "be" else values[source]  # KeyError: a copy before its source
        asked = re.findall(r"variable (\w+)\?", task.question)[0]
        assert values[asked] == task.answer
        assert sorted(set(values.values())) == sorted(task.candidates)


def test_haystacks_of_evaluation_use_other_words_than_calibration():
    calibration = {event for domain in domains("calibration") for event in (*domain.event, *domain.truth)}
    evaluation = {event for domain in domains("evaluation") for event in (*domain.event, *domain.truth)}
    assert calibration.isdisjoint(evaluation)
    context = needle(0, 0, 3000).context
    assert not any(phrase in context for phrase in calibration)
    assert any(phrase in context for phrase in evaluation)


ANSWERS = [
    ("The code is 48213.", True),
    ("48,213", True),
    ("it is 482135", False),
    ("148213", False),
    ("", False),
    ("Not 11111 but 48213", False),
    ("48213, and not 11111", True),
]


@pytest.mark.parametrize(("generated", "right"), ANSWERS)
def test_contains_answer(generated, right):
    task = Task("needle", "", "", "48213", 0.5, ("11111", "48213"))
    assert contains_answer(generated, task) is right


def test_contains_answer_ignores_case_but_not_word_ends():
    task = Task("word", "", "", "amber", 0.5, ("amber", "jade"))
    assert contains_answer("AMBER!", task)
    assert not contains_answer("ambergris", task)
