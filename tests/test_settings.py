"""Settings: precedence, unknown keys, values, workflow files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fluxsplit.errors import UsageError
from fluxsplit.settings import COMMANDS, DEFAULTS, WORKFLOW, defaults, nearest, read_workflow, user_config

WORKFLOWS = Path(__file__).parents[1] / "workflows"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose configuration folder is empty."""
    (tmp_path / "config" / "fluxsplit").mkdir(parents=True)
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_nothing_set(home: dict[str, str], tmp_path: Path) -> None:
    assert defaults("sample", home, tmp_path) == {}


def test_environment_over_folder_over_user(home: dict[str, str], tmp_path: Path) -> None:
    user_config(home).write_text('model = "user"\nvae = "user"\nclip = "user"\n[sample]\nsteps = 9\nsize = "64x64"\n')
    (tmp_path / "fluxsplit.toml").write_text('vae = "folder"\nclip = "folder"\n[sample]\nsteps = 8\n')
    home |= {"FLUXSPLIT_CLIP": "environment", "FLUXSPLIT_SAMPLE_GUIDANCE": "2.5", "PATH": "/bin"}
    expected = {"model": "user", "vae": "folder", "clip": "environment", "steps": 8, "size": "64x64", "guidance": 2.5}
    assert defaults("sample", home, tmp_path) == expected
    assert defaults("decode", home, tmp_path) == {"model": "user", "vae": "folder"}


def test_a_table_goes_over_the_top_of_its_own_file_only(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fluxsplit.toml").write_text('device = "cuda:0"\n[decode]\ndevice = "cpu"\n')
    assert defaults("sample", home, tmp_path)["device"] == "cuda:0"
    assert defaults("decode", home, tmp_path)["device"] == "cpu"
    assert defaults("decode", home | {"FLUXSPLIT_DEVICE": "auto"}, tmp_path)["device"] == "auto"


def test_keys_are_spelled_as_the_flags_or_with_underscores(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fluxsplit.toml").write_text('text-encoder = "t5"\n[sample]\nnoise_index = 2\n')
    assert defaults("sample", home, tmp_path) == {"text_encoder": "t5", "noise_index": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('modle = "x"', "unknown setting 'modle' in .*fluxsplit.toml; did you mean model"),
        ("[sample]\nstep = 4", r"unknown setting 'step' in \[sample\] of .*; did you mean steps"),
        ("[decode]\nsteps = 4", r"setting 'steps' is out of place in \[decode\]"),
        ("steps = 4", r"'steps' is out of place in .*; it belongs in \[sample\] or \[preview\]"),
        ("steps = 4", r"it belongs in \[sample\]"),
        ('[sample]\nprompt = "x"', "it belongs to one run"),
        ("[rerender]\ncuont = 3", "did you mean count"),
        ("seed = 4", "it belongs to one run"),
        ("[sample]\nsteps = 4.5", "'steps' in .* is '4.5', not a whole number"),
        ("[sample]\nsteps = true", "not a whole number"),
        ('[sample]\ncfg = "much"', "'cfg' in .* is 'much'"),
        ("model = 3", "not text"),
        ("[decode]\noverwrite = 2", "not true or false"),
        ("sample = 3", r"write \[sample\] on a line of its own"),
        ('text-encoder = "a"\ntext_encoder = "b"', "stands twice"),
        ("model = ", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_what_is_refused(home: dict[str, str], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "fluxsplit.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        defaults("sample", home, tmp_path)
    assert re.search(words, caught.value.line()), caught.value.line()


def test_an_unknown_variable_is_refused(home: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        defaults("sample", home | {"FLUXSPLIT_MODLE": "x"}, tmp_path)
    assert caught.value.line() == "environment variable FLUXSPLIT_MODLE is not a setting; did you mean FLUXSPLIT_MODEL?"
    with pytest.raises(UsageError) as caught:
        defaults("sample", home | {"FLUXSPLIT_SIZE": "64x64"}, tmp_path)
    assert caught.value.hint == "it is FLUXSPLIT_SAMPLE_SIZE or FLUXSPLIT_PREVIEW_SIZE"
    with pytest.raises(UsageError) as caught:
        defaults("sample", home | {"FLUXSPLIT_RERENDER_COUNT": "3"}, tmp_path)
    assert caught.value.hint.startswith("it belongs to one run")
    with pytest.raises(UsageError, match="FLUXSPLIT_SAMPLE_STEPS"):
        defaults("sample", home | {"FLUXSPLIT_SAMPLE_STEPS": "four"}, tmp_path)


def test_a_file_that_is_no_text_is_refused(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fluxsplit.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        defaults("sample", home, tmp_path)
    (tmp_path / "fluxsplit.toml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="larger than any settings file"):
        defaults("sample", home, tmp_path)


def test_where_the_users_settings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert user_config({"HOME": "/h"}) == Path("/h/.config/fluxsplit/config.toml")
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_config({"HOME": "/h"}) == Path("/h/Library/Application Support/fluxsplit/config.toml")
    monkeypatch.setattr("sys.platform", "win32")
    assert user_config({"APPDATA": "/a"}) == Path("/a/fluxsplit/config.toml")


def test_a_hint_names_the_nearest_or_all() -> None:
    assert nearest("eular", ("euler", "heun")) == "did you mean euler?"
    assert nearest("x", ("euler", "heun")) == "known are euler, heun"


def test_a_workflow(tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text(
        '[sample]\nprompt = "a"\nseed = [7, "9..11"]\nsigmas = [1, 0.5, 0]\nshift = 1.15\nsave-conditioning = "c"\n'
    )
    assert read_workflow(file) == (
        "sample",
        {
            "prompt": ["a"],
            "seed": ["7", "9..11"],
            "sigmas": "1.0, 0.5, 0.0",
            "shift": "1.15",
            "save_conditioning": "c",
        },
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing"),
        ("[sample]\n[decode]\n", "holds 'sample', 'decode'"),
        ("[smaple]\n", "holds 'smaple'"),
        ("sample = 3", "holds 'sample'"),
        ('[decode]\nprompt = "x"', "'prompt' is out of place in"),
        ("[sample]\nseed = 1.5", "'seed'"),
    ],
)
def test_workflows_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_workflow(tmp_path / "w.toml")


def test_a_workflow_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_workflow(tmp_path / "w.toml")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shipped_workflows_spell_out_every_setting(command: str) -> None:
    file = WORKFLOWS / f"{command}.toml"
    assert read_workflow(file)[0] == command
    lines = file.read_text("utf-8").splitlines()
    spelled = {line.lstrip("# ").split("=")[0].strip().replace("-", "_") for line in lines if "=" in line}
    assert set(WORKFLOW[command]) <= spelled, set(WORKFLOW[command]) - spelled
    everything = [line.removeprefix("# ") if line.startswith("# ") and " = " in line else line for line in lines]
    tables = tomllib.loads("\n".join(everything))
    assert {key.replace("-", "_") for key in tables[command]} == set(WORKFLOW[command])


def test_settings_of_files_are_settings_of_workflows() -> None:
    assert set(DEFAULTS[""]) <= {name for command in COMMANDS for name in DEFAULTS[command]}
    for command in COMMANDS:
        assert set(DEFAULTS[command]) <= set(WORKFLOW[command])


def test_what_decode_does_not_read_may_stand_at_the_top(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fluxsplit.toml").write_text('clip = "clip_l"\nvae = "ae"\n')
    assert defaults("decode", home, tmp_path) == {"vae": "ae"}


@pytest.mark.parametrize("command", ["sample", "preview", "rerender", "decode", "encode", "upscale"])
def test_memory_is_set_once_for_all(command: str, home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fluxsplit.toml").write_text('vram = "7G"\nvae-dtype = "fp32"\n')
    got = defaults(command, home, tmp_path)
    assert got["vram"] == "7G" and ("vae_dtype" in got) == (command not in ("sample", "upscale"))
    assert defaults(command, home | {"FLUXSPLIT_VRAM": "6G"}, tmp_path)["vram"] == "6G"
    (tmp_path / "fluxsplit.toml").write_text(f'vram = "7G"\n[{command}]\nvram = "5G"\n')
    assert defaults(command, home, tmp_path)["vram"] == "5G"


def test_the_cache_folder_is_no_setting(home: dict[str, str], tmp_path: Path) -> None:
    assert defaults("decode", home | {"FLUXSPLIT_CACHE": "/c"}, tmp_path) == {}
