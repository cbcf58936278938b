"""Machine code for this very processor, made by LLVM where llvmlite (the extra `cpu`) brings it, and run by threads.

No compiler is needed where it is installed, and nothing is written to the disk. ctypes lets go of the interpreter's
lock while such code runs, so that several threads share a piece of work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

NOT_TO_BE_HAD = (ImportError, RuntimeError, OSError, AttributeError, TypeError, ValueError)
"""What is raised on the way to machine code where there is no llvmlite, or one of another time, or LLVM cannot."""
_engines: list[object] = []
"""They own the compiled code."""


def compiled(*sources: str, **signatures: tuple[type, ...]) -> dict[str, Callable[..., None]]:
    """Functions of modules in LLVM's language (llvm.org/docs/LangRef.html), which may call one another, by their names.

    `signatures` are the types of their arguments; nothing is returned. The code stays for as long as the process lives.
    Raises ImportError without llvmlite, RuntimeError for what is not LLVM's language or not for this processor, OSError
    where memory that is written to may not be executed.
    """
    import llvmlite.binding as llvm  # noqa: PLC0415  (optional, and of no use on a card)

    llvm.check_jit_execution()  # LLVM itself says nothing, and the first call ends the process
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(sources[0])
    for source in sources[1:]:
        module.link_in(llvm.parse_assembly(source))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.loop_unrolling = True
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return {
        name: ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(name)) for name, types in signatures.items()
    }


def has_features(*names: str) -> bool:
    """Whether LLVM makes code for this processor with such instructions (`amx-bf16`).

    What it has no code for ends the process. Raises ImportError without llvmlite.
    """
    import llvmlite.binding as llvm  # noqa: PLC0415  (optional, and of no use on a card)

    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in names)


def run_side_by_side(run: Callable[..., object], shares: Iterable[tuple[Any, ...]]) -> None:
    """Call `run` with each share, the first here and the others in threads, and return when all are done.

    Also when Ctrl-C comes in between: nobody may use what they write to while they do.
    """
    first, *others = shares
    running: list[Future[object]] = []
    try:
        for share in others:
            running.append(_pool().submit(run, *share))
        run(*first)
    finally:
        _wait_for(running)
    for one in running:
        one.result()


def share_out(run: Callable[..., object], pieces: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Call `run` with the number of a thread and each of `pieces`, in their order, and return when all are done.

    A thread takes the next piece when it is done with one. So a core that is slow, or that others use, does less, and
    the others do not wait for it: pieces that are smaller towards the end have all end at about the same time. No more
    threads than pieces are woken. All pieces are done also where one fails, or Ctrl-C comes in between.
    """
    threads = min(threads, len(pieces))
    waiting: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    for item in (*pieces, *[None] * threads):
        waiting.put(item)

    def take(number: int) -> None:
        for piece in iter(waiting.get, None):
            run(number, *piece)

    run_side_by_side(take, ((number,) for number in range(threads)))


def pieces_of(count: int, threads: int, multiple: int, least: int, most: int) -> list[tuple[int, int]]:
    """First and last of pieces for `share_out`: half of an equal share of what is left, between `least` and `most`.

    All but the last are multiples of `multiple`, as `most` is. Smaller than `least` where some threads would get none;
    as large as may be for a single one.
    """
    least = min(least, -(-count // threads // multiple) * multiple)
    found, first = [], 0
    while first < count:
        half = -(-(count - first) // (2 * threads) // multiple) * multiple if threads > 1 else count
        last = min(count, first + min(most, max(least, half)))
        found.append((first, last))
        first = last
    return found


def _wait_for(running: list[Future[object]]) -> None:
    interrupted: KeyboardInterrupt | None = None
    while not all(one.done() for one in running):
        try:
            wait(running)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="machine code")
