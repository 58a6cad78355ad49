"""Train a Transformer on text.

    train(TrainConfig(out="runs/mine", data=DataConfig(path="book.txt")))

Called again with the same configuration, training resumes from the last good checkpoint in that folder. On
the same machine and versions it ends with the same weights and metrics.csv, bit for bit, as a run that was
never interrupted: batch and learning rate depend on the step alone, and all other state is in the checkpoint.
(On CUDA this holds as far as its kernels are deterministic.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffn import disk
from ffn.files.atomic import exclusive, write_file
from ffn.files.checkpoints import checkpoint_path, list_checkpoints, newest_checkpoint, prune
from ffn.gpt.adapters import save_adapters
from ffn.gpt.generate import generate
from ffn.packing.pack import packed_where_possible
from ffn.text.corpus import Corpus, find_files
from ffn.text.tokenizer import encode_prompt
from ffn.text.windows import Batches, derive_seed
from ffn.train.base import Base, open_base, start
from ffn.train.checkpoint import restore, save_checkpoint
from ffn.train.config import TrainConfig, fingerprint
from ffn.train.device import Precision, autocast, choose_device, choose_precision
from ffn.train.interrupts import interrupts
from ffn.train.progress import Progress
from ffn.train.report import BASE_METRICS, METRICS, Log, Screen, closing_lines
from ffn.train.run_folder import check_options, open_run
from ffn.train.steps import accumulate_gradients, evaluate, evaluating

Say = Callable[[str], None]


def train(config: TrainConfig, say: Say = print, base: Base | None = None) -> dict[str, Any]:
    """Train to the end, resuming from the last good checkpoint in `config.out` if there is one.

    Ctrl-C saves a checkpoint and returns.

    Args:
        say: is told the lines of the log.
        base: config.base, where it is open already.

    Returns:
        The content of summary.json; "stopped" is "finished", "early" or "interrupted".

    Raises:
        ValueError: the configuration, the corpus, the base or the folder is wrong.
        FloatingPointError: the loss or the gradient is no longer finite.
        OSError: the disk is full or fails.
    """
    run = Path(config.out)
    device, why = choose_device(config.device)
    precision, why_precision = choose_precision(config.train.precision, device)
    check_options(config)
    if run.exists() and not run.is_dir():
        raise ValueError(f"out must be a folder, got the file {run}")
    if not run.exists():
        find_files(config.data.path)  # before there is a folder: a wrong path leaves none behind
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(exclusive(run))
        say(f"device       {device} ({why})")
        say(f"precision    {precision} ({why_precision})")
        if base is None and config.base is not None:
            base = open_base(config.base, say)
        config, corpus = open_run(config, base, say)
        trainer = Trainer(config, base, corpus, device, precision, say)
        trainer.start()
        stack.callback(trainer.log.close)
        interrupted = stack.enter_context(interrupts())
        trainer.loop(interrupted)
        return trainer.finish()


class Trainer:
    """One run in progress: call `start`, `loop` and `finish`."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base | None,
        corpus: Corpus,
        device: torch.device,
        precision: Precision,
        say: Say,
    ) -> None:
        loop = config.train
        self.config, self.corpus, self.device = config, corpus, device
        self.precision: Precision = precision
        self.run, self.say, self.at = Path(config.out), say, Progress()
        self.last: Path | None = None  # the last good checkpoint
        window = loop.window or config.model.max_seq_len
        self.batches = Batches(corpus.train, window, loop.batch_size, derive_seed(loop.seed, "data"))
        first = int(corpus.train[0])
        self.prompt_text, prompt = encode_prompt(corpus.tokenizer, loop.sample_prompt, first, say)
        self.prompt = prompt[: max(1, config.model.max_seq_len - 1)]
        if len(self.prompt) < len(prompt):
            self.prompt_text = corpus.tokenizer.decode(self.prompt)
            say(f"prompt       {self.prompt_text!r}, what the window has room for of train.sample_prompt")
        self.tokens_per_step = loop.batch_size * loop.accumulate * window
        torch.manual_seed(loop.seed)
        begun = start(config, base, device, say)
        self.model, self.base_corpus = begun.model, begun.base_corpus
        self.identity = {"config": fingerprint(config), "data": corpus.fingerprint}  # in all its checkpoints
        if begun.base_fingerprint is not None:
            self.identity["base"] = begun.base_fingerprint
        self.optimizer = loop.build_optimizer(self.model)
        if loop.compile:
            for block in self.model.blocks:
                block.compile()

    def start(self) -> None:
        """Begin, or resume from the last good checkpoint."""
        newest = newest_checkpoint(self.run, self.identity, self.say)
        sizes = None
        if newest is not None:
            self.last, state = newest
            restore(self.last, self.model, self.optimizer)
            self.at, sizes = Progress(**state["progress"]), state["logs"]
            self.say(f"{'finished before' if self.at.stopped else 'resuming    '} {self.last}")
            here = self._environment()
            changed = [f"{k} {v}, now {here[k]}" for k, v in state["environment"].items() if here[k] != v]
            if changed and not self.at.stopped:
                self.say(f"not bit for bit from here on: it was {'; '.join(changed)}")
        elif list_checkpoints(self.run):
            raise ValueError(
                f"no checkpoint in {self.run} is good; to start anew give another folder: out=..."
            )
        self.log = Log(self.run, sizes, BASE_METRICS if self.base_corpus else METRICS, say=self.say)
        if newest is None and self.config.base is not None:
            self._measure_base()

    def _measure_base(self) -> None:
        """Write the losses before the first step as step 0 in metrics.csv."""
        at = self.at
        at.val_before = self._loss_of(self.corpus)
        at.base_before = self._loss_of(self.base_corpus) if self.base_corpus else None
        known = f", {at.base_before:.4f} on the base's text" if at.base_before is not None else ""
        self.say(f"before       {at.val_before:.4f} nats a token{known}")
        losses = {"val_loss": at.val_before, "base_val_loss": at.base_before}
        self.log.metrics(step=0, tokens=0, lr=None, train_loss=None, grad_norm=None, **losses)

    def loop(self, interrupted: Callable[[], bool]) -> None:
        """Train until the last step, an early stop or an interruption."""
        loop, at = self.config.train, self.at
        if at.stopped:
            return
        screen = Screen(self.say, loop.steps, at.step)
        self.model.train()
        stop = False
        try:
            while not at.stopped and not stop:
                loss, norm, seconds = self._timed_step()
                speed = self.tokens_per_step / seconds
                screen.step(loss, speed)
                evaluated = at.step % loop.eval_every == 0 or at.step == loop.steps
                improved = evaluated and self._evaluate()
                if evaluated or at.step % loop.log_every == 0:
                    self._log(loss, norm, speed, evaluated)
                    left = (loop.steps - at.step) * at.train_seconds / at.step
                    losses = (at.val_loss, at.base_loss) if evaluated else (None, None)
                    screen.line(at.step, loss, losses[0], speed, left, losses[1])
                if evaluated and loop.sample_tokens:
                    text = self._sample()
                    self.log.sample(at.step, text)
                    screen.sample(text)
                stop = interrupted()
                if improved or at.stopped or stop or at.step % loop.checkpoint_every == 0:
                    self._save()
        except OSError as error:
            remedy = "put that right and give the same command"
            raise type(error)(f"after step {at.step}: {error}; {self._kept()}; {remedy}") from error
        finally:
            screen.close()

    def _timed_step(self) -> tuple[float, float, float]:
        start = time.perf_counter()
        loss, norm = self._step()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.at.step += 1
        self.at.train_seconds += seconds
        return loss, norm, seconds

    def _step(self) -> tuple[float, float]:
        loop, step = self.config.train, self.at.step
        batches = [self.batches(step * loop.accumulate + i) for i in range(loop.accumulate)]
        loss = accumulate_gradients(self.model, batches, self.precision)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), loop.clip or math.inf))
        self._finite(step + 1, "loss", loss)
        self._finite(step + 1, "gradient's norm", norm)
        self.optimizer.step(loop.lr_factor(step))
        self.optimizer.zero_grad()
        return loss, norm

    def _finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step}: the {what} is {value}; {self._kept()}; "
                "a lower train.lr or train.muon_lr, or a longer train.warmup, may help"
            )

    def _evaluate(self) -> bool:
        """Measure the validation losses; return True if the loss is the best so far."""
        loop, at = self.config.train, self.at
        val_loss = self._loss_of(self.corpus)
        at.base_loss = self._loss_of(self.base_corpus) if self.base_corpus else None
        self._finite(at.step, "validation loss", val_loss)
        name = checkpoint_path(self.run, at.step).name
        return at.evaluated(val_loss, name, loop.steps, loop.patience)

    def _loss_of(self, corpus: Corpus) -> float:
        loop = self.config.train
        return evaluate(
            self.model,
            corpus.val,
            batch_size=loop.batch_size,
            limit=loop.eval_batches,
            precision=self.precision,
            window=loop.window,
        )

    def _sample(self) -> str:
        loop, window = self.config.train, self.config.model.max_seq_len
        with evaluating(self.model), autocast(self.device, self.precision), packed_where_possible(self.model):
            new = generate(
                self.model,
                [self.prompt],
                min(loop.sample_tokens, window - len(self.prompt)),
                temperature=loop.sample_temperature,
                seed=loop.seed,
            )
        return self.prompt_text + self.corpus.tokenizer.decode(new[0])

    def _log(self, loss: float, norm: float, speed: float, evaluated: bool) -> None:
        loop, at = self.config.train, self.at
        factor = loop.lr_factor(at.step - 1)
        self.log.metrics(
            step=at.step,
            tokens=at.step * self.tokens_per_step,
            lr=factor * (loop.muon_lr if loop.optimizer == "muon" else loop.lr),
            train_loss=loss,
            val_loss=at.val_loss if evaluated else None,
            base_val_loss=at.base_loss if evaluated else None,
            grad_norm=norm,
        )
        self.log.timing(step=at.step, train_seconds=at.train_seconds, tokens_per_second=speed)

    def _save(self) -> None:
        state = {
            **self.identity,
            "best": self.at.best,
            "progress": dataclasses.asdict(self.at),
            "logs": self.log.sizes(),
            "environment": self._environment(),
        }
        self.last = save_checkpoint(self.run, self.at.step, self.model, self.optimizer, state)
        prune(self.run, self.at.step, self.config.train.keep, self.at.best)

    def _kept(self) -> str:
        return f"the last good checkpoint is {self.last}" if self.last else "there is no checkpoint yet"

    def _environment(self) -> dict[str, str]:
        where = {"device": self.device.type, "threads": str(torch.get_num_threads())}
        return {"torch": torch.__version__, "precision": self.precision, **where}

    def finish(self) -> dict[str, Any]:
        """Write summary.json and loss.png, and say the closing lines; return the summary."""
        at, run = self.at, self.run
        summary = {
            "stopped": at.stopped or "interrupted",
            "steps": at.step,
            "tokens": at.step * self.tokens_per_step,
            "train_seconds": at.train_seconds,
            "val_loss": at.val_loss,
            "best_val_loss": at.best_loss,
            "best_checkpoint": at.best,
            "last_checkpoint": self.last.name if self.last else None,
            "parameters": self.model.num_parameters(),
            **self._environment(),
        }
        if self.config.base is not None:
            summary["val_loss_before"] = at.val_before
        if self.base_corpus:
            summary |= {"base_val_loss_before": at.base_before, "base_val_loss": at.base_loss}
        if self.config.train.only == "lora":
            summary["adapters"] = save_adapters(run, disk.load(run)).name  # of the best checkpoint
        self.log.sizes()
        write_file(run / "summary.json", json.dumps(summary, indent=1) + "\n")
        for line in closing_lines(run, summary):
            self.say(line)
        return summary
