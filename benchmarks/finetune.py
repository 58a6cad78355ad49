"""Train transformers' encoder as a classifier: a plain torch loop over the batches of `ffn classify`."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn

import ffn
from ffn.classify import ClassifyConfig
from ffn.classify.batches import TextEncoder, batches, collate
from ffn.classify.metrics import Scores
from ffn.classify.splits import Splits
from ffn.text.windows import derive_seed


class TheirClassifier(nn.Module):
    """transformers' encoder with mean pooling, dropout and a Linear."""

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


def fine_tune(base: str, what: str, config: ClassifyConfig, splits: Splits) -> dict:
    """Train as `ffn classify train` does with this config; return a row."""
    rows, pad = token_rows(base, splits)
    options, targets = config.train, splits.targets["train"]
    torch.manual_seed(options.seeds[0])
    model = TheirClassifier(base, len(splits.objective.classes), what, config.head.dropout)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(model, config)
    lengths = [len(row) for row in rows["train"]]
    steps, step, seconds = options.epochs * -(-len(lengths) // options.batch_size), 0, 0.0
    best, kept_state, best_epoch = -1.0, {}, 0
    for epoch in range(1, options.epochs + 1):
        start = time.perf_counter()
        model.train()
        generator = torch.Generator().manual_seed(derive_seed(options.seeds[0], "epoch", epoch))
        for index in batches(lengths, options.batch_size, generator):
            tokens, mask = collate([rows["train"][i] for i in index], pad)
            loss = nn.functional.cross_entropy(model(tokens, mask), targets[index])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, options.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.chosen_lr * options.lr_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            step += 1
        seconds += time.perf_counter() - start
        found = _scores(model, rows["val"], pad, splits, "val").values["accuracy"]
        print(f"epoch {epoch}: {found:.4f}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if found > best:
            best, best_epoch = found, epoch
            kept_state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(kept_state, strict=False)
    scores = _scores(model, rows["test"], pad, splits, "test").values
    return {
        "accuracy": scores["accuracy"],
        "f1_macro": scores["f1_macro"],
        "epochs": options.epochs,
        "best_epoch": best_epoch,
        "train_s": seconds,
        "epoch_s": seconds / options.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
    }


def _optimizer(model: TheirClassifier, config: ClassifyConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices other than the embedding."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and p is not model.backbone.get_input_embeddings().weight]
    others = [p for p in trained if all(p is not matrix for matrix in matrices)]
    groups = [
        {"params": matrices, "weight_decay": config.train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.chosen_lr, betas=config.train.betas, fused=True)  # type: ignore[arg-type]


def token_rows(base: str, splits: Splits) -> tuple[dict[str, list[list[int]]], int]:
    """Return the encoded rows of every split and the padding id, as in `ffn classify`."""
    encode = TextEncoder(ffn.load_tokenizer(base), 512)
    return {name: encode(rows.texts)[0] for name, rows in splits.rows.items()}, encode.pad


@torch.no_grad()
def _scores(model: nn.Module, rows: list[list[int]], pad: int, splits: Splits, name: str) -> Scores:
    model.eval()
    scores = torch.empty(len(rows), len(splits.objective.classes), dtype=torch.float64)
    for index in batches([len(row) for row in rows], 128):
        scores[index] = model(*collate([rows[i] for i in index], pad)).double()
    return splits.objective.scores(splits.targets[name], scores.softmax(-1))
