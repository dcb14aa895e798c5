"""What turns text into token ids and tells where a text ends, from the import through checkpoints to the export.

A checkpoint has the tokenizer's files beside its tensors, in its manifest, and in its state which ids begin, end and
fill texts: whoever has the checkpoint can make text with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...configs.errors import Problem, UserError
from ...configs.schema import Config
from ...configs.schema_data import TokenizedData
from ...configs.strict_json import JsonError, parse_json, read_bytes, read_json
from ...configs.tokenized import Coding, read_metas
from ..checkpoint.manifest import Damaged, Manifest, read_manifest, read_state, read_verified
from ..data.tokenizer import ByteTokenizer, FileTokenizer, file_identity

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
"""What a Hugging Face folder may have beside the model."""
_EOS = "eos_token_id"
_IDS = ("bos_token_id", _EOS, "pad_token_id")
_DEFAULT_EOS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "deepseek_v2"), 2),
    "gpt2": 50256,
    "olmoe": 50279,
    "deepseek_v3": 1,
}
"""What transformers takes for a family whose config.json does not say."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, as files, and the ids that config.json would have.

    Args:
        kind: `byte`: the built-in one, which has no files; `files`; or `none`: nobody knows.
        ids: bos_token_id, eos_token_id, pad_token_id: numbers, lists or None.
        files: name to content.
    """

    kind: Literal["byte", "files", "none"] = "none"
    ids: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint's state holds of it."""
        return {"kind": self.kind, "ids": dict(self.ids)}

    @property
    def stops(self) -> frozenset[int]:
        """The ids after which a text is over, as transformers' `generate` takes them: those of generation_config.json,
        else of config.json."""
        found = None
        if GENERATION in self.files:
            found = _generation(self.files[GENERATION]).get(_EOS)
        if found is None:
            found = self.ids.get(_EOS)
        return frozenset(_as_list(found))

    def exported(self) -> dict[str, bytes]:
        """The files of an export; those of the byte tokenizer are made."""
        return _byte_files() if self.kind == "byte" else dict(self.files)


def of_folder(directory: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> TokenizerFiles:
    """Of a Hugging Face folder, or of the folder of a tokenizer.json.

    Args:
        directory: the folder.
        config: its config.json; none: without.

    Raises:
        UserError: a file cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in _FILES:
        path = (Path(directory) / name).resolve()  # in a cache of the Hugging Face hub every file is a link
        if path.is_file():
            try:
                files[name] = read_bytes(path)
            except (OSError, JsonError) as error:
                raise UserError(f"{Path(directory) / name} cannot be read: {error}") from None
    ids: dict[str, Any] = {key: config[key] for key in _IDS if key in config} if config else {}
    default = _DEFAULT_EOS.get(str((config or {}).get("model_type")))
    if config is not None and _EOS not in ids and default is not None:
        ids[_EOS] = default
    return TokenizerFiles("files" if set(files) - {GENERATION} else "none", ids, files)


def of_checkpoint(path: Path) -> TokenizerFiles:
    """Of a checkpoint; of an older one only the ids that were imported.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        manifest = read_manifest(path)
        state = read_state(path, manifest)
        files = _files_of(path, manifest)
    except Damaged as error:
        raise UserError(Problem(str(path), f"damaged checkpoint: {error}")) from None
    about = state.get("tokenizer")
    if not isinstance(about, dict):
        about = {"kind": "none", "ids": state.get("hf")}
    kind, ids = about.get("kind"), about.get("ids")
    if kind not in ("byte", "files", "none") or not isinstance(ids or {}, dict):
        raise UserError(Problem(str(path), "damaged checkpoint: state.json does not say which tokenizer it has"))
    return TokenizerFiles(kind, {key: value for key, value in (ids or {}).items() if key in _IDS}, files)


def of_job(cfg: Config) -> TokenizerFiles:
    """Of a job that starts: the tokenizer of its data; for tokenized data the one that made it, where its files say so,
    else that of the weights it starts from.

    Where both have the same tokenizer.json, nothing that came with the weights is lost, and a text also ends where a
    document of the data does.

    Raises:
        UserError: a file cannot be read.
    """
    tokenized = isinstance(cfg.data, TokenizedData)
    coding = _coding(cfg)
    if coding is not None and coding.path is not None:
        eod = getattr(cfg.data, "eod", None)
        named = replace(cfg.data.tokenizer, path=coding.path)
        cfg = replace(cfg, data=replace(cfg.data, tokenizer=named, eod=coding.eod if eod is None else eod))
    given = _of_initial(cfg.checkpoint.init)
    if cfg.data.tokenizer.path is not None:
        path = Path(cfg.data.tokenizer.path).expanduser()
        mine = of_folder(path.parent)
        content = _content(path)
        same = given is not None and given.files.get(TOKENIZER) == content
        files = dict(given.files) if given is not None and same else {**mine.files, TOKENIZER: content}
        ids: dict[str, Any] = dict(given.ids) if given is not None and same else dict.fromkeys(_IDS)
        if not same:
            files.pop(GENERATION, None)
        return _ending(TokenizerFiles("files", ids, files), _eod_of(cfg, tokenized))
    if tokenized and coding is None:
        return _ending(given or TokenizerFiles(), getattr(cfg.data, "eod", None))
    return TokenizerFiles("byte", dict.fromkeys(_IDS) | {_EOS: ByteTokenizer.eod})


def _coding(cfg: Config) -> Coding | None:
    """How tokenized data was made: by bytes, or by a tokenizer.json that is still there; None where that is unknown."""
    if not isinstance(cfg.data, TokenizedData) or cfg.data.tokenizer.path is not None:
        return None
    found = [meta.coding for meta in read_metas(cfg.data) or ()]
    if not found or len({coding.identity for coding in found}) > 1:
        return None
    if found[0].path is None:
        return found[0]
    try:
        same = found[0].identity.startswith(file_identity(found[0].path))
    except UserError:
        return None
    return found[0] if same else None


def _of_initial(init: str | None) -> TokenizerFiles | None:
    if init is None:
        return None
    path = Path(init).expanduser()
    if not (path / "config.json").exists():
        return of_checkpoint(path)
    try:
        config = read_json((path / "config.json").resolve())
    except (OSError, JsonError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error}") from None
    return of_folder(path, config if isinstance(config, dict) else None)


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path.resolve())
    except (OSError, JsonError) as error:
        raise UserError(Problem("data.tokenizer.path", f"cannot read {path}: {error}")) from None


def _eod_of(cfg: Config, tokenized: bool) -> int | None:
    """The token that ends the documents of the job's data."""
    if tokenized and getattr(cfg.data, "eod", None) is not None:
        return getattr(cfg.data, "eod", None)
    try:
        return FileTokenizer(str(cfg.data.tokenizer.path), cfg.data.tokenizer.eod).eod
    except UserError:
        if not tokenized:
            raise
        return None  # tokenized data is trained on without its tokenizer


def _ending(found: TokenizerFiles, eod: int | None) -> TokenizerFiles:
    """With one more token that ends a text."""
    if eod is None:
        return found
    files, ids = dict(found.files), dict(found.ids)
    ids[_EOS] = _joined(ids.get(_EOS), eod)
    if GENERATION in files:
        generation = _generation(files[GENERATION])
        generation[_EOS] = _joined(generation.get(_EOS), eod)
        files[GENERATION] = _json(generation)
    return TokenizerFiles(found.kind, ids, files)


def _joined(known: Any, eod: int) -> Any:
    found = _as_list(known)
    if eod in found:
        return known
    return [*found, eod] if found else eod


def _as_list(found: Any) -> list[int]:
    every = found if isinstance(found, list) else [found]
    return [int(one) for one in every if isinstance(one, int) and not isinstance(one, bool)]


def _files_of(path: Path, manifest: Manifest) -> dict[str, bytes]:
    return {name: read_verified(path, name, manifest.files[name]) for name in _FILES if name in manifest.files}


def _generation(content: bytes) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except JsonError as error:
        raise UserError(f"{GENERATION} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _byte_files() -> dict[str, bytes]:
    """The byte tokenizer in the words of the `tokenizers` package: each byte is a token, its id the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # The alphabet of byte-level BPE (GPT-2): bytes without a printable character are shifted behind the others.
    shifted = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(shifted)}
    end = "<|endoftext|>"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ByteTokenizer.eod, "content": end, **special}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letters[byte]: byte for byte in range(256)} | {end: ByteTokenizer.eod},
            "merges": [],
        },
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    return {TOKENIZER: _json(tokenizer), "tokenizer_config.json": _json(about)}
