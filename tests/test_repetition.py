"""What a foreign picture says and leaves out: assumed and named, or an error with its flag."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fluxsplit.errors import UsageError
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.repetition import Told, images_of, keeping_of, known_noise, new_size

FOUND = FoundRecipe(tool="ComfyUI", prompt="a fox", seed=7, width=512, height=384, noise_source="cpu", cfg=1.0)


def image(found: FoundRecipe, given: dict[str, Any], told: Told | None = None, variant: str = "dev") -> Any:
    """The one image."""
    (made,) = images_of(found, given, variant, {}, told or Told())
    return made


def test_what_is_assumed_is_named_with_its_flag() -> None:
    told = Told()
    made, _ = images_of(FOUND, {"count": 2}, "dev", {}, told)
    assert len(set(told.assumed)) == len(told.assumed)
    assert (made.sampler, made.scheduler, made.cfg, made.steps) == ("euler", "simple", 1.0, None)
    text = "; ".join(told.assumed)
    assert all(flag in text for flag in ("--sampler", "--scheduler", "--steps", "--guidance")) and "--cfg" not in text


@pytest.mark.parametrize(("field", "flag"), [("prompt", "--prompt"), ("seed", "--seed")])
def test_what_is_missing_is_an_error_with_its_flag(field: str, flag: str) -> None:
    with pytest.raises(UsageError, match=field) as caught:
        image(replace(FOUND, **{field: None}), {})
    assert flag in caught.value.hint


def test_a_count_goes_on_from_the_pictures_seed_or_the_one_that_is_given() -> None:
    for given, seeds in (({"count": 3}, [7, 8, 9]), ({"count": 2, "seed": ["20", "30..31"]}, [20, 21, 30, 31, 32])):
        assert [made.seed for made in images_of(FOUND, given, "dev", {}, Told())] == seeds
    drawn = images_of(FoundRecipe(prompt="a", picture_width=64, picture_height=64), {"count": 2}, "dev", {}, Told())
    assert drawn[1].seed == drawn[0].seed + 1


def test_a_shift_by_resolution_follows_the_size_and_a_fixed_one_stays() -> None:
    from fluxsplit.defaults import resolution_shift

    by_rule = replace(FOUND, shift=resolution_shift(512, 384))
    assert image(by_rule, {"size": "1024x768"}).shift is None
    assert image(replace(FOUND, shift=1.15), {"size": "1024x768"}).shift == 1.15


@pytest.mark.parametrize("change", [{"noise_source": "gpu"}, {"denoise": 0.5}, {"width": None}, {"seed": None}])
def test_noise_that_is_not_known_is_not_kept(change: dict[str, Any]) -> None:
    found, told = replace(FOUND, **change), Told()
    assert known_noise(FOUND, {}) and not known_noise(found, {})
    keeping = keeping_of(found, {}, (1024, 768), told)
    assert (keeping.keep, keeping.strength, keeping.noise) == (
        "image",
        0.8,
        (),
    ) and "noise is not known" in told.assumed[0]
    for keep in ("noise", "composition"):
        with pytest.raises(UsageError, match="not known"):
            keeping_of(found, {"keep": keep}, (1024, 768), Told())


def test_scale_goes_to_multiples_of_8_and_says_so() -> None:
    told = Told()
    assert new_size(FOUND, {"scale": 1.3}, told) == (664, 496) and "multiple of 8" in told.assumed[0]
    assert new_size(FOUND, {"scale": 2.0}, told := Told()) == (1024, 768) and not told.assumed
    assert new_size(replace(FOUND, width=None, picture_width=640, picture_height=320), {}, Told()) == (640, 320)
