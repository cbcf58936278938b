"""What is different on Windows, as far as it can be tried elsewhere: locks, patterns, code pages, device names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fluxsplit import cli_gallery, durable
from fluxsplit.arguments import gather_files, named
from fluxsplit.errors import FluxsplitError, UsageError, is_out_of_memory
from fluxsplit.picks import is_plain_name
from fluxsplit.settings import defaults


class Held(PermissionError):
    """As Windows says that a file is in use, or that memory ran out."""

    def __init__(self, number: int = 32) -> None:
        super().__init__(13, "The process cannot access the file")
        self.winerror = number


@pytest.fixture
def holders(monkeypatch: pytest.MonkeyPatch) -> list[PermissionError]:
    """Errors that the next renames meet, one each."""
    errors: list[PermissionError] = []
    true = Path.replace

    def replace(self: Path, target: Path) -> Any:
        if errors:
            raise errors.pop()
        return true(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(durable, "HELD_WAITS_S", (0.0,) * 3)
    return errors


def test_a_name_that_is_held_for_a_moment_is_given_all_the_same(tmp_path: Path, holders: list[PermissionError]) -> None:
    holders += [Held(5), Held(32), Held(33)]
    durable.replace(tmp_path / "a.png", b"whole")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"whole"]


def test_what_cannot_get_its_name_is_kept_and_named(tmp_path: Path, holders: list[PermissionError]) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    holders += [Held() for _ in range(4)]
    with pytest.raises(FluxsplitError, match="open in another program") as raised:
        durable.replace(tmp_path / "a.png", b"new")
    (part,) = [file for file in tmp_path.iterdir() if file.name != "a.png"]
    assert part.read_bytes() == b"new" and str(part) in raised.value.message
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_another_refusal_is_not_tried_again(tmp_path: Path, holders: list[PermissionError]) -> None:
    holders += [PermissionError(13, "no"), PermissionError(13, "no")]
    with pytest.raises(FluxsplitError, match="cannot write"):
        durable.replace(tmp_path / "a.png", b"new")
    assert len(holders) == 1 and not list(tmp_path.iterdir())


def test_patterns_that_the_shell_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.pt", "a.pt", "c.png", "d[1].pt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert named("*.pt") == [Path("a.pt"), Path("b.pt"), Path("d[1].pt")]
    assert named("d[1].pt") == [Path("d[1].pt")], "a file that is there is no pattern"
    found = gather_files([str(tmp_path / "?.p*")], lambda folder: [], "x")
    assert found == [tmp_path / name for name in ("a.pt", "b.pt", "c.png")]
    assert named("missing.pt") == [Path("missing.pt")]
    with pytest.raises(UsageError, match=r"nothing matches \*\.webp"):
        named("*.webp")


def test_settings_as_notepad_saves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fluxsplit.toml"
    file.write_bytes(b"\xef\xbb\xbf" + rb"model = 'C:\models\x.safetensors'")
    assert defaults("sample", {})["model"] == r"C:\models\x.safetensors"
    file.write_text(r'model = "C:\models\x.safetensors"')
    with pytest.raises(UsageError, match="not valid TOML") as raised:
        defaults("sample", {})
    assert "single quotes" in raised.value.hint


@pytest.mark.parametrize("name", ["CON", "aux.png", "com1.png", "nul .png", "x.png.", "x.png "])
def test_names_that_windows_reads_otherwise_are_no_pictures(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("console.png") and is_plain_name("x.aux.png")


def test_a_paging_file_that_is_too_small_is_out_of_memory() -> None:
    assert is_out_of_memory(Held(1455)) and not is_out_of_memory(Held(32))
    assert is_out_of_memory(ImportError('[WinError 1455] The paging file is too small. Error loading "x.dll"'))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_flags_for_rendering_keep_their_backslashes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli_gallery._rerender_flags("--steps 8 --vae 'a b'") == ("--steps", "8", "--vae", "a b")
    assert cli_gallery._rerender_flags("--seed 1 # 2") == ("--seed", "1", "#", "2")
    monkeypatch.setattr("fluxsplit.cli_gallery.os.name", "nt")
    flags = cli_gallery._rerender_flags(r'--model "C:\my models\x.safetensors"')
    monkeypatch.undo()
    assert flags == ("--model", r"C:\my models\x.safetensors")
