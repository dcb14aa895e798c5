"""The maths of a model reads as on one device: everything parallel is applied to it from outside."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "models"
MATHS = (
    *(
        MODELS / f"{name}.py"
        for name in (
            "attention",
            "dropout",
            "feed_forward",
            "functional",
            "linear",
            "linear_attention",
            "mla",
            "moe",
            "mtp",
            "norms",
            "recompute",
            "rope",
            "sequences",
            "transformer",
        )
    ),
    *sorted((MODELS / "routing").glob("*.py")),
)

SEAMS = {"expert", "gradients", "grouped_projection", "kernels", "labels", "projection", "recompute", "vocab"}
"""The files and folders of parallel/ that hold what a model calls; each has a default for one device."""

WORDS = re.compile(
    r"axis|axes|mesh(es)?|ranks?|shard(s|ed|ing)?|tp|pp|cp|ep|etp|edp|dp|fsdp|ddp|nccl|gloo|world|distributed"
    r"|collectives?|communicat\w*|pipelines?|stages?|replicas?"
)
PAIRS = re.compile(
    r"all_?(reduce|gather|to_?all)|reduce_?scatter|process_?groups?|(token|expert|tensor|data)_?parallel"
)

LOW_RANK = re.compile(r"\b(q|kv|gate)_rank\b|\blow rank\b")
"""The rank of a matrix."""


def parallel_words(text: str) -> list[str]:
    """The words in it that only make sense with several devices."""
    text = LOW_RANK.sub("", text)
    parts = [part for name in re.findall(r"\w+", text) for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]
    whole = [found.group() for found in PAIRS.finditer(text.lower().replace("-", "_"))]
    return [part for part in parts if WORDS.fullmatch(part.lower())] + whole


def words_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, word) of identifiers, strings, docstrings and comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT):
            for word in parallel_words(token.string):
                yield token.start[0], word


@pytest.mark.parametrize("path", MATHS, ids=lambda path: path.stem)
def test_maths_have_no_parallel_words(path: Path) -> None:
    assert list(words_of(path.read_text())) == []


@pytest.mark.parametrize("path", MATHS, ids=lambda path: path.stem)
def test_maths_import_the_seams_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "parallel":
            names = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
            assert set(names) <= SEAMS, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("x = all_reduce(x)", "all_reduce"),
        ("y = TokenShards(x)", "Shards"),
        ('z = f(mesh_of, "low rank")', "mesh"),
        ('"""All ranks have it."""', "ranks"),
        ("n = axis.size", "axis"),
        ("kv_rank = cfg.tp", "tp"),
        ("f()  # an all-to-all", "all_to_all"),
    ],
)
def test_parallel_words_are_found(source: str, word: str) -> None:
    assert [found for _, found in words_of(source)] == [word]
