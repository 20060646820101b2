"""Text to tokens and back, and chat templates, from an artifact's tokenizer folder; without transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvcc.errors import ArtifactError

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
        try:
            backend = tokenizers.Tokenizer.from_str(_read(folder / "tokenizer.json"))
        except ArtifactError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ArtifactError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
        settings = _settings(folder / "tokenizer_settings.json")
        path = folder / "chat_template.jinja"
        return cls(
            backend=backend,
            template=_compile(_read(path), path) if path.exists() else None,
            special_tokens=settings["special_tokens"],
            eos_token_ids=tuple(settings["eos_token_ids"]),
            generation=settings["generation"],
        )

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. special_tokens: with what the tokenizer adds by itself (a BOS, for some).

        Text that `chat` made already has its special tokens: give False.
        """
        return list(self.backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Text of `ids`, without special tokens unless asked. Bytes that are no character become U+FFFD."""
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


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8 text") from error


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_read(path))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from error
    wanted: dict[str, type] = {"special_tokens": dict, "eos_token_ids": list, "generation": dict}
    if not isinstance(settings, dict) or set(settings) != set(wanted):
        raise ArtifactError(f"{path}: expected the keys {', '.join(wanted)}")
    for key, kind in wanted.items():
        if not isinstance(settings[key], kind):
            raise ArtifactError(f"{path}: {key} is not a {kind.__name__}")
    if not all(isinstance(text, str) for text in settings["special_tokens"].values()):
        raise ArtifactError(f"{path}: special_tokens holds something that is not text")
    if not all(type(token) is int and token >= 0 for token in settings["eos_token_ids"]):
        raise ArtifactError(f"{path}: eos_token_ids holds something that is not a token id")
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
    """A chat template, in a sandbox: it comes from whoever made the model."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ArtifactError(f"{path}: line {error.lineno}: {error.message}") from error


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
