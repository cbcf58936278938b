"""The command never loads torch: read off every room's imports, and seen in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from headers import all_in_one, write

PACKAGE = Path(__file__).parents[1] / "fluxsplit"
ROOMS = sorted(file.stem for file in PACKAGE.glob("*.py"))
HEAVY = {"torch", "numpy", "diffusers", "transformers", "scipy", "PIL", "safetensors", "accelerate", "tokenizers"}
IN_STAGES_ONLY = {"PIL"}
"""May be imported by a light room inside a function that only a stage calls."""
PARENT = ("__main__", "cli")


def imports(room: str) -> set[str]:
    """The modules that a room names in import statements, also inside functions: `torch`, `fluxsplit.jobs`, ..."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports by a relative name"
            if node.module == "fluxsplit":
                found |= {f"fluxsplit.{alias.name}" for alias in node.names if alias.name in ROOMS}
            else:
                found.add(str(node.module))
    return found


def at_the_top(room: str) -> set[str]:
    """The outermost names of what a room imports when it is imported itself."""
    body = ast.parse((PACKAGE / f"{room}.py").read_text("utf-8")).body
    plain = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {str(n.module) for n in body if isinstance(n, ast.ImportFrom)}}


def neighbours(room: str) -> set[str]:
    """The rooms that a room imports."""
    names = {name.removeprefix("fluxsplit.").split(".")[0] for name in imports(room) if name.startswith("fluxsplit.")}
    return names & set(ROOMS)


def reached(starts: tuple[str, ...]) -> set[str]:
    """The rooms that are loaded with these."""
    rooms: set[str] = set()
    waiting = list(starts)
    while waiting:
        room = waiting.pop()
        if room not in rooms:
            rooms.add(room)
            waiting += neighbours(room)
    return rooms


def test_the_command_reaches_no_room_that_is_heavy() -> None:
    for room in sorted(reached(PARENT)):
        outside = {name.split(".")[0] for name in imports(room)}
        heavy = outside & (HEAVY - IN_STAGES_ONLY) | at_the_top(room) & HEAVY
        assert not heavy, f"{room} imports {heavy}"


def test_the_command_reaches_its_rooms_and_no_stage() -> None:
    rooms = reached(PARENT)
    assert {"executor", "models", "checkpoint", "latents", "inspection", "settings", "progress"} <= rooms
    assert not {room for room in rooms if room.startswith("stage")}


def test_nobody_imports_the_stages() -> None:
    for room in ROOMS:
        assert "stages" not in neighbours(room), room


def test_click_is_not_imported() -> None:
    """typer 0.26 and later bring their own, so that `import click` fails or finds a stranger."""
    for room in ROOMS:
        assert not any(name.split(".")[0] == "click" for name in imports(room)), room


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_itself_in_a_circle(room: str) -> None:
    assert room not in reached(tuple(neighbours(room)))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is(room: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / f"{room}.py").read_text("utf-8")))


def loaded(folder: Path, *words: str) -> set[str]:
    """The modules that a process has loaded after running a command line."""
    script = (
        "import json, sys\n"
        "from fluxsplit.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("sample", "--help"), ("decode", "--help")])
def test_help_loads_neither_heavy_modules_nor_rich(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert not loaded(tmp_path, *words) & (HEAVY | {"rich", "click"})


def test_info_loads_neither_heavy_modules_nor_rich(tmp_path: Path) -> None:
    from fluxsplit.latents import write_latent

    write_latent(tmp_path, "x", bytes(4 * 16 * 4 * 4), (1, 16, 4, 4), None, format="pt")
    write(tmp_path / "model.safetensors", all_in_one())
    for name in ("x.pt", "model.safetensors"):
        assert not loaded(tmp_path, "info", name) & (HEAVY | {"rich", "click"})


def test_a_dry_run_loads_no_heavy_modules(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", all_in_one())
    for name in ("t5xxl/tokenizer.json", "clip_l/vocab.json", "clip_l/merges.txt"):
        (tmp_path / "tokenizers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tokenizers" / name).write_text("{}")
    assert not loaded(tmp_path, "sample", "-m", "model.safetensors", "-p", "a fox", "--dry-run") & HEAVY
