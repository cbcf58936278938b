"""float8 expansion: every code against torch's own cast, scales, pieces, tables, and codes that are not finite."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

from fluxsplit import compiled_expansion, fp8, machine_code
from fluxsplit.errors import FluxsplitError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3, E5M2 = fp8.FLOAT8
CPU = torch.device("cpu")
EXPANDED_BY = [compiled_expansion.expand_into, fp8._by_integers, fp8._by_table, fp8._by_cast]
COMPILED = (torch.float32, torch.bfloat16)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """No loop is left over, before and after."""
    compiled_expansion._loop.cache_clear()
    yield
    compiled_expansion._loop.cache_clear()


def expands_to(method: fp8._Method, dtype: torch.dtype) -> bool:
    return dtype in COMPILED or method is not compiled_expansion.expand_into


def all_codes(float8: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(float8)


def finite_codes(float8: torch.dtype) -> torch.Tensor:
    codes = all_codes(float8)
    return codes.view(torch.uint8)[codes.float().isfinite()].view(float8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, and zeros of the same sign."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float8", fp8.FLOAT8, ids=str)
@pytest.mark.parametrize("method", EXPANDED_BY, ids=lambda m: m.__name__)
def test_every_finite_code_is_what_torch_casts_it_to(
    method: fp8._Method, float8: torch.dtype, dtype: torch.dtype
) -> None:
    codes = finite_codes(float8)
    assert len(codes) == {E4M3: 254, E5M2: 248}[float8]
    out = torch.empty(len(codes), dtype=dtype)
    if not expands_to(method, dtype):
        with pytest.raises(NotImplementedError):
            method(codes, out, 1.0)
        return
    method(codes, out, 1.0)
    assert same_bits(out, codes.to(torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float8", fp8.FLOAT8, ids=str)
@pytest.mark.parametrize("scale", [0.0123, 1.0, 3.5, -2.0, 7e-5, 2.0**-10, 2.0**-8, 2.0**-120, 2.0**100])
def test_a_scale_is_rounded_once_as_torch_rounds_it(float8: torch.dtype, dtype: torch.dtype, scale: float) -> None:
    codes = finite_codes(float8)
    wanted = codes.to(torch.float32).to(dtype).mul_(scale)
    for method in (method for method in EXPANDED_BY if expands_to(method, dtype)):
        out = torch.empty(len(codes), dtype=dtype)
        method(codes, out, scale)
        assert same_bits(out, wanted), method


def test_pieces_and_their_rest_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 100 // min(fp8.MAX_SHARES, torch.get_num_threads()))
    monkeypatch.setattr(fp8, "_buffers", threading.local())
    codes = finite_codes(E4M3).view(torch.uint8).repeat(3)[:701].view(E4M3)
    for dtype in DTYPES:
        for method in (fp8._by_integers, fp8._by_table):
            out = torch.full((900,), -1.0, dtype=dtype)
            method(codes, out[100:801], 1.0)
            assert torch.equal(out[100:801].float(), codes.float())
            assert (out[:100] == -1).all() and (out[801:] == -1).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_compiled_loops_share_the_codes_and_write_nothing_else(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_expansion, "SHARE_ELEMENTS", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        everything = finite_codes(E4M3).view(torch.uint8).repeat(4)
        for first, count in ((0, 1000), (1, 997), (3, 203), (5, 64), (7, 1), (9, 0)):  # also where no vector begins
            codes = everything[first : first + count].view(E4M3)
            out = torch.full((count + 20,), -1.0, dtype=dtype)
            compiled_expansion.expand_into(codes, out[3 : 3 + count], 1.0)
            assert torch.equal(out[3 : 3 + count].float(), codes.float()), (first, count)
            assert (out[:3] == -1).all() and (out[3 + count :] == -1).all(), (first, count)
    finally:
        torch.set_num_threads(before)


def test_without_llvmlite_the_integers_do(monkeypatch: pytest.MonkeyPatch, compiled_anew: None) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert fp8._method.__wrapped__(CPU, E4M3, torch.bfloat16) is fp8._by_integers


def test_what_llvm_does_not_compile_is_done_by_integers(monkeypatch: pytest.MonkeyPatch, compiled_anew: None) -> None:
    monkeypatch.setattr(compiled_expansion, "_LOOP", compiled_expansion._LOOP.replace("fmul", "frobnicate"))
    assert fp8._method.__wrapped__(CPU, E4M3, torch.bfloat16) is fp8._by_integers


def test_compiled_loops_take_only_what_they_can_address() -> None:
    codes, out = finite_codes(E4M3)[:64], torch.empty(64, dtype=torch.bfloat16)
    for bad, bad_out in ((codes[::2], out[:32]), (codes[:32], out[::2]), (codes, out[:8]), (codes[:8], out)):
        with pytest.raises(ValueError, match="codes into"):
            compiled_expansion.expand_into(bad, bad_out, 1.0)
    with pytest.raises(NotImplementedError, match="e4m3fnuz"):
        compiled_expansion.expand_into(codes.view(torch.float8_e4m3fnuz), out, 1.0)


def test_an_interrupted_expansion_ends_only_when_nothing_is_written_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    here, written = threading.get_ident(), threading.Event()

    def loop(codes: int, out: int, count: int, scale: float) -> None:
        if threading.get_ident() == here:
            raise KeyboardInterrupt
        time.sleep(0.2)
        written.set()

    monkeypatch.setattr(compiled_expansion, "_loop", lambda *args: loop)
    monkeypatch.setattr(compiled_expansion, "SHARE_ELEMENTS", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        compiled_expansion.expand_into(finite_codes(E4M3), torch.empty(254, dtype=torch.bfloat16), 1.0)
    assert written.is_set()


def test_a_second_interrupt_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, waits = threading.Event(), list[int]()
    wait = machine_code.wait

    def interrupted(running: list[Future[object]]) -> object:
        waits.append(len(running))
        if len(waits) == 1:
            raise KeyboardInterrupt
        finish.set()
        return wait(running)

    monkeypatch.setattr(machine_code, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine_code.run_side_by_side(lambda here: here or finish.wait(10), [(True,), (False,)])
    assert waits == [1, 1] and finish.is_set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux")
def test_where_memory_may_not_be_executed_the_integers_do() -> None:
    """As under systemd's MemoryDenyWriteExecute; in a process of its own, which stays so."""
    code = """if True:
        import ctypes, torch
        from fluxsplit import fp8
        forbids = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: Linux 6.3
        method = fp8._method(torch.device("cpu"), torch.float8_e4m3fn, torch.float32)
        print(method.__name__ if forbids else "not forbidden")
    """
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    if run.stdout.strip() == "not forbidden":
        pytest.skip("this kernel cannot forbid it")
    assert (run.returncode, run.stdout.strip()) == (0, "_by_integers"), run.stderr


def test_one_buffer_serves_matrices_of_any_shape_in_and_out_of_inference_mode() -> None:
    buffer = torch.empty(1000, dtype=torch.bfloat16)
    with torch.inference_mode():
        fp8.expand(finite_codes(E4M3), torch.bfloat16)  # makes the thread's scratch
    for rows, columns in ((3, 80), (10, 100), (1, 7)):
        codes = finite_codes(E4M3).view(torch.uint8).repeat(4)[: rows * columns].view(E4M3).view(rows, columns)
        out = buffer[: rows * columns].view(rows, columns)
        fp8.expand_into(codes, out)
        assert torch.equal(out.float(), codes.float())


@pytest.mark.parametrize("float8", fp8.FLOAT8, ids=str)
def test_codes_that_are_not_finite_are_found_wherever_they_stand(
    float8: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 128)
    finite = finite_codes(float8).view(torch.uint8).repeat(2)
    assert not fp8.has_nonfinite(finite.view(float8))
    assert not fp8.has_nonfinite(finite[:0].view(float8))
    codes = all_codes(float8)
    bad = codes.view(torch.uint8)[~codes.float().isfinite()]
    assert len(bad) == {E4M3: 2, E5M2: 8}[float8]
    for code in bad:
        for at in (0, 127, 128, len(finite) - 1):
            damaged = finite.clone()
            damaged[at] = code
            assert fp8.has_nonfinite(damaged.view(float8)), (int(code), at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_loop_is_trusted_on_this_cpu(dtype: torch.dtype) -> None:
    assert fp8.self_test(CPU, dtype)
    fastest = compiled_expansion.expand_into if dtype in COMPILED else fp8._by_integers
    assert fp8._method(CPU, E4M3, dtype) is fastest
    assert fp8.is_exact(fp8._by_integers, CPU, E4M3, dtype)


def test_a_method_that_errs_on_one_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def errs(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        fp8._by_table(codes, out, scale)
        out[codes.view(torch.uint8) == 1] = 0  # as where denormals are flushed

    def lacks_float8(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        raise RuntimeError("not implemented for Float8_e4m3fn")

    for broken in (errs, lacks_float8):
        assert not fp8.is_exact(broken, CPU, E4M3, torch.bfloat16)
        monkeypatch.setattr(fp8, "_by_integers", broken)
        monkeypatch.setattr(compiled_expansion, "expand_into", broken)
        assert fp8._method.__wrapped__(CPU, E4M3, torch.bfloat16) is fp8._by_table
        monkeypatch.undo()


def test_a_torch_that_was_not_built_for_the_card_is_called_so() -> None:
    def has_no_kernels(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    with pytest.raises(FluxsplitError, match="was not built for this card"):
        fp8.is_exact(has_no_kernels, CPU, E4M3, torch.bfloat16)


def test_expansion_does_not_depend_on_denormals() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        for dtype in DTYPES:
            for float8 in fp8.FLOAT8:
                assert fp8.is_exact(fp8._by_integers, CPU, float8, dtype)
                assert dtype not in COMPILED or fp8.is_exact(compiled_expansion.expand_into, CPU, float8, dtype)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_code_is_exact_on_the_card(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    assert fp8.self_test(device, dtype)
    for float8 in fp8.FLOAT8:
        codes = finite_codes(float8)
        assert same_bits(fp8.expand(codes.to(device), dtype).cpu(), codes.to(torch.float32).to(dtype))
        assert fp8.is_exact(fp8._by_table, device, float8, dtype)
