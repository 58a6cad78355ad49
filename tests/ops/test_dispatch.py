"""Who is chosen, and what is said about it."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ffn.ops import dispatch
from ffn.ops.dispatch import Choice, check_backend, choose

CACHED = [
    dispatch._cpu_vendor,
    dispatch._has_onednn_linear,
    dispatch.float32_faster_in_onednn,
    dispatch.bfloat16_in_onednn,
]
CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def _asked_anew():
    """Answers are remembered for the process; forget them before and after pretending another machine."""
    real = [function.cache_clear for function in CACHED]
    for clear in real:
        clear()
    yield
    for clear in real:
        clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_callers_defaults_do_not_matter(device: str, dtype: torch.dtype) -> None:
    asked = [*CACHED, dispatch.int8_in_onednn, dispatch.int8_in_fbgemm]
    truth = [function() for function in asked]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert [function.__wrapped__() for function in asked] == truth
            for function in CACHED:
                function.cache_clear()
            assert [function() for function in asked] == truth
    finally:
        torch.set_default_dtype(before)


def test_names() -> None:
    assert dispatch.BACKENDS == ("auto", "eager", "triton", "reference")
    for name in dispatch.BACKENDS:
        check_backend(name)
    for ask in (check_backend, lambda name: choose(name, CPU, torch.float32)):
        with pytest.raises(
            ValueError, match=r"^backend='cuda': no such backend; choose one of auto, eager, "
        ):
            ask("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_who_is_chosen_and_why(dtype: torch.dtype) -> None:
    auto, eager = choose("auto", CPU, dtype), choose("eager", CPU, dtype)
    assert auto.backend == eager.backend == "eager"
    assert auto.reason.startswith(f"torch ops serve cpu {str(dtype)[6:]}")
    assert eager.reason.startswith("asked for by name")
    assert (auto.onednn, auto.float32_in_onednn) == (eager.onednn, eager.float32_in_onednn)
    assert ("oneDNN" in auto.reason) == auto.onednn
    reference = choose("reference", CPU, dtype)
    assert reference == Choice("reference", "asked for by name: the textbook, with plain autograd")
    if dtype in (torch.float64, torch.float16):
        assert not auto.onednn


def test_only_float32_products_change_their_library_wholesale() -> None:
    for dtype in DTYPES:
        choice = choose("auto", CPU, dtype)
        assert not choice.float32_in_onednn or dtype == torch.float32
        assert not choice.float32_in_onednn or dispatch.float32_faster_in_onednn()


@pytest.mark.parametrize(
    ("installed", "available", "capability", "hip", "device", "reason"),
    [
        (True, True, (9, 0), None, "cuda", None),
        (True, True, (8, 0), None, "cuda", None),
        (False, True, (9, 0), None, "cuda", "the package triton is not installed"),
        (True, False, (9, 0), None, "cuda", "torch sees no GPU"),
        (True, True, (7, 5), None, "cuda", "the GPU's compute capability is 7.5; 8.0 is the least"),
        (True, True, (9, 0), "6.0", "cuda", "the kernels run on NVIDIA GPUs, not on ROCm"),
        (True, True, (9, 0), None, "mps", "the kernels run on NVIDIA GPUs, not on mps"),
    ],
)
def test_kernels_run_where_they_can_and_else_say_why(
    monkeypatch, installed: bool, available: bool, capability, hip, device: str, reason: str | None
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    real = dispatch.find_spec
    absent = {} if installed else {"triton"}
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name in absent else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "cc")
    where = torch.device(device)
    assert dispatch.why_not_triton(where, torch.bfloat16) == reason
    auto = choose("auto", where, torch.bfloat16)
    if reason is None:
        assert auto.backend == choose("triton", where, torch.bfloat16).backend == "triton"
        assert choose("auto", where, torch.float64).backend == "eager"
        with pytest.raises(ValueError, match=r"^backend='triton' cannot run: no kernel takes float64; use "):
            choose("triton", where, torch.float64)
    else:
        assert auto.backend == "eager"
        with pytest.raises(ValueError, match=rf"^backend='triton' cannot run: {reason}; use "):
            choose("triton", where, torch.bfloat16)


def test_triton_wants_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    where = torch.device("cuda"), torch.bfloat16
    for found in (["gcc"], ["clang"]):
        monkeypatch.setattr(dispatch, "which", lambda name, found=found: name if name in found else None)
        assert dispatch.why_not_triton(*where) is None
    monkeypatch.setattr(dispatch, "which", lambda name: None)
    assert choose("auto", *where).reason == "Triton finds no C compiler (gcc, clang or what CC names)"
    monkeypatch.setenv("CC", "/opt/cc")
    assert dispatch.why_not_triton(*where) is None


def test_meta_tensors_are_served_by_torch() -> None:
    choice = choose("auto", torch.device("meta"), torch.float32)
    assert choice == Choice("eager", "torch ops serve meta float32")


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("vendor", "capability", "amx", "onednn", "faster"),
    [
        ("AuthenticAMD", "AVX512", False, True, True),
        ("GenuineIntel", "AVX512", False, True, False),
        ("AuthenticAMD", "AVX512", True, True, False),  # tiles would round to bfloat16
        ("AuthenticAMD", "AVX2", False, True, False),
        ("AuthenticAMD", "AVX512", False, False, False),
        ("", "DEFAULT", False, False, False),
    ],
)
def test_float32_goes_to_onednn_only_where_it_stays_float32(
    monkeypatch, vendor: str, capability: str, amx: bool, onednn: bool, faster: bool
) -> None:
    monkeypatch.setattr(dispatch, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(dispatch, "_has_onednn_linear", lambda: onednn)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert dispatch.float32_faster_in_onednn() == faster
    choice = choose("auto", CPU, torch.float32)
    assert (choice.onednn, choice.float32_in_onednn) == (faster, faster)
    if not onednn:
        assert not choose("auto", CPU, torch.bfloat16).onednn


@pytest.mark.usefixtures("_asked_anew")
def test_a_build_without_the_private_op_is_no_error(monkeypatch) -> None:
    class Empty:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Empty())
    assert dispatch._has_onednn_linear() is False
    for dtype in DTYPES:
        assert not choose("auto", CPU, dtype).onednn


def test_while_compiling_the_compiler_owns_the_products() -> None:
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        choice = choose("auto", x.device, x.dtype)
        seen.append((choice.backend, choice.reason, choice.onednn, choice.float32_in_onednn))
        return x + 1

    compiled(torch.ones(3))
    assert seen == [("traced", "compiled: the compiler owns the products", False, False)]
    with pytest.raises(ValueError, match="backend='cuda'"):
        choose("cuda", CPU, torch.float32)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "probe", [dispatch._has_onednn_linear, dispatch.int8_in_onednn, dispatch.int8_in_fbgemm]
)
def test_what_the_processor_can_is_found_within_a_trace_too(probe) -> None:
    can, found = probe(), []

    def first_call(x: torch.Tensor) -> torch.Tensor:
        probe.cache_clear()
        found.append(probe())
        return x + 1

    for run in (torch.jit.trace, lambda f, x: make_fx(f)(x)):
        run(first_call, torch.ones(2))
    assert set(found) == {can}
