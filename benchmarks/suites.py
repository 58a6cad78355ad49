"""The suites: jobs of cases and implementations, the most informative first."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.cases import BASELINE, BLOCKS, WARM, Case


@dataclass(frozen=True)
class Job:
    """Cases with the same implementations; one process on a GPU.

    seconds: time for the rounds of each case.
    limit: seconds until a process on a GPU is ended.
    """

    cases: tuple[Case, ...]
    names: tuple[str, ...]
    seconds: float = 4.0
    limit: float = 150.0


OURS = (BASELINE, "ffn", "ffn save=input")
PLAIN = ("TransformerEncoderLayer", "hf GPT2MLP", "x-transformers", "timm")
GATED = ("hf LlamaMLP", "x-transformers", "timm")
COMPILED = ("torch.compile", "torch max-autotune", "ffn compiled")
PACKED = (BASELINE, "ffn", "ffn packed", "ffn int8")
ON_GPU = ("torch.compile", "ffn compiled", "ffn unfused", "ffn fused", "ffn eager")
LIGER = ("liger", "liger fused", "liger tiled")
SMALL = ("small", "minilm", "bert-base", "gpt2", "qwen2.5-0.5b")  # their weights may fit a processor's cache
BOTH = ("float32", "bfloat16")


def cases(
    blocks: Iterable[str],
    tokens: Iterable[int],
    dtypes: Iterable[str] = BOTH,
    work: str = "training",
    dropouts: Iterable[float] = (0.0,),
) -> tuple[Case, ...]:
    """Return all combinations."""
    found = product(blocks, tokens, dtypes, dropouts)
    return tuple(Case(BLOCKS[block], n, dtype, work, p) for block, n, dtype, p in found)


def of_kind(gated: bool) -> list[str]:
    return [name for name, block in BLOCKS.items() if block.gated == gated]


def quick() -> list[Job]:
    """Return the jobs of a quick look, under a minute on two cores."""
    return [
        Job(cases(["gpt2"], [512]), (*OURS, *PLAIN), seconds=2.0),
        Job(cases(["qwen2.5-0.5b"], [512]), OURS, seconds=2.0),
        Job(cases(["gpt2"], [512], dropouts=[0.1]), OURS, seconds=2.0),
        Job(cases(["gpt2", "qwen2.5-0.5b"], [1], work="inference"), PACKED, seconds=1.0),
    ]


def ffn() -> list[Job]:
    """Return the jobs for a CPU: every shape against every peer that runs there; each case in one job."""
    core, two = ("small", "bert-base", "qwen2.5-0.5b"), ("gpt2", "qwen2.5-0.5b")
    others = [name for name in BLOCKS if name not in two]
    return [
        Job(cases(core, [512, 2048], ("float32", "autocast", "bfloat16"), dropouts=[0.1]), OURS),
        Job(cases(core, [512, 2048], ["autocast"]), OURS),
        Job(cases(of_kind(False), [512]), (*OURS, *PLAIN, *COMPILED)),
        Job(cases(of_kind(True), [512]), (*OURS, *GATED, *COMPILED)),
        Job(cases(core, [2048]), OURS),
        Job(cases(two, [1, 16, 512], work="inference"), (*PACKED, *COMPILED), seconds=2.0),
        Job(cases(SMALL, [1, 16], work=WARM), PACKED, seconds=6.0),
        Job(cases(others, [1, 16, 512], work="inference"), PACKED, seconds=1.0),
        Job(cases(BLOCKS, [2048], work="inference"), PACKED, seconds=1.0),
        Job(cases(["gpt2"], [1, 16, 128, 2048, 8192]), OURS, seconds=3.0),
        Job(cases(["qwen2.5-0.5b"], [1, 16, 128, 8192]), OURS, seconds=3.0),
    ]


def gpu() -> list[Job]:
    """Return the jobs for a GPU: the most important shapes in bfloat16. Some peers need their own process and
    repeat the cases there; ratios are to plain torch in the same process."""

    def at(block: str, tokens: Iterable[int] = (8192, 16384), p: float = 0.0) -> tuple[Case, ...]:
        return cases([block], tokens, ["bfloat16"], dropouts=[p])

    gated = ("llama-3-8b", "qwen2.5-0.5b", "tinyllama-1.1b")
    few = cases(["llama-3-8b"], [1, 4, 16], ["bfloat16"], "inference")
    jobs = [
        Job(at("gpt2"), (*OURS, *ON_GPU, *PLAIN)),
        *(Job(at(block), (*OURS, *ON_GPU, *GATED)) for block in gated[:2]),
    ]
    jobs += [Job(at("gpt2", p=0.1), (*OURS, *ON_GPU, *PLAIN)), Job(at(gated[2]), (*OURS, *ON_GPU, *GATED))]
    jobs += [Job(few, (BASELINE, "torch.compile", "ffn", "ffn compiled", "ffn eager"))]
    every = sum((at(block) for block in gated), ())
    jobs += [Job((*every, *few), (BASELINE, "ffn", *LIGER), limit=100)]
    jobs += [Job((*every, *few), (BASELINE, "ffn", "quack"), limit=100)]
    jobs += [
        Job(every, (BASELINE, "ffn", "torchao float8"), limit=100)
    ]  # it changes the compiler for the whole process
    for block, p in (("gpt2", 0.0), ("gpt2", 0.1), *((block, 0.0) for block in gated)):
        jobs += [Job(at(block, p=p), (BASELINE, "ffn", "torch max-autotune"), limit=100)]
    return [*jobs, Job(every, (BASELINE, "ffn", "quack tuned"), limit=100)]


SUITES = {"quick": quick, "ffn": ffn, "gpu": gpu}


def narrowed(jobs: list[Job], dtypes: Iterable[str], only: Iterable[str]) -> list[Job]:
    """Return the jobs with these dtypes and only the blocks and implementations named in `only`, if any.

    Raises:
        ValueError: if a word of `only` names nothing in these jobs, or no case is left.
    """
    only, dtypes = set(only), set(dtypes)
    blocks = {case.block.name for job in jobs for case in job.cases}
    names = {name for job in jobs for name in job.names}
    if unknown := sorted(only - blocks - names):
        have = ", ".join([*sorted(blocks), *sorted(names)])
        raise ValueError(f"--only {','.join(unknown)}: not in this suite, which has {have}")
    blocks, names = blocks & only or blocks, names & only | {BASELINE} if names & only else names
    kept = []
    for job in jobs:
        some = tuple(case for case in job.cases if case.block.name in blocks and case.dtype in dtypes)
        beside = tuple(name for name in job.names if name in names)
        if some and not {*beside} <= {BASELINE}:
            kept.append(replace(job, cases=some, names=beside))
    if not kept:
        raise ValueError("no case is left: this suite has no such dtype with these names")
    return kept


def toy(case: Case) -> Case:
    """Return a small case of the same kind, for a dry run."""
    block = replace(case.block, name=f"toy {case.block.name}", dim=64, hidden_dim=128)
    return replace(case, block=block, tokens=min(case.tokens, 32))
