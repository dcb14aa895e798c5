"""`pentad generate`: text from a run, a checkpoint or a Hugging Face folder. Nothing here imports torch before it
must."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs import Problem, UserError

if TYPE_CHECKING:
    from ...models.transformer import Transformer
    from ...trainer.text.prompts import PromptCoder

_DTYPES = ("bf16", "fp16", "fp32", "fp64")


def generate_parser(parser: argparse.ArgumentParser) -> None:
    """Describes the verb's arguments."""
    parser.description = "Continue a text with a model, on one device."
    parser.add_argument(
        "source", metavar="RUN|CHECKPOINT|HF", help="a run's folder, a checkpoint, a Hugging Face folder"
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="what to continue; repeated")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="most tokens of each answer (100)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest token (0)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="draw from the likeliest P of 1 (1)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--tokenizer", metavar="T", help="byte, or a tokenizer.json (the model's own)")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="type that is computed in (fp32)")
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--layout",
        choices=("one", "run"),
        default="one",
        help="one: one device; run: the ranks and the layout of the run, the likeliest tokens (one)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, with token ids")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    """Prints each prompt and what follows it, as it comes.

    Raises:
        UserError: an argument that cannot be, or a source that holds no model.
    """
    _check(args)
    if args.layout == "run":
        return _generate_in_layout(args)
    import torch

    from ...trainer.text.model_source import open_model
    from ...trainer.text.prompts import make_coder

    device = _device(args.device)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    saved = open_model(args.source, types[args.dtype])
    given = saved.tokenizer if args.tokenizer is None else _tokenizer(args.tokenizer)
    coder = make_coder(given, args.source if args.tokenizer is None else args.tokenizer)
    model, stops = saved.model.to(device), saved.tokenizer.stops or given.stops
    prompts = [coder.encode(text) for text in args.prompt]
    for prompt in prompts:
        _check_prompt(prompt, model)
    for text, prompt in zip(args.prompt, prompts, strict=True):
        tokens = _tokens(model, prompt, args, stops, str(device))
        if args.json:
            _print_json(text, prompt, list(tokens), coder, stops)
        else:
            _print_stream(text, prompt, tokens, coder, stops)
    return 0


def _generate_in_layout(args: argparse.Namespace) -> int:
    from ...trainer.text.model_source import find_checkpoint
    from ...trainer.text.prompts import make_coder
    from ...trainer.text.tokenizer_files import of_checkpoint
    from .generate_layout import answers_in_layout

    run = Path(args.source).expanduser()
    checkpoint = find_checkpoint(run)
    tokenizer = of_checkpoint(checkpoint)
    coder = make_coder(tokenizer, str(checkpoint))
    prompts = [coder.encode(text) for text in args.prompt]
    if not all(prompts):
        raise UserError(Problem("--prompt", "is empty, and the tokenizer begins texts with no token; give some text"))
    for prompt, answer in zip(
        prompts, answers_in_layout(run, checkpoint, prompts, args.prompt, args.max_new_tokens), strict=True
    ):
        if args.json:
            _print_json(answer["prompt"], prompt, answer["tokens"], coder, tokenizer.stops)
        else:
            print(answer["prompt"] + answer["text"], flush=True)
    return 0


def _check(args: argparse.Namespace) -> None:
    problems: list[Problem] = []
    if not args.prompt:
        problems.append(Problem("--prompt", "what should be continued? give one, such as --prompt 'Once upon'"))
    if args.max_new_tokens < 1:
        problems.append(Problem("--max-new-tokens", f"must be at least 1, got {args.max_new_tokens}"))
    if not 0 <= args.temperature < math.inf:
        problems.append(Problem("--temperature", f"must be at least 0 and finite, got {args.temperature}"))
    if not 0 < args.top_p <= 1:
        problems.append(Problem("--top-p", f"must be above 0 and at most 1, got {args.top_p}"))
    if not 0 <= args.seed < 2**63:
        problems.append(Problem("--seed", f"must be at least 0 and below 2^63, got {args.seed}"))
    alone = {"--temperature": args.temperature != 0, "--top-p": args.top_p != 1, "--tokenizer": args.tokenizer}
    if args.layout == "run" and any(alone.values()):
        named = ", ".join(key for key, given in alone.items() if given)
        problems.append(
            Problem("--layout", f"run takes the likeliest tokens, with the run's tokenizer; leave out {named}")
        )
    if not Path(args.source).expanduser().exists():
        problems.append(Problem(args.source, "there is no such checkpoint, run or Hugging Face folder"))
    if problems:
        raise UserError(*problems)


def _check_prompt(prompt: list[int], model: Transformer) -> None:
    """A prompt that the model can read and continue."""
    if not prompt:
        raise UserError(Problem("--prompt", "is empty, and the tokenizer begins texts with no token; give some text"))
    used, longest = model.cfg.used_vocab, _longest(model)
    if max(prompt) >= used:
        message = f"has token id {max(prompt)}, the model knows {used}; is --tokenizer the model's own?"
        raise UserError(Problem("--prompt", message))
    if len(prompt) >= longest:
        message = f"has {len(prompt)} tokens, the model has {longest:.0f} positions; shorten it"
        raise UserError(Problem("--prompt", message))


def _longest(model: Transformer) -> float:
    """Tokens that the model can read: learned positions end, rotary ones go on."""
    return model.cfg.max_positions if model.cfg.position == "learned" else math.inf


def _tokenizer(name: str) -> Any:
    from ...trainer.data.tokenizer import ByteTokenizer
    from ...trainer.text.tokenizer_files import TOKENIZER, TokenizerFiles, of_folder

    if name == "byte":
        return TokenizerFiles("byte", {"eos_token_id": ByteTokenizer.eod})
    path = Path(name).expanduser()
    if path.is_dir():
        return of_folder(path)
    try:
        return TokenizerFiles("files", {}, {TOKENIZER: path.read_bytes()})
    except OSError as error:
        raise UserError(Problem("--tokenizer", f"{name} cannot be read: {error.strerror}")) from None


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(Problem("--device", f"{name} is no device; set auto, cpu or cuda")) from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(Problem("--device", f"{name} is not there, {torch.cuda.device_count()} GPUs are; set cpu"))
    return device


def _tokens(
    model: Transformer, prompt: list[int], args: argparse.Namespace, stops: frozenset[int], device: str
) -> Iterator[int]:
    from ...models.generate.decode import make_reader
    from ...models.generate.sampling import Sampling, generate_tokens

    count = int(min(args.max_new_tokens, _longest(model) - len(prompt)))
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    return generate_tokens(make_reader(model), prompt, count=count, sampling=sampling, stop=stops, device=device)


def _print_stream(
    text: str, prompt: list[int], tokens: Iterator[int], coder: PromptCoder, stops: frozenset[int]
) -> None:
    from ...trainer.text.prompts import TextStream

    stream = TextStream(coder, prompt)
    sys.stdout.write(text)
    for token in tokens:
        if token not in stops:
            sys.stdout.write(stream.add(token))
            sys.stdout.flush()
    sys.stdout.write(stream.finish() + "\n")
    sys.stdout.flush()


def _print_json(text: str, prompt: list[int], tokens: list[int], coder: PromptCoder, stops: frozenset[int]) -> None:
    from ...trainer.text.prompts import TextStream

    ended = bool(tokens) and tokens[-1] in stops
    stream = TextStream(coder, prompt)
    for token in tokens[: len(tokens) - ended]:
        stream.add(token)
    stream.finish()
    found = {
        "prompt": text,
        "text": stream.text,
        "prompt_tokens": prompt,
        "tokens": tokens,
        "stopped": "end of text" if ended else "length",
    }
    print(json.dumps(found, ensure_ascii=False), flush=True)
