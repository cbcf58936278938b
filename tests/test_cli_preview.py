"""`fluxsplit preview`: one text stage, one sample stage, one decode stage; free numbers; prompts kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headers import write
from test_cli import Run, home, run

from fluxsplit import conditioning_cache
from fluxsplit.models import demo_files

__all__ = ["home", "run"]


def test_one_call_is_three_stages_whatever_the_count(run: Run, home: Path) -> None:
    ran = run("preview", "-p", "a fox", "-p", "a dog", "--count", "3", "--seed", "7")
    assert ran.code == 0, ran.err
    assert [entry["stage"] for entry in ran.log if entry["what"] == "job"] == ["text", "sample", "decode"]
    assert [(image["prompt"], image["seed"], image["stem"]) for image in ran.images] == [
        (prompt, seed, f"{number:04d}")
        for number, (prompt, seed) in enumerate(((p, s) for p in ("a fox", "a dog") for s in (7, 8, 9)), start=1)
    ]
    assert {(image["width"], image["height"]) for image in ran.images} == {(256, 256)}
    assert ran.job("text")["prompts"] == ["a fox", "a dog"]
    assert ran.job("sample")["out"] == str(home / "previews" / "latents")
    assert ran.job("decode")["out"] == str(home / "previews") and len(ran.job("decode")["latents"]) == 6
    assert ran.out == [str(home / "previews" / f"{number:04d}.png") for number in range(1, 7)]


def test_the_next_call_goes_on_counting_behind_pictures_and_latents(run: Run, home: Path) -> None:
    (home / "previews" / "latents").mkdir(parents=True)
    (home / "previews" / "0007.png").write_bytes(b"")
    (home / "previews" / "latents" / "0012-2.pt").write_bytes(b"")
    (home / "previews" / "99999999999.png").write_bytes(b"")
    ran = run("preview", "-p", "a", "--seed", "1")
    assert ran.out == [str(home / "previews" / "0013.png")]


def test_how_many(run: Run) -> None:
    assert len(run("preview", "-p", "a").images) == 8
    assert len(run("preview", "-p", "a", "--seed", "7..9").images) == 3
    assert len(run("preview", "-p", "a", "--seed", "7", "-n", "2", "--out", "x").images) == 2


def test_settings_and_a_dry_run(run: Run, home: Path) -> None:
    (home / "fluxsplit.toml").write_text('[preview]\nsize = "256x128"\ncount = 2\nsteps = 3\n[sample]\nsteps = 9\n')
    ran = run("preview", "-p", "a", "--dry-run", "--json")
    images = json.loads(ran.out[0])["images"]
    assert [(image["width"], image["height"], image["steps"]) for image in images] == [(256, 128, 3)] * 2
    assert not [entry for entry in ran.log if entry["what"] == "job"] and not (home / "previews").exists()
    told = run("preview", "-p", "a", "-n", "2", "-o", "new", "--dry-run").out[-1]
    assert told.endswith(f"as 0001.pt to 0002.pt, pictures into {home / 'new'}")


def test_one_that_fails_does_not_stop_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "seed 8")
    ran = run("preview", "-p", "a", "--seed", "7..9")
    assert ran.code == 1 and len(ran.out) == 2 and "NaN at step 2" in ran.err


def test_where_decoding_ends_early_a_sheet_shows_what_there_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "decode ends at the second")
    ran = run("preview", "-p", "a", "--seed", "7..9")
    assert ran.code == 1 and [Path(line).name for line in ran.out] == ["0001.png"]
    assert (home / "previews" / "sheet.png").stat().st_size and "to choose: open" in ran.err
    assert "2 finished, without their pictures yet; to have them: fluxsplit decode" in ran.err
    monkeypatch.delenv("FAKE_FAIL")
    words = ran.err.partition("to have them: fluxsplit ")[2].splitlines()[0].split()
    assert run(*words).code == 0
    assert sorted(file.name for file in (home / "previews").glob("0*.png")) == ["0001.png", "0002.png", "0003.png"]


def test_the_text_stage_runs_once_for_a_prompt(run: Run, tmp_path: Path) -> None:
    first = run("preview", "-p", "a", "--seed", "1")
    assert first.job("text")["prompts"] == ["a"]
    encoders = _encoders()
    assert conditioning_cache.find(encoders, "a") == "", "the fake's file is no conditioning"
    conditioning_cache.keep(encoders, "a", str(write(tmp_path / "made", {"t5": (1, 8, 4), "pooled": (1, 3)}, "F32")))
    again = run("preview", "-p", "a", "-p", "b", "--seed", "1")
    assert again.job("text")["prompts"] == ["b"]
    assert again.images[0]["conditioning"] == conditioning_cache.find(encoders, "a")
    bare = run("sample", "-p", "a", "--seed", "1", "--no-cache")
    assert bare.job("text")["prompts"] == ["a"]
    alone = run("sample", "-p", "a", "--seed", "1")
    assert [entry["stage"] for entry in alone.log if entry["what"] == "start"] == ["sample"]


def _encoders() -> conditioning_cache.Encoders:
    encoders = conditioning_cache.encoders_of(demo_files())
    assert encoders is not None
    return encoders
