"""Only the chosen part trains: the rest has no gradient, no state, no change, nothing saved for backward."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ffn.gpt.freeze import check_choice, render_trained, train_only, transformer_in
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.train.optim import ScheduledOptimizer
from ffn.train.steps import evaluating

SIZES = {"vocab_size": 13, "dim": 8, "num_layers": 3, "num_heads": 2, "max_seq_len": 6}
DECODER = TransformerConfig(**SIZES, tie_embeddings=False, dropout=0.2, ffn_dropout=0.2)
ENCODER = TransformerConfig(
    **SIZES, causal=False, head="none", position="learned", norm_position="post", norm="layernorm", bias=True,
    embedding_norm=True, dropout=0.2,
)  # fmt: skip
TOKENS = torch.tensor([[1, 5, 12, 0, 7, 7], [3, 3, 2, 9, 11, 4]])


class Sorter(nn.Module):
    """A task head over the mean of an encoder's hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Transformer(ENCODER)
        self.head = nn.Linear(8, 2)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(tokens).mean(1)), targets[:, 0] % 2)


def names_of(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def build(kind: str) -> nn.Module:
    return Transformer(DECODER) if kind == "decoder" else Sorter()


CHOICES = ["head", "ffn", "last:1", "last:2", "last:3", "all"]
PREFIX = {"head": 3, "ffn": 0, "last:1": 2, "last:2": 1, "last:3": 0, "all": 0}


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_trains_its_part(kind: str, choice: str) -> None:
    model = build(kind)
    train_only(model, choice)
    last = check_choice(choice, "choice")
    for name, p in model.named_parameters():
        trains = name.startswith("head.") if choice != "ffn" or kind == "classifier" else False
        trains |= choice == "all" or (choice == "ffn" and ".feed_forward." in name)
        inner = name.removeprefix("backbone.")
        trains |= bool(last) and (inner.startswith(tuple(f"blocks.{i}." for i in range(3 - last, 3))))
        trains |= bool(last) and inner.startswith("norm.")
        assert p.requires_grad == trains, name
    assert sum(name.startswith("blocks.") for name in transformer_in(model).at_rest) == PREFIX[choice]
    train_only(model, "all")
    assert all(p.requires_grad for p in model.parameters()), "each choice replaces the one before"


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_do_not_change(kind: str, choice: str, optimizer) -> None:
    """After steps with decay and L1 frozen weights are the same bit for bit; trained matrices have moved."""
    model = build(kind)
    train_only(model, choice)
    if optimizer == "muon" and choice == "head":
        with pytest.raises(ValueError, match=r"(?i)muon"):
            ScheduledOptimizer(model, optimizer)
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = names_of(model)
    options = {"lr": 0.1, "muon_lr": 0.1, "weight_decay": 0.1, "l1": 0.01}
    steps = ScheduledOptimizer(model, optimizer, **options)
    for _ in range(2):
        model.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= trained
        steps.step()
        steps.zero_grad()
    assert {name.rpartition("/")[0] for name in steps.state_tensors()} <= trained
    for name, p in model.named_parameters():
        if name not in trained:
            assert torch.equal(p, before[name]), name
        elif p.ndim == 2:
            assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
@pytest.mark.parametrize("choice", CHOICES)
def test_trained_parts_have_the_gradients_of_full_training(kind: str, choice: str) -> None:
    model = build(kind).double().eval()
    targets = TOKENS.roll(-1, 1)
    model.loss(TOKENS, targets).backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    train_only(model, choice)
    assert not model.training
    model.loss(TOKENS, targets).backward()
    for name in names_of(model):
        torch.testing.assert_close(model.get_parameter(name).grad, full[name], rtol=1e-12, atol=1e-14)


def kept(model: nn.Module) -> int:
    """Bytes that a forward pass saves for backward, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.hidden(TOKENS) if isinstance(model, Transformer) else model.backbone.hidden(TOKENS)
    return sum(t.untyped_storage().nbytes() for pointer, t in found.items() if pointer not in known)


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_nothing_in_the_frozen_prefix_is_saved_for_backward(kind: str) -> None:
    model = build(kind)
    sizes = {}
    for choice in CHOICES:
        train_only(model, choice)
        sizes[choice] = kept(model)
    assert sizes["head"] == 0
    assert 0 < sizes["last:1"] < sizes["last:2"] < sizes["last:3"] <= sizes["all"]
    a_block = sizes["last:2"] - sizes["last:1"]
    assert sizes["last:3"] - sizes["last:2"] == a_block, "each further block saves as much again"
    assert sizes["ffn"] < sizes["last:3"] <= sizes["ffn"] + 3 * a_block


def test_backward_ends_at_the_frozen_prefix() -> None:
    model = build("decoder")
    train_only(model, "last:1")
    seen: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad))
    model(TOKENS)
    assert seen == [False, False, True]


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_the_frozen_prefix_stays_in_eval_mode(kind: str) -> None:
    model = build(kind).train()
    train_only(model, "last:1")
    transformer = transformer_in(model)

    def modes(copied: nn.Module) -> list[bool]:
        part = transformer_in(copied)
        return [m.training for m in (copied, part.embedding, *part.blocks, part.blocks[0].feed_forward)]

    expected = [True, False, False, False, True, False]
    assert modes(model) == expected
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == expected
    assert modes(copy.deepcopy(model).train()) == expected
    if kind == "decoder":
        assert modes(pickle.loads(pickle.dumps(model)).train()) == expected
    x = transformer.blocks[0](transformer.embedding(TOKENS))
    assert torch.equal(x, transformer.blocks[0](transformer.embedding(TOKENS))), "features that can be cached"
    train_only(model, "last:1", frozen_dropout=True)
    assert all(modes(model))
    x = transformer.blocks[0](transformer.embedding(TOKENS))
    assert not torch.equal(x, transformer.blocks[0](transformer.embedding(TOKENS)))
    train_only(model.eval(), "head")
    assert not any(modes(model))
    train_only(model, "all")
    assert all(modes(model.train()))


def test_a_tied_head_cannot_train_alone() -> None:
    model = Transformer(TransformerConfig(**SIZES))
    with pytest.raises(ValueError, match=r"^head\b.*tied"):
        train_only(model, "head")
    assert all(p.requires_grad for p in model.parameters()), "a refused call changes nothing"
    train_only(model, "last:1")
    assert not model.embedding.weight.requires_grad
    assert names_of(model) == {n for n, _ in model.named_parameters() if n.startswith(("blocks.2.", "norm."))}
    train_only(Transformer(TransformerConfig(**SIZES, head="mlm")), "head")


@pytest.mark.parametrize(
    "choice", ["body", "last", "last:", "last:0", "last:-1", "ffn:2", "", "last:4", "lora"]
)
def test_a_wrong_choice_is_refused_and_changes_nothing(choice: str) -> None:
    model = build("classifier")
    with pytest.raises(ValueError, match=choice or "^choice must be"):
        train_only(model, choice)
    assert all(p.requires_grad for p in model.parameters())


def test_models_without_exactly_one_transformer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\b.*Linear"):
        train_only(nn.Linear(2, 2), "all")
    with pytest.raises(ValueError, match=r"^model\b.*ModuleList"):
        transformer_in(nn.ModuleList([Transformer(ENCODER), Transformer(ENCODER)]))
    with pytest.raises(ValueError, match=r"^head\b"):
        train_only(Transformer(ENCODER), "head")


def test_the_table_counts_every_parameter() -> None:
    model = build("classifier")
    train_only(model, "last:1")
    table = render_trained(model)
    rows = {line[:14].strip(): line[14:].split() for line in table.splitlines()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert rows["total"] == [f"{trained:,}", f"{frozen:,}"]
    a_block = sum(p.numel() for p in model.backbone.blocks[0].feed_forward.parameters())
    assert rows["feed-forward"] == [f"{a_block:,}", f"{2 * a_block:,}"]
    assert rows["embedding"][0] == "-"
    assert rows["task head"] == ["18", "-"]
    assert table.splitlines()[-1] == "backward ends before the embedding and 2 of 3 blocks"
