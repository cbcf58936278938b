"""The executor with small fake stages: every way in which a child can end, hang or misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxsplit.child_environment import can_grow_segments, child_environment, gfx_versions, is_rocm, needs_gfx_override
from fluxsplit.errors import FluxsplitError, ModelFileMissing, OutOfMemory
from fluxsplit.executor import StageProcess, run_stage, stage_command
from fluxsplit.jobs import DecodeJob

JOB = DecodeJob(("a.pt",), "vae.safetensors", "images", "cpu")
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="signals")

PRELUDE = """
import json, os, signal, sys, time
def say(**event): print(json.dumps(event), flush=True)
say(event="ready")
job = json.loads(sys.stdin.readline())
"""


def fake(body: str) -> list[str]:
    """The command line of a stage that does `body` once it has its job."""
    return [sys.executable, "-c", PRELUDE + textwrap.dedent(body)]


def run(body: str) -> list[dict[str, Any]]:
    return list(run_stage("decode", JOB, fake(body)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3] if Path("/proc").is_dir() else True


def test_events_arrive_in_order_and_the_process_is_gone_at_the_end() -> None:
    events = run("""
        say(event="note", text=job["vae"])
        say(event="result", path="ä.png", recipe=None)
        say(event="done", results=1, failures=0)
        """)
    assert [event["event"] for event in events] == ["ready", "note", "result", "done"]
    assert events[1]["text"] == "vae.safetensors"
    assert events[2]["path"] == "ä.png"


def test_a_stage_may_start_ahead_of_its_turn() -> None:
    with StageProcess("decode", fake("say(event='done', results=0, failures=0)")) as process:
        events = process.events()
        assert next(events)["event"] == "ready"
        process.submit(JOB)
        assert next(events)["event"] == "done"
        assert process._process.poll() == 0


def test_a_stage_that_is_never_needed_ends() -> None:
    with StageProcess("decode", fake("time.sleep(60)")) as process:
        pass
    assert process._process.poll() is not None


def test_garbage_on_stdout_is_kept_aside() -> None:
    with StageProcess(
        "decode",
        fake(r"""
        print("Loading checkpoint shards: 100%")
        print("[1, 2]")
        print('{"no": "event"}')
        print("{" * 100000)
        sys.stdout.flush()
        sys.stdout.buffer.write(b"\xff\xfe\n")
        say(event="done", results=0, failures=0)
        """),
    ) as process:
        process.submit(JOB)
        assert [event["event"] for event in process.events()] == ["ready", "done"]
        assert "Loading checkpoint shards: 100%" in process.stderr_tail


def test_a_flood_on_stderr_blocks_nothing_and_is_bounded() -> None:
    with StageProcess(
        "decode",
        fake("""
        for _ in range(20000): sys.stderr.write("x" * 200 + "\\n")
        sys.stderr.write("y" * 3_000_000 + "\\n")
        sys.stderr.write("the end\\n"); sys.stderr.flush()
        say(event="done", results=0, failures=0)
        """),
    ) as process:
        process.submit(JOB)
        assert [event["event"] for event in process.events()] == ["ready", "done"]
    assert process.stderr_tail.endswith("the end")
    assert len(process.stderr_tail) < 200 * 4200


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(1, FluxsplitError), (3, ModelFileMissing), (4, OutOfMemory), (99, FluxsplitError)]
)
def test_a_reported_error_is_raised_as_its_class(exit_code: int, kind: type[FluxsplitError]) -> None:
    with pytest.raises(kind) as caught:
        run(f"say(event='error', exit_code={exit_code}, message='no room', hint='make some', traceback='Trace: x')")
    assert type(caught.value) is kind
    assert caught.value.line() == "no room; make some"
    assert "Trace: x" in caught.value.__notes__[0]


@POSIX_ONLY
@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", OutOfMemory, "killed, most likely by the system because memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", FluxsplitError, "ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGBUS)", FluxsplitError, "mapped"),
        ("sys.stderr.write('libfoo.so is missing\\n'); sys.exit(7)", FluxsplitError, "exit code 7.*libfoo.so"),
        ("sys.exit(0)", FluxsplitError, "exit code 0 before it was done"),
        ("os._exit(137)", OutOfMemory, "memory ran out"),
    ],
)
def test_a_death_without_a_word_is_explained(body: str, kind: type[FluxsplitError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        run(body)
    assert type(caught.value) is kind


def test_a_stage_that_cannot_even_start_is_explained() -> None:
    job = DecodeJob(("a" * 300_000,), "v", "o", "cpu")  # more than a pipe holds: writing it meets a closed pipe
    with pytest.raises(FluxsplitError, match=r"exit code 1.*ModuleNotFoundError"):
        list(run_stage("decode", job, [sys.executable, "-c", "import no_such_module"]))


def test_a_death_after_done_is_no_error() -> None:
    assert run("say(event='done', results=1, failures=0); os._exit(3)")[-1]["event"] == "done"


def test_leaving_early_ends_the_process() -> None:
    process = StageProcess("decode", fake("say(event='note', text='')\ntime.sleep(60)"))
    with pytest.raises(KeyboardInterrupt), process:
        process.submit(JOB)
        for event in process.events():
            if event["event"] == "note":
                raise KeyboardInterrupt
    assert process._process.poll() is not None


@POSIX_ONLY
def test_a_stubborn_stage_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsplit.executor.TERMINATE_WAIT_S", 0.3)
    started = time.monotonic()
    with StageProcess(
        "decode",
        fake("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(event="note", text="")
        time.sleep(60)
        """),
    ) as process:
        process.submit(JOB)
        assert [next(event for event in process.events() if event["event"] == "note")]
    assert process._process.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 60


@POSIX_ONLY
def test_a_flood_of_events_that_nobody_reads_does_not_keep_the_process() -> None:
    with StageProcess("decode", fake("while True: say(event='note', text='x' * 1000)")) as process:
        process.submit(JOB)
        events = process.events()
        next(events)
        time.sleep(0.5)
        assert process._lines.qsize() <= 1000
    assert process._process.poll() is not None


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a stage which hangs, and prints the stage's pid."""
    child = PRELUDE + "say(event='note', text=str(os.getpid()))\nimport threading\n"
    child += "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()\ntime.sleep(60)\n"
    script = textwrap.dedent(f"""
        import sys
        from fluxsplit.executor import run_stage
        from fluxsplit.jobs import DecodeJob
        try:
            for event in run_stage("decode", DecodeJob((), "v", "o", "cpu"), [sys.executable, "-c", {child!r}]):
                if event["event"] == "note":
                    print(event["text"], flush=True)
        except KeyboardInterrupt:
            sys.exit(130)
        """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=child_environment(os.environ)
    )
    yield process
    process.kill()
    process.communicate()


def gone(pid: int) -> bool:
    for _ in range(300):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


@POSIX_ONLY
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_the_stage_dies_with_its_parent(parent: subprocess.Popen[str], how: str) -> None:
    assert parent.stdout is not None
    stage = int(parent.stdout.readline())
    assert alive(stage)
    parent.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGINT)
    assert parent.wait(60) == (-signal.SIGKILL if how == "kill -9" else 130)
    assert gone(stage)


@POSIX_ONLY
def test_the_stage_leads_its_own_process_group() -> None:
    with StageProcess("decode", fake("time.sleep(60)")) as process:
        assert os.getpgid(process.pid) == process.pid != os.getpgrp()


def test_the_command_line_takes_nothing_from_the_current_folder() -> None:
    assert stage_command("text") == [sys.executable, "-P", "-m", "fluxsplit.stages", "text"]


def test_the_child_gets_defaults_that_a_person_can_override(tmp_path: Path) -> None:
    environment = child_environment({"MIOPEN_FIND_MODE": "1", "HOME": "/h"}, tmp_path)
    assert environment["MIOPEN_FIND_MODE"] == "1"
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert environment["HOME"] == "/h"
    assert "HSA_OVERRIDE_GFX_VERSION" not in environment
    assert "MALLOC_TRIM_THRESHOLD_" not in environment
    assert int(environment["GOMP_SPINCOUNT"]) < 10_000, "threads that spin keep others from their cores"
    kept = {"MALLOC_TRIM_THRESHOLD_": "9"}
    assert int(child_environment({}, tmp_path, stage="sample")["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30
    assert child_environment(kept, tmp_path, stage="sample")["MALLOC_TRIM_THRESHOLD_"] == "9"


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], False),
        ([100300], False),
        ([100301], True),
        ([100302], True),
        ([100300, 100306], True),
        ([110000, 100306], False),
        ([90010], False),
    ],
)
def test_the_gfx_override_is_for_rdna2_without_kernels_of_its_own(versions: list[int], expected: bool) -> None:
    assert needs_gfx_override(versions) is expected


def test_kfd_nodes_are_read(tmp_path: Path) -> None:
    for number, version in enumerate(["0", "100301", "nonsense"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
    assert gfx_versions(tmp_path) == [100301]
    assert child_environment({}, tmp_path)["HSA_OVERRIDE_GFX_VERSION"] == "10.3.0"
    assert child_environment({"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, tmp_path)["HSA_OVERRIDE_GFX_VERSION"] == "11.0.0"


def test_events_are_json_lines() -> None:
    assert json.loads(json.dumps(run("say(event='done', results=0, failures=0)")[-1])) == {
        "event": "done",
        "results": 0,
        "failures": 0,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux alone")
def test_segments_grow_unless_the_person_says_otherwise_or_torch_is_amds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = tmp_path / "no such folder"
    assert child_environment({}, none)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" in child_environment({}, tmp_path), "a processor's own graphics may be AMD's"
    monkeypatch.setattr("fluxsplit.child_environment.version", lambda name: "2.11.0+rocm7.2")
    assert is_rocm.__wrapped__()
    monkeypatch.setattr("fluxsplit.child_environment.is_rocm", lambda: True)
    assert "PYTORCH_ALLOC_CONF" not in child_environment({}, none)
    monkeypatch.undo()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        got = child_environment({name: "own"}, none)
        assert {key: value for key, value in got.items() if "ALLOC_CONF" in key} == {name: "own"}


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux alone")
def test_segments_do_not_grow_under_wsl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "osrelease"
    for release, grows in (("6.6.87.2-microsoft-standard-WSL2", False), ("6.14.0-37-generic", True)):
        kernel.write_text(release + "\n")
        assert can_grow_segments(kernel) is grows
    assert can_grow_segments(tmp_path / "none")
    monkeypatch.setattr("fluxsplit.child_environment.can_grow_segments", lambda: False)
    assert "PYTORCH_ALLOC_CONF" not in child_environment({}, tmp_path)


@pytest.mark.parametrize(("enabled", "calls"), [("1", 1), ("0", 0), (None, 0)])
def test_what_was_tuned_is_written_before_a_stage_ends(
    enabled: str | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage does not end in order, and older torch writes only then; newer has no `write_file`."""
    import torch.cuda.tunable

    from fluxsplit.stages import keep_tuned

    written: list[int] = []
    monkeypatch.delenv("PYTORCH_TUNABLEOP_ENABLED", raising=False)
    if enabled is not None:
        monkeypatch.setenv("PYTORCH_TUNABLEOP_ENABLED", enabled)
    monkeypatch.setattr(torch.cuda.tunable, "write_file", lambda: written.append(1), raising=False)
    keep_tuned()
    monkeypatch.delattr(torch.cuda.tunable, "write_file")
    keep_tuned()
    assert len(written) == calls
