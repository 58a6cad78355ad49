"""The command line: `ffn train | generate | eval | classify | info | doctor`.

Exit codes: 0 success; 1 a failure at run time (a full disk, too little memory, a loss that is not finite);
2 a mistake in the arguments; 130 interrupted (training that had begun is saved).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from ffn import disk
from ffn.classify import config as classify_config
from ffn.classify.commands import DEVICE, Once, add_commands
from ffn.classify.result import FACTS
from ffn.files.checkpoints import MODEL
from ffn.files.shards import PICKLES, Shards
from ffn.gpt.cost import flops_per_token, render_kept, render_table
from ffn.gpt.generate import stream
from ffn.ops.dispatch import choose, why_not_triton
from ffn.packing.pack import packed_where_possible
from ffn.text.corpus import open_corpus
from ffn.text.tokenizer import Tokenizer, encode_prompt
from ffn.train.base import named_base, open_base
from ffn.train.device import choose_device, choose_precision, keep_freed_memory
from ffn.train.loop import train
from ffn.train.report import printable
from ffn.train.run_folder import read_config
from ffn.train.steps import evaluate
from ffn.version import __version__

DISTRIBUTION = "torch-ffn"
REMEDY = "run `pip uninstall ffn`, then `pip install --force-reinstall --no-deps .` in a clone"
MODEL_FILES = {".safetensors", ".json", *PICKLES}
ALLOCATOR = "DefaultCPUAllocator"  # in the message of the RuntimeError that torch raises without CPU memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character the terminal lacks must not stop a run
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader closed the pipe; print nothing more, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if arguments.debug or not (isinstance(error, torch.OutOfMemoryError) or ALLOCATOR in str(error)):
            raise
        reason = str(error).splitlines()[0].rpartition("memory: ")[2]
        _complain(f"ffn: not enough memory: {reason}; a smaller model, window or batch may fit")
        return 1
    except (ValueError, ImportError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        _complain(f"ffn: {str(error) or 'interrupted'}")
        if isinstance(error, KeyboardInterrupt):
            return 130
        return 1 if isinstance(error, OSError | FloatingPointError) else 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; unlike argparse, accept words on both sides of an option."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more and ("words" not in arguments or any(word.startswith("-") and word != "-" for word in more)):
        hint = f"; keys are written {arguments.key}" if arguments.key else ""
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    if more:
        arguments.words += more
    return arguments


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffn", description="Train a Transformer on text and use it.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ffn {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=lambda _: parser.print_help() or 0, key="")
    commands = parser.add_subparsers(metavar="COMMAND")
    command = partial(_add_command, commands)

    usual = "Without arguments it trains a small model on Python's standard library in runs/stdlib. "
    usual += "The config.toml in the folder of a run lists every key."
    summary = "train a model, or resume where the same command stopped"
    add = command("train", _train, summary, usual, "train.steps=3")
    words = "a TOML file and keys such as train.steps=100"
    add("words", nargs="*", metavar="CONFIG key=value", help=words)
    base = "start from this run, checkpoint or Hugging Face folder; the same as base=PATH"
    add("--from", dest="base", action=Once, metavar="PATH", help=base)

    add = command("generate", _generate, "continue a prompt with a trained model")
    add("run", help="the folder of a run")
    add("--prompt", help="the text to continue (default: a line break)")
    add("--tokens", type=int, help="the most tokens to generate (default: until the window is full)")
    add("--temperature", type=float, default=0.8, help="0 always takes the most likely token (default: 0.8)")
    add("--top-k", type=int, help="sample from the k most likely tokens")
    add("--top-p", type=float, help="sample from the most likely tokens with this total probability")
    add("--seed", type=int, help="make the text repeatable")
    add("--device", default="auto", help=DEVICE)

    add = command("eval", _eval, "print the loss over the whole validation text of a run")
    add("run", help="the folder of a run")
    add("--batch-size", type=int, default=32, help="windows per batch (default: 32)")
    add("--device", default="auto", help=DEVICE)

    summary = "train and use a text classifier"
    classify = commands.add_parser("classify", help=summary, description=_sentence(summary))
    add_commands(partial(_add_command, classify.add_subparsers(required=True, metavar="COMMAND")))

    summary = "print parameters, FLOPs and saved memory of a model, part by part"
    add = command("info", _info, summary, key="model.dim=96")
    what = (
        "a config as for train, or the folder of a run or of a model (Hugging Face's too), or its config.json"
    )
    add("words", nargs="*", metavar="CONFIG|FOLDER key=value", help=what)

    command("doctor", _doctor, "print versions, devices and the code that would run")
    return parser


def _add_command(
    commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    more: str = "",
    key: str = "",
) -> Callable[..., object]:
    """Add a command and return the function that adds its arguments.

    Args:
        commands: the result of `add_subparsers`.
        more: text of the command's own help after the summary.
        key: an example of a key, for commands that take keys.
    """
    added = commands.add_parser(name, help=summary, description=f"{_sentence(summary)} {more}")
    added.set_defaults(command=run, key=key)
    return added.add_argument


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _file_and_keys(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split `[CONFIG|RUN] [key=value ...]` into the file of the configuration and the keys."""
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ValueError(f"{' '.join(names)}: give one config, then key=value as in train.steps=100")
    file = Path(names[0]) if names else None
    if file is not None and file.is_dir():
        file = file / "config.toml"
    return file, [word for word in words if "=" in word]


def _train(arguments: argparse.Namespace) -> int:
    keep_freed_memory()
    words = arguments.words + ([f"base={arguments.base}"] if arguments.base else [])
    file, keys = _file_and_keys(words)
    path = named_base(file, keys)
    base = open_base(path, _complain) if path is not None else None
    config = read_config(file, keys, base)
    summary = train(config, lambda text: print(text, flush=True), base)
    return 130 if summary["stopped"] == "interrupted" else 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.prompt == "":
        raise ValueError("--prompt must not be empty")
    device, _ = choose_device(arguments.device)
    model = disk.read_model(disk.find_model(arguments.run, _complain).file, device)
    tokenizer = disk.load_tokenizer(arguments.run)
    text, prompt = _prompt(arguments, tokenizer)
    left = model.config.max_seq_len - len(prompt)
    tokens = stream(
        model,
        prompt,
        max(1, left) if arguments.tokens is None else arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print(text, end="")
    with packed_where_possible(model):
        _print_stream(tokens, tokenizer)
    return 0


def _prompt(arguments: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return the prompt and its tokens; by default a line break, or else how the training text begins."""
    if arguments.prompt is not None:
        return arguments.prompt, tokenizer.encode(arguments.prompt)
    corpus = open_corpus(Path(arguments.run))
    if corpus is None:
        return "\n", tokenizer.encode("\n")
    return encode_prompt(tokenizer, "\n", int(corpus.train[0]), _complain)


def _print_stream(tokens, tokenizer: Tokenizer) -> None:
    """Print text as it arrives; an incomplete character waits for its last byte."""
    ids: list[int] = []
    printed = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(printable(text[len(printed) :]), end="", flush=True)
            printed = text
    print(printable(tokenizer.decode(ids)[len(printed) :]))


def _eval(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    if (run / FACTS).is_file():
        raise ValueError(f"{run} holds a classifier; to evaluate it run: ffn classify eval {run} DATA")
    device, _ = choose_device(arguments.device)
    file, state = disk.find_model(run, _complain)
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run}: must be the folder of a run, with its config.toml")
    model = disk.read_model(file, device)
    corpus = open_corpus(run)
    if corpus is None or state is None or corpus.fingerprint != state["data"]:
        raise ValueError(
            f"{run / 'data'} is absent, damaged or not the data of this model; "
            f"to prepare it again from the same text, run: ffn train {run / 'config.toml'} out={run}"
        )
    loss = evaluate(model, corpus.val, batch_size=arguments.batch_size)
    per_byte = loss * len(corpus.val) / corpus.val_bytes
    print(f"model        {file}")
    size = f"{len(corpus.val):,} tokens, {corpus.val_bytes:,} bytes"
    print(f"validation   {size}, in windows of {model.config.max_seq_len}")
    print(f"loss         {loss:.4f} nats per token, {per_byte:.4f} nats per byte")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    path = Path(arguments.words[0]) if arguments.words else Path()
    model_file = path.suffix in MODEL_FILES and (
        "=" not in str(path) or path.exists()
    )  # else it is the value of a key
    whole = (path / MODEL).is_file() or not (path / "config.toml").is_file()
    stored = model_file or (path.is_dir() and whole)  # else a config or a run
    if arguments.words and stored:
        if rest := arguments.words[1:]:
            raise ValueError(f"{' '.join(rest)}: keys cannot change the model in {path}; leave them out")
        model, architecture, shards = disk.inspect(path)
    else:
        file, keys = _file_and_keys(arguments.words)
        config = (classify_config.read_config if _is_of_classifier(file) else read_config)(file, keys)
        model, architecture, shards = config.model, "ffn", None
        if config.data.tokenizer != "byte" and not path.is_dir():
            size = model.vocab_size
            print(f"assuming vocab_size={size}; training uses the tokenizer's size")
    kind = "decoder" if model.causal else "encoder"
    layers = f"{model.num_layers} layers of {model.dim}, {model.activation}"
    print(f"architecture {architecture}: {kind}, {layers}")
    if shards is not None:
        print(f"weights      {_sizes(shards)}")
    print(render_table(model))
    print(f"training costs {flops_per_token(model, training=True):,} FLOPs per token\n")
    print(render_kept(model))
    return 0


def _is_of_classifier(file: Path | None) -> bool:
    """Return True for a config of `ffn classify train` that `ffn train` does not read."""
    try:
        read_config(file)
    except ValueError:
        with suppress(ValueError):
            classify_config.read_config(file)
            return True
    return False


def _sizes(shards: Shards) -> str:
    specs = shards.specs.values()
    files = len({spec.file for spec in specs})
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    return f"{', '.join(dtypes)}, {size / 2**20:,.1f} MiB in {files} file{'s' * (files > 1)}"


def _doctor(arguments: argparse.Namespace) -> int:
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"ffn          {__version__}, the distribution {DISTRIBUTION} (`ffn` on PyPI is a finance library)")
    if others := sorted({*metadata.packages_distributions().get("ffn", [])} - {DISTRIBUTION}):
        print(f"conflict     {', '.join(others)} also installs a package named ffn; {REMEDY}")
    for name in ("torch", "einops", "numpy", "safetensors", "tokenizers", "tqdm", "matplotlib", "triton"):
        try:
            print(f"{name:12} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name:12} not installed")
    device, why = choose_device("auto")
    precision, why_precision = choose_precision("auto", device)
    print(f"device       {device} ({why})")
    print(f"precision    {precision} ({why_precision})")
    for dtype in (torch.float32, torch.bfloat16):
        choice = choose("auto", device, dtype)
        print(f"feed-forward {choice.backend} in {dtype} ({choice.reason})")
    why_not = why_not_triton(device, torch.bfloat16)
    print(f"kernels      {'run here' if why_not is None else 'do not run here: ' + why_not}")
    return 0
