"""The files of a Hugging Face tokenizer, and the ids of its special tokens. Needs no package for either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...configs.strict_json import JsonError, is_int, read_json
from ...configs.tokenized import tokenizer_file

_KINDS = ("eos", "bos", "pad")
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that end a text (there may be several, the first is written), begin it, and fill it up."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files that make up the tokenizer at ``path`` (a tokenizer.json, or its folder), for copying them together.

    Of a tokenizer.json under another name, it alone: what lies beside it may belong to something else.
    """
    file = tokenizer_file(str(path))
    if file.name != "tokenizer.json":
        return [file] if file.is_file() else []
    return [file.parent / name for name in _NAMES if (file.parent / name).is_file()]


def special_tokens(path: str | Path) -> SpecialTokens:
    """The special tokens of the tokenizer at ``path`` (a tokenizer.json, or its folder).

    They are what generation_config.json beside it says, else tokenizer_config.json (names), else config.json (ids).
    Raises UserError for a file among these that is damaged.
    """
    file = tokenizer_file(str(path))
    if file.name != "tokenizer.json":
        return SpecialTokens()
    folder = file.parent
    generation, named, model = (
        _read(folder / name) for name in ("generation_config.json", "tokenizer_config.json", "config.json")
    )
    ids: dict[str, int] | None = None
    found: dict[str, tuple[int, ...]] = {}
    for kind in _KINDS:
        found[kind] = _ids(generation.get(f"{kind}_token_id"))
        name = _content(named.get(f"{kind}_token"))
        if not found[kind] and name is not None:
            ids = _vocabulary(file) if ids is None else ids
            found[kind] = (ids[name],) if name in ids else ()
        if not found[kind]:
            found[kind] = _ids(model.get(f"{kind}_token_id"))
    bos, pad = (found[kind][0] if found[kind] else None for kind in ("bos", "pad"))
    return SpecialTokens(found["eos"], bos, pad)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if is_int(item) and item >= 0)


def _content(value: Any) -> str | None:
    """The text of a token, which stands alone or in an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _vocabulary(file: Path) -> dict[str, int]:
    """Ids of the tokens of a tokenizer.json, those added to its vocabulary included."""
    top = _read(file)
    model = top.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocab, dict):
        ids = {name: number for name, number in vocab.items() if is_int(number)}
    elif isinstance(vocab, list):  # of a unigram model: [text, score], the id is the place
        ids = {entry[0]: place for place, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = top.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and is_int(token.get("id")):
            ids[token["content"]] = token["id"]
    return ids


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    try:
        value = read_json(file.resolve(), max_bytes=256 << 20)
    except FileNotFoundError:
        return {}
    except (JsonError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(Problem("data.tokenizer.path", f"cannot read {file}: {reason}")) from None
    if not isinstance(value, dict):
        raise UserError(Problem("data.tokenizer.path", f"{file} holds no JSON object"))
    return value
