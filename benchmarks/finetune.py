"""Train transformers' encoder as a text classifier, in plain torch with the batches of `ffn classify`."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn

import ffn
from ffn.classify import ClassifyConfig
from ffn.classify.batches import TextEncoder, batches, collate
from ffn.classify.metrics import Scores
from ffn.classify.parts import Parts
from ffn.text.windows import derive_seed
from ffn.train.optim import lr_factor


class TheirClassifier(nn.Module):
    """The usual classifier on transformers' encoder: mean over tokens, dropout, Linear."""

    def __init__(self, base: str, num_classes: int, what: str, dropout: float):
        super().__init__()
        from transformers import AutoModel

        self.backbone = AutoModel.from_pretrained(base)
        self.backbone.pooler = None
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(self.backbone.config.hidden_size, num_classes)
        )
        nn.init.normal_(self.head[1].weight, std=0.02)
        nn.init.zeros_(self.head[1].bias)
        self.frozen = what == "head"
        parts = ("intermediate.dense", "output.dense")
        for name, p in self.backbone.named_parameters():
            block = any(part in name for part in parts) and "attention" not in name
            p.requires_grad_(what == "all" or (what == "ffn" and block))

    def train(self, mode: bool = True) -> TheirClassifier:
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.backbone(tokens, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(pooled)


def fine_tune(base: str, what: str, config: ClassifyConfig, parts: Parts) -> dict:
    """Train as `config` says, like `ffn classify train`; return a row."""
    rows, pad = token_rows(base, parts)
    fit, targets = config.fit, parts.targets["train"]
    torch.manual_seed(fit.seeds[0])
    model = TheirClassifier(base, len(parts.objective.classes), what, config.head.dropout)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and p is not model.backbone.get_input_embeddings().weight]
    others = [p for p in trained if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": fit.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.chosen_lr, betas=fit.betas, fused=True)  # type: ignore[arg-type]
    lengths = [len(row) for row in rows["train"]]
    steps, step, seconds = fit.epochs * -(-len(lengths) // fit.batch_size), 0, 0.0
    best, kept_state, best_epoch = -1.0, {}, 0
    for epoch in range(1, fit.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator = torch.Generator().manual_seed(derive_seed(fit.seeds[0], "epoch", epoch))
        for index in batches(lengths, fit.batch_size, generator):
            tokens, mask = collate([rows["train"][i] for i in index], pad)
            loss = nn.functional.cross_entropy(model(tokens, mask), targets[index])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, fit.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.chosen_lr * lr_factor(
                    step, steps, fit.schedule, round(fit.warmup * steps)
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            step += 1
        seconds += time.perf_counter() - start
        found = _scores(model, rows["val"], pad, parts, "val").values["accuracy"]
        print(f"epoch {epoch}: {found:.4f}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if found > best:
            best, best_epoch = found, epoch
            kept_state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(kept_state, strict=False)
    scores = _scores(model, rows["test"], pad, parts, "test").values
    return {
        "accuracy": scores["accuracy"],
        "f1_macro": scores["f1_macro"],
        "epochs": fit.epochs,
        "best_epoch": best_epoch,
        "train_s": seconds,
        "epoch_s": seconds / fit.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
    }


def token_rows(base: str, parts: Parts) -> tuple[dict[str, list[list[int]]], int]:
    """Return the token rows of every part, tokenised as in ffn, and the padding token."""
    encode = TextEncoder(ffn.load_tokenizer(base), 512)
    return {name: encode(rows.texts)[0] for name, rows in parts.rows.items()}, encode.pad


@torch.no_grad()
def _scores(model: nn.Module, rows: list[list[int]], pad: int, parts: Parts, name: str) -> Scores:
    model.eval()
    scores = torch.empty(len(rows), len(parts.objective.classes), dtype=torch.float64)
    for index in batches([len(row) for row in rows], 128):
        scores[index] = model(*collate([rows[i] for i in index], pad)).double()
    return parts.objective.scores(parts.targets[name], scores.softmax(-1))
