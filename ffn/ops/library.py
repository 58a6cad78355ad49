"""Register the package's ops with torch, under the namespace `ffn`."""

import threading
from collections.abc import Callable

import torch

_library = torch.library.Library("ffn", "DEF")


class _Thread(threading.local):
    def __init__(self):
        self.devices: set[torch.device] = set()  # devices whose CUDA context this thread has entered


_thread = _Thread()


def _enter_context(device: torch.device) -> None:
    """Set the CUDA context of a new thread, such as autograd's.

    Tensor descriptors are made before the first launch would set it.
    """
    if device not in _thread.devices:
        torch.cuda.mem_get_info(device)
        _thread.devices.add(device)


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register `ffn::name` with one implementation for all devices and its shape rule; return the op.

    Autograd stays outside, in an autograd.Function: a call costs a few microseconds that way, several
    times less than with torch.library.custom_op.
    """

    def on_its_device(first: torch.Tensor, *rest):
        if not first.is_cuda:
            return implementation(first, *rest)
        with torch.cuda.device(first.device):  # a kernel is launched on the current device
            _enter_context(first.device)
            return implementation(first, *rest)

    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_its_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffn::{name}", fake, lib=_library)
    return getattr(torch.ops.ffn, name).default
