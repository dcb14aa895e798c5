"""Prompts to token ids, and token ids back to text while they come."""

from __future__ import annotations

from typing import Any, Protocol

from ...configs.errors import Problem, UserError
from ...configs.fields import short
from ...configs.schema import Config
from ..data.tokenizer import ByteTokenizer
from .tokenizer_files import TOKENIZER, TokenizerFiles

_MISSING = "a tokenizer.json needs the tokenizers package: pip install 'pentad[tokenizers]'"
_SAVE = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_HALF = "\ufffd"
"""Stands at the end of a text that ends within a character."""


class PromptCoder(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts around a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        ...


def make_coder(tokenizer: TokenizerFiles, where: str) -> PromptCoder:
    """The tokenizer of a model.

    Args:
        tokenizer: its files.
        where: whose, for messages.

    Raises:
        UserError: nobody knows it, or it is of a kind that cannot be read.
    """
    if tokenizer.kind == "byte":
        return _Bytes()
    if TOKENIZER in tokenizer.files:
        return _File(tokenizer.files[TOKENIZER], where)
    if tokenizer.kind == "files":
        raise UserError(f"{where} has no {TOKENIZER}; with transformers: {_SAVE}")
    raise UserError(f"{where} knows no tokenizer; name one: --tokenizer byte, or a tokenizer.json")


def prompt_problems(cfg: Config, tokenizer: TokenizerFiles) -> list[Problem]:
    """Why a job's evaluations could not continue its prompts."""
    if not cfg.eval.prompts:
        return []
    try:
        coder = make_coder(tokenizer, f"data.name={cfg.data.name}")
    except UserError as error:
        return [Problem("eval.prompts", f"{error.problems[0].message}; or set data.tokenizer.path or eval.prompts=[]")]
    problems: list[Problem] = []
    for prompt in cfg.eval.prompts:
        ids, used = coder.encode(prompt), cfg.model.used_vocab
        if not 0 < len(ids) < cfg.train.seq_len:
            what = f"{short(prompt)} has {len(ids)} tokens; a prompt has at least 1 and fewer than train.seq_len"
            problems.append(Problem("eval.prompts", f"{what}={cfg.train.seq_len}"))
        elif max(ids) >= used:
            problems.append(Problem("eval.prompts", f"{short(prompt)} has token id {max(ids)}, the model knows {used}"))
    return problems


class _Bytes:
    def encode(self, text: str) -> list[int]:
        return ByteTokenizer().encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        return ByteTokenizer().decode(ids)


class _File:
    def __init__(self, content: bytes, where: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError(_MISSING) from None
        try:
            self._backend: Any = Backend.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception for a malformed file
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{TOKENIZER} of {where} is not valid: {reason}") from None
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", errors="replace").decode()
        return list(self._backend.encode(clean, add_special_tokens=True).ids)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


class TextStream:
    """Turns token ids into text as they come: what a token adds may depend on those before it, and a character may
    need several."""

    def __init__(self, coder: PromptCoder, prompt: list[int]) -> None:
        self._coder, self._ids = coder, list(prompt)
        self._shown = len(coder.decode(self._ids))
        self.text = ""
        """All that has been said."""

    def add(self, token: int) -> str:
        """The text that a further token makes certain."""
        self._ids.append(token)
        whole = self._coder.decode(self._ids)
        return "" if whole.endswith(_HALF) else self._say(whole)

    def finish(self) -> str:
        """The rest, however it ends."""
        return self._say(self._coder.decode(self._ids))

    def _say(self, whole: str) -> str:
        new = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        self.text += new
        return new
