"""Text to tokens and back, and chat templates, from an artifact's tokenizer folder; without transformers."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvcc.errors import ArtifactError
from kvcc.runtime.strict_json import parse_json

MAX_TOKENIZER_BYTES = 256 << 20
MAX_SETTINGS_BYTES = 1 << 20  # of settings, and of a chat template
MAX_RESULT = 1 << 20  # of what one operator in a chat template makes
_TEMPLATE_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt"}
_GENERATION: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
}
_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no whole character


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, the chat template that goes with it (or None), and the model's generation defaults."""

    backend: tokenizers.Tokenizer
    template: jinja2.Template | None
    special_tokens: dict[str, str]  # by name: bos_token, eos_token, …
    eos_token_ids: tuple[int, ...]
    generation: dict[str, Any]  # those of do_sample, temperature, top_k, top_p that the model sets

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_settings.json and chat_template.jinja (optional) of `folder`.

        Raises ArtifactError when a file is missing or malformed.
        """
        folder = Path(folder)
        backend = _backend(folder / "tokenizer.json")
        settings = _settings(folder / "tokenizer_settings.json")
        path = folder / "chat_template.jinja"
        return cls(
            backend=backend,
            template=_compile(_text(_read(path), path), path) if path.exists() else None,
            special_tokens=settings["special_tokens"],
            eos_token_ids=tuple(settings["eos_token_ids"]),
            generation=settings["generation"],
        )

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. special_tokens: with what the tokenizer adds by itself (a BOS, for some).

        Text that `chat` made already has its special tokens: give False. Raises ArtifactError for a tokenizer that
        fails on the text, such as one without a token for what it does not know.
        """
        with _refusing("the tokenizer fails on this text"):
            return list(self.backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Text of `ids`, without special tokens unless asked. Bytes that are no character become U+FFFD."""
        with _refusing("the tokenizer fails on these tokens"):
            return str(self.backend.decode(list(ids), skip_special_tokens=not special_tokens))

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, [{"role": …, "content": …}, …].

        add_generation_prompt: end with the start of the assistant's answer. Raises ArtifactError when the
        model has no chat template, or its template fails on or rejects these messages.
        """
        if self.template is None:
            raise ArtifactError("this model has no chat template; give it plain text")
        try:
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ArtifactError(f"the chat template rejects these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ArtifactError(f"the chat template fails on these messages: {error}") from error


@dataclass
class DecodeStream:
    """Text of tokens that arrive one by one. The pieces joined are the text decoded at once.

    (Except for invalid UTF-8 from a SentencePiece tokenizer, whose decoder would take back text it gave.)
    Characters whose bytes are not all there yet are held back. context: tokens just before the first one, so
    that its leading space is kept.
    """

    tokenizer: Tokenizer
    context: Sequence[int] = ()
    _ids: list[int] = field(init=False)  # a short tail of the tokens seen …
    _shown: str = field(init=False)  # … and how much of its text is out

    def __post_init__(self) -> None:
        self._ids = list(self.context)[-8:]
        self._shown = self.tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        ready = text.rstrip(_BROKEN)
        piece = ready[len(self._shown) :]
        if len(ready) > len(self._shown):
            self._shown = ready
        # The last token alone carries on if it has text: with nothing before, decoders drop a leading space.
        if ready == text and (tail := self.tokenizer.decode([token])) and _BROKEN not in tail:
            self._ids, self._shown = [token], tail
        return piece

    def finish(self) -> str:
        """What was held back: U+FFFD for bytes that never became a character."""
        text = self.tokenizer.decode(self._ids)
        piece = text[len(self._shown) :]
        self._ids, self._shown = [], ""
        return piece


def _read(path: Path, limit: int = MAX_SETTINGS_BYTES) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise ArtifactError(f"{path}: more than {limit:,} bytes")
    return data


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8 text") from error


def _backend(path: Path) -> tokenizers.Tokenizer:
    text = _text(_read(path, MAX_TOKENIZER_BYTES), path)
    with _refusing(f"{path}: not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()  # prompts stay whole, and as long as they are, whatever the file was saved with
    backend.no_padding()
    return backend


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make what the tokenizers library raises an ArtifactError: bare Exception, and for what panics not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, TypeError, UnicodeError, OverflowError):
        raise  # the caller's
    except BaseException as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{what}: {reason[:200]}") from error


def _settings(path: Path) -> dict[str, Any]:
    settings = parse_json(_read(path), str(path), ArtifactError, MAX_SETTINGS_BYTES)
    wanted: dict[str, type] = {"special_tokens": dict, "eos_token_ids": list, "generation": dict}
    if not isinstance(settings, dict) or set(settings) != set(wanted):
        raise ArtifactError(f"{path}: expected the keys {', '.join(wanted)}")
    for key, kind in wanted.items():
        if not isinstance(settings[key], kind):
            raise ArtifactError(f"{path}: {key} is not a {kind.__name__}")
    for name, text in settings["special_tokens"].items():
        if not isinstance(text, str) or name in _TEMPLATE_ARGUMENTS:
            raise ArtifactError(
                f"{path}: special_tokens: {name[:40]!r} is not a name of a token, or not text"
            )
    if not all(type(token) is int and token >= 0 for token in settings["eos_token_ids"]):
        raise ArtifactError(f"{path}: eos_token_ids holds something that is not a token id")
    for name, value in settings["generation"].items():
        if name not in _GENERATION or type(value) not in _GENERATION[name]:
            raise ArtifactError(f"{path}: generation: {name[:40]!r} is unknown, or of another type")
    return settings


# --------------------------------------------------------------------------- chat templates


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks an assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _compile(source: str, path: Path) -> jinja2.Template:
    """A chat template, in a sandbox: it comes from whoever made the model.

    Compiling computes nothing that stands in it, so that loading takes no longer than reading does.
    """
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,  # else constant expressions are evaluated …
        finalize=_as_is,  # … and those in output even so, unless what prints them needs the context
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ArtifactError(f"{path}: line {error.lineno}: {error.message}") from error
    except (
        ValueError,
        SyntaxError,
        TypeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as error:
        # Beyond what jinja2 checks: numbers of thousands of digits, or more nested blocks than Python compiles.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{path}: cannot be compiled: {reason[:200]}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's, with bounds on the two operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Raises TemplateError for a power, or a repeated text or list, beyond MAX_RESULT."""
        if operator == "**" and (abs(left) > MAX_RESULT or abs(right) > 64):
            raise jinja2.TemplateError("a power of large numbers")
        for one, other in ((left, right), (right, left)):
            many = isinstance(one, (str, bytes, list, tuple)) and isinstance(other, int)
            if many and len(one) * other > MAX_RESULT:
                raise jinja2.TemplateError("a text or list repeated very often")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _as_is(context: jinja2.runtime.Context, value: Any) -> Any:
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which a model must not see."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
