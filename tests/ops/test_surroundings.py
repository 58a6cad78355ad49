"""What reaches the rule from outside: many gradients or threads at once, patches, contradicting options."""

import threading
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ffn import FeedForward, feed_forward
from ffn.ops import hardware
from ffn.ops.matmul import float32_in_onednn
from tests.ops.samples import draw, gradients


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_vectorised_jacobian_and_hessian(activation: str, p: float) -> None:
    block = FeedForward(4, 6, p, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return block(x)

    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(jacobian(f, x, vectorize=True), jacobian(f, x))
    energy = lambda x: f(x).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(energy, x, vectorize=True), hessian(energy, x))


@pytest.mark.skipif(not hardware.float32_faster_in_onednn(), reason="float32 products stay in MKL here")
def test_threads_restore_the_precision_setting() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    both_within, may_leave = threading.Barrier(2), threading.Event()

    def first() -> None:
        with float32_in_onednn():
            both_within.wait()
            may_leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    with float32_in_onednn():
        both_within.wait()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", "the first thread is still within"
    may_leave.set()
    thread.join()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_save_input_under_plain_autograd_raises() -> None:
    with pytest.raises(ValueError, match=r"^save must be"):
        FeedForward(4, activation=lambda v: v.sin(), save="input")
    with pytest.raises(ValueError, match=r"^save must be"):
        feed_forward(torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3), save="input", backend="reference")


def test_patch_of_nn_linear_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = FeedForward(4, 6), torch.randn(2, 4)
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert "replaced" in block.explain(x)
    torch.testing.assert_close(
        block(x), 2 * plain(block.down_proj, torch.nn.functional.gelu(block.up_proj(x)))
    )


def test_explain_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in FeedForward(4).explain(torch.randn(2, 4))
        with pytest.raises(ValueError, match=r"^x must be"):
            FeedForward(4).explain(torch.randn(2, 5))


def test_empty_module_as_activation() -> None:
    block, x = FeedForward(4, 6, activation=torch.nn.Sequential()), torch.randn(2, 4)
    torch.testing.assert_close(block(x), block.down_proj(block.up_proj(x)))


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_saved_tensor_hooks_and_selective_checkpointing(name: str) -> None:
    arguments = draw(name)
    run = partial(feed_forward, activation=name)
    want = gradients(run(*arguments), arguments, dy := torch.randn(7, 5, dtype=torch.float64))

    def products_kept(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        kept = "mm" in str(op) or "linear" in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, products_kept)
    ys = [checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts)]
    for hooks in (torch.autograd.graph.save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t)):
        with hooks:
            ys.append(run(*arguments))
    for y in ys:
        for ours, theirs in zip(gradients(y, arguments, dy), want, strict=True):
            assert torch.equal(ours, theirs)
