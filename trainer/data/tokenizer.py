"""Text to token ids and back: the built-in byte tokenizer, and any `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...configs.errors import Problem, UserError
from ...configs.schema import TokenizerConfig
from ...configs.strict_json import JsonError, read_json
from ...configs.tokenized import Coding, tokenizer_file

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_MISSING = "reading a tokenizer.json needs the tokenizers package: pip install 'pentad[tokenizers]'"


class Tokenizer(Protocol):
    """What every tokenizer has. `identity` names its vocabulary exactly: equal identities give equal tokens. `cfg`
    is what made it, for other processes to make it again."""

    cfg: TokenizerConfig
    identity: str
    vocab: int
    eod: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] of one text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids [n] of each text, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; end-of-document tokens are left out."""
        ...


def token_dtype(vocab: int) -> np.dtype:
    """The narrowest type for ids in [0, vocab) that Megatron-LM writes too: uint16 or int32."""
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)


class ByteTokenizer:
    """One token per byte of UTF-8, and id 256 for the end of a document."""

    cfg = TokenizerConfig()
    identity = "byte-1"
    vocab = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids [bytes of text], uint16. Half a surrogate pair, which has no UTF-8, becomes a question mark."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint16."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(tokens)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json` read with the `tokenizers` package, which it needs (an optional extra).

    Raises UserError when the package or the file is missing, the file cannot be parsed, or it has no end-of-document
    token.
    """

    def __init__(self, path: str, eod: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError(Problem("data.tokenizer.path", _MISSING)) from None
        self.cfg = TokenizerConfig(path=path, eod=eod)
        content = _read(path)
        try:
            self._backend: Any = Backend.from_str(content)
        except Exception as error:  # the package raises bare Exception for a malformed file
            message = f"{path} is not a valid tokenizer.json: {_one_line(error)}"
            raise UserError(Problem("data.tokenizer.path", message)) from None
        # Saved truncation or padding would silently cut or fill training documents.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab == 0:
            raise UserError(Problem("data.tokenizer.path", f"{path} has an empty vocabulary"))
        self.eod: int = self._find_eod(path, eod)
        self.identity: str = f"{_digest(content)}-{self.eod}"
        self._dtype = token_dtype(self.vocab)
        # The fast one does not say which characters each token stands for; older packages have it not.
        self._encode_batch: Any = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)

    def _find_eod(self, path: str, name: str | None) -> int:
        for candidate in (name,) if name is not None else EOD_NAMES:
            token = self._backend.token_to_id(candidate)
            if token is not None:
                return token
        # A tokenizer of other names may say in tokenizer_config.json which token ends a text.
        named = _named_end(path) if name is None else None
        token = self._backend.token_to_id(named) if named is not None else None
        if token is not None:
            return token
        wanted = f"{name!r} is not a token of" if name is not None else f"none of {', '.join(EOD_NAMES)} is a token of"
        message = f"{wanted} {path}; set data.tokenizer.eod to its end-of-document token"
        raise UserError(Problem("data.tokenizer.eod", message))

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n], uint16 or int32, encoded by the calling thread alone."""
        clean = text.encode("utf-8", errors="replace").decode()
        return np.array(self._backend.encode(clean, add_special_tokens=False).ids, dtype=self._dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, encoded in parallel by the package's own threads."""
        clean = [text.encode("utf-8", errors="replace").decode() for text in texts]
        encoded = self._encode_batch(clean, add_special_tokens=False)
        return [np.array(item.ids, dtype=self._dtype) for item in encoded]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, without special tokens."""
        return self._backend.decode([int(t) for t in tokens], skip_special_tokens=True)


def make_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a configuration: the byte tokenizer without a path. Raises UserError."""
    if cfg.path is None:
        return ByteTokenizer()
    return FileTokenizer(cfg.path, cfg.eod)


def file_identity(path: str) -> str:
    """What the identity of the tokenizer at `path` begins with, and a dash; needs no package. Raises UserError."""
    return f"{_digest(_read(path))}-"


def coding(tokenizer: Tokenizer, append_eod: bool = True) -> Coding:
    """How `tokenizer` makes tokens, for the record beside them."""
    eod = tokenizer.eod if append_eod else None
    path = tokenizer.cfg.path
    return Coding(tokenizer.identity, path and str(tokenizer_file(path).absolute()), tokenizer.vocab, eod)


def check_vocab(max_id: int, vocab: int, where: str = "the data") -> None:
    """Raise UserError when the largest token id of `where` does not fit a model with `vocab` tokens."""
    if max_id >= vocab:
        message = f"{where} has token id {max_id}, but the model has {vocab} tokens; set model.vocab to {max_id + 1}"
        raise UserError(Problem("model.vocab", f"{message} or more"))


def _read(path: str) -> str:
    file = tokenizer_file(path)
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(Problem("data.tokenizer.path", f"no such file: {file}")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem("data.tokenizer.path", f"cannot read {path}: {_one_line(error)}")) from None


def _named_end(path: str) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, where there is one."""
    try:
        found = read_json((tokenizer_file(path).parent / "tokenizer_config.json").resolve())
    except (OSError, JsonError):
        return None
    token = found.get("eos_token") if isinstance(found, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _digest(content: str) -> str:
    return f"file-{hashlib.sha256(content.encode()).hexdigest()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
