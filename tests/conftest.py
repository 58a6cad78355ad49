"""Shared by all tests: the hypothesis profile, a fixed seed, fixtures, and data beside the checkout.

Helpers are imported, not injected: ``from tests.conftest import shared_data``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# A deadline would time the machine, not the code. CI draws the same examples each time, other runs new ones.
settings.register_profile(
    "ffn", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ffn")


WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # one thread per worker and per process that tests start: contending threads are slower
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes if pytest-xdist is installed and -n is not given."""
    whole = config.args == config.getini("testpaths")
    if whole and not WORKER and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the one test of several minutes first, so that the others run beside it."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")


def shared_data(name: str) -> Path:
    """Return the file ``shared/data/NAME`` in or above the checkout; skip the test if there is none."""
    for folder in (ROOT, *ROOT.parents):
        path = folder / "shared" / "data" / name
        if path.exists():
            return path
    pytest.skip(f"shared/data/{name} is not kept beside this checkout")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Reset Dynamo before and after: it compiles the same code only a few times per process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes weights of any size."""
    from ffn.ops import hardware
    from ffn.packing import pack as packing

    if not hardware.packs(torch.float32):
        pytest.skip("oneDNN packs nothing in this build of torch")
    monkeypatch.setattr(packing, "WORTH_PACKING", 0)
