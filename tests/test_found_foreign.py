"""Every tool's files in their true formats, and files that mean harm."""

from __future__ import annotations

import json
import random
import shlex
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from foreign_files import (
    A1111,
    API,
    CASES,
    FORGE,
    GUI,
    KSAMPLER,
    Case,
    comment,
    mutate,
    png,
    png_hiding,
    unicode_comment,
)
from PIL import Image
from samples import make_recipe

from fluxsplit.errors import FluxsplitError
from fluxsplit.found import read_found
from fluxsplit.found_a1111 import read_a1111
from fluxsplit.found_comfy import read_comfy
from fluxsplit.found_text import as_form
from fluxsplit.found_values import (
    as_count,
    as_number,
    as_seed,
    as_size,
    lenient_json,
    sampler_of,
    schedule_behind,
    scheduler_of,
)
from fluxsplit.metadata import parameters_text


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_tools(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path / "x")
    found = read_found(tmp_path / "x")
    assert {name: getattr(found, name) for name in case.wanted} == case.wanted
    assert (found.picture_width, found.picture_height) == (64, 48)


def test_docs_table_names_every_row() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metadata.md").read_text()
    missing = [case.name for case in CASES if case.name not in page]
    assert not missing


def test_our_own_parameters_are_read_back() -> None:
    recipe = make_recipe(prompt='a fox: red, "big"\nsnow', negative="blur, ugly", noise_index=3)
    found = read_a1111(parameters_text(recipe))
    assert (found.tool, found.prompt, found.negative) == ("fluxsplit", recipe.prompt, recipe.negative)
    assert (found.seed, found.steps, found.guidance, found.cfg) == (
        recipe.seed,
        recipe.steps,
        recipe.guidance,
        recipe.cfg,
    )
    assert (found.sampler, found.scheduler, found.noise_index) == (recipe.sampler, recipe.scheduler, 3)
    assert (found.width, found.height, found.noise_source, found.warnings) == (32, 16, "cpu", ())


def test_gpu_seed_and_loras_are_warned_of() -> None:
    found = read_a1111(FORGE.replace("RNG: CPU, ", "").replace("a fox", "a fox <lora:ink:0.8>"))
    assert found.noise_source == "gpu"
    assert "GPU" in found.warnings[0]
    assert "ink" in found.warnings[1]


def test_plain_text_is_no_recipe(tmp_path: Path) -> None:
    png(tmp_path / "x", {"parameters": "a fox\nwith, some: words", "Comment": "hello", "prompt": "{", "workflow": "[]"})
    assert read_found(tmp_path / "x").tool is None


def test_assumptions_are_named() -> None:
    sampler, note = sampler_of("Euler a")
    assert sampler == "euler"
    assert "Euler a" in (note or "")
    assert sampler_of("DPM++ 2M Beta") == ("dpmpp_2m", None)
    assert sampler_of("DPM++ 2M Karras") == ("dpmpp_2m", None), "the schedule is told of elsewhere"
    assert sampler_of("DPM++ 2M SDE")[0] == "euler"
    assert [schedule_behind(name) for name in ("DPM++ 2M Karras", "DPM++ 2M Beta", "Euler")] == ["karras", "beta", None]


@pytest.mark.parametrize(("name", "scheduler", "told"), [("Karras", "simple", True), ("Beta", "beta", False)])
def test_a_schedule_behind_the_samplers_name_counts(tmp_path: Path, name: str, scheduler: str, told: bool) -> None:
    png(
        tmp_path / "x",
        {"parameters": f"a fox\nSteps: 20, Sampler: DPM++ 2M {name}, CFG scale: 1, Seed: 7, Size: 64x64"},
    )
    found = read_found(tmp_path / "x")
    assert (found.sampler, found.scheduler) == ("dpmpp_2m", scheduler)
    assert any(name.lower() in note for note in found.notes) is told
    assert scheduler_of("karras")[0] == "simple"
    found = read_comfy(json.dumps(API), "")
    assert any("batch of 4" in note for note in found.notes)
    without = {key: node for key, node in API.items() if key != "27"}
    assert read_comfy(json.dumps(without), "").width is None


def test_loops_in_a_graph_end() -> None:
    graph = json.loads(json.dumps(KSAMPLER))
    graph["6"]["inputs"] = {"conditioning": ["6", 0], "text": ["6", 0]}
    graph["5"]["inputs"] = {"samples": ["5", 0]}
    found = read_comfy(json.dumps(graph), "")
    assert (found.tool, found.prompt, found.width) == ("ComfyUI", None, None)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(7, 7), ("7", 7), (7.0, 7), (2**64, None), (-1, None), (True, None), ("9" * 5000, None), (float("nan"), None)],
)
def test_seeds(value: object, wanted: int | None) -> None:
    assert as_seed(value) == wanted


def test_numbers() -> None:
    assert lenient_json("[NaN, Infinity, 1e999]") == [None, None, None]
    assert as_number("3.5") == 3.5
    assert as_number("1e999") is None
    assert as_number("inf") is None
    assert as_count("07", 9) == 7
    assert as_size("(1152, 896)") == (1152, 896)
    assert as_size("1152x99999999") == (None, None)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "{", "nul"])
def test_hostile_json(text: str) -> None:
    with pytest.raises(FluxsplitError):
        lenient_json(text)


def test_hostile_containers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    comment(path, unicode_comment("x" * 100))
    good = path.read_bytes()
    at = good.index(b"Exif\0\0") + 6
    for offset in (0, 4, 8, 10, 14, 18, 22):
        path.write_bytes(good[: at + offset] + b"\xff\xff\xff\xff" + good[at + offset + 4 :])
        try:
            read_found(path)
        except FluxsplitError as error:
            assert path.name in error.message
    path.write_bytes(b"\xff\xd8\xff\xe1" + struct.pack(">H", 60000) + b"Exif")
    with pytest.raises(FluxsplitError, match="cut short"):
        read_found(path)
    path.write_bytes(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 10_000)
    with pytest.raises(FluxsplitError, match="segments"):
        read_found(path)
    path.write_bytes(b"RIFF\0\0\0\0WEBP" + b"ABCD\0\0\0\0" * 10_000)
    with pytest.raises(FluxsplitError, match="chunks"):
        read_found(path)


def test_hostile_alpha(tmp_path: Path) -> None:
    path = tmp_path / "x"
    png_hiding(path, "\0" * (5 << 20), size=(256, 256))  # more than any text
    assert read_found(path).tool is None
    Image.new("RGBA", (2, 2)).save(path, format="PNG")  # fewer pixels than the signature has bits
    assert read_found(path).tool is None
    Image.new("RGBA", (5000, 5000)).save(path, format="PNG")
    assert read_found(path).tool is None
    png_hiding(path, A1111)
    data = path.read_bytes()
    at = data.index(b"IDAT") + 40
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])  # damaged pixels
    assert read_found(path).tool is None


def test_entity_bombs_stay_small(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><exif:UserComment>&b;&b;</exif:UserComment>'
    png(tmp_path / "x", {"XML:com.adobe.xmp": bomb})
    assert read_found(tmp_path / "x").tool is None


def fuzz(folder: Path, runs: int, seed: int) -> int:
    """Read mutated files of every tool; returns how many were read. Anything but FluxsplitError escapes."""
    rng = random.Random(seed)
    originals = []
    for number, case in enumerate(CASES):
        case.write(folder / f"case-{number}")
        originals.append((folder / f"case-{number}").read_bytes())
    path = folder / "broken"
    for _ in range(runs):
        path.write_bytes(mutate(rng.choice(originals), rng))
        try:
            read_found(path)
        except FluxsplitError:
            continue
    return runs


def test_broken_files_give_typed_errors(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 3000, 1) == 3000


@pytest.mark.torture
def test_broken_files_in_bulk(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 200_000, 2) == 200_000


CONDITIONED_BY = {
    "ControlNetApplyAdvanced": "positive",
    "ConditioningCombine": "conditioning_1",
    "ConditioningConcat": "conditioning_to",
    "ConditioningAverage": "conditioning_to",
}


def patched(**nodes: dict[str, object]) -> str:
    """The KSampler's graph with nodes between the loader, or else the text, and the sampler, in turn."""
    graph = json.loads(json.dumps(KSAMPLER))
    graph["3"]["inputs"]["denoise"] = 1.0
    before, text = "4", "6"
    for name, inputs in nodes.items():
        kind = name.replace("_", " ")
        if kind in CONDITIONED_BY:
            graph[name] = {"class_type": kind, "inputs": inputs | {CONDITIONED_BY[kind]: [text, 0]}}
            graph["3"]["inputs"]["positive"] = [name, 0]
        else:
            graph[name] = {"class_type": kind, "inputs": inputs | {"model": [before, 0]}}
            before = name
    graph["3"]["inputs"]["model"] = [before, 0]
    return json.dumps(graph)


@pytest.mark.parametrize(
    ("nodes", "warnings"),
    [
        ({}, ()),
        (
            {"LoraLoaderModelOnly": {"lora_name": "style\\fox.safetensors", "strength_model": 0.8}},
            ("the graph loads LoRA fox.safetensors, which fluxsplit does not",),
        ),
        ({"LoraLoader": {"lora_name": "fox.safetensors", "strength_model": 0, "strength_clip": 0}}, ()),
        (
            {
                "Power_Lora_Loader_(rgthree)": {
                    "lora_1": {"on": True, "lora": "a.safetensors", "strength": 1},
                    "lora_2": {"on": False, "lora": "b.safetensors", "strength": 1},
                    "lora_3": {"on": True, "lora": "c.safetensors", "strength": 1},
                },
                "LoraLoader": {"lora_name": "d.safetensors", "strength_model": 1},
            },
            ("the graph loads LoRA d.safetensors, a.safetensors, c.safetensors, which fluxsplit does not",),
        ),
        (
            {"CR_Apply_LoRA_Stack": {"lora_stack": ["77", 0]}, "IPAdapterFlux": {"weight": 1}},
            (
                "the graph loads LoRA CR Apply LoRA Stack, which fluxsplit does not",
                "the graph uses IPAdapterFlux, which fluxsplit does not",
            ),
        ),
        (
            {"ControlNetApplyAdvanced": {"strength": 0.6, "control_net": ["80", 0]}},
            ("the graph uses ControlNetApplyAdvanced, which fluxsplit does not",),
        ),
        (
            {"ConditioningCombine": {"conditioning_2": ["7", 0]}},
            ("the graph uses ConditioningCombine, which fluxsplit does not",),
        ),
        (
            {"ConditioningAverage": {"conditioning_from": ["7", 0], "conditioning_to_strength": 0.4}},
            ("the graph uses ConditioningAverage, which fluxsplit does not",),
        ),
    ],
)
def test_what_a_graph_does_that_fluxsplit_does_not_is_told(
    nodes: dict[str, dict[str, object]], warnings: tuple[str, ...]
) -> None:
    found = read_comfy(patched(**nodes), "")
    assert found.warnings == warnings
    assert (found.prompt, found.model) == ("a fox", "flux1-schnell-fp8.safetensors")


def test_a_lora_of_the_pages_graph_alone_is_told() -> None:
    graph = json.loads(json.dumps(GUI))
    lora = {"id": 70, "type": "LoraLoaderModelOnly", "inputs": [{"name": "model", "link": 1}]}
    graph["nodes"].append(lora | {"widgets_values": ["fox.safetensors", 1.0]})
    graph["nodes"][2]["inputs"][0]["link"] = 70
    graph["links"].append([70, 70, 0, 3, 0, "MODEL"])
    assert read_comfy("", json.dumps(graph)).warnings == (
        "the graph loads LoRA fox.safetensors, which fluxsplit does not",
    )


@pytest.mark.parametrize(
    ("mode", "values", "warnings"),
    [
        (0, [0.4], ("the graph uses ConditioningAverage, which fluxsplit does not",)),
        (0, [1.0], ()),
        (4, [0.4], ()),  # bypassed
    ],
)
def test_a_second_text_of_the_pages_graph_is_told(mode: int, values: list[float], warnings: tuple[str, ...]) -> None:
    graph = json.loads(json.dumps(GUI))
    slot = next(slot for slot in graph["nodes"][2]["inputs"] if slot["name"] == "positive")
    inputs = [{"name": "conditioning_to", "link": slot["link"]}, {"name": "conditioning_from", "link": slot["link"]}]
    average = {"id": 71, "type": "ConditioningAverage", "mode": mode, "inputs": inputs, "widgets_values": values}
    graph["nodes"].append(average)
    slot["link"] = 71
    graph["links"].append([71, 71, 0, 3, 1, "CONDITIONING"])
    found = read_comfy("", json.dumps(graph))
    assert found.warnings == warnings and found.prompt


def test_a_picture_drawn_from_another_one_says_so(tmp_path: Path) -> None:
    """In what is told of it, and above the command that cannot repeat it, which names the model."""
    png(tmp_path / "x.png", {"prompt": json.dumps(KSAMPLER)})
    png(tmp_path / "y.png", {"prompt": json.dumps(API)})
    found = read_found(tmp_path / "x.png")
    assert [warning for warning in found.warnings if "drawn with denoise 0.75 from another picture" in warning]
    *comments, command = as_form(found, "cli", "x.png").splitlines()
    assert comments == [f"# {warning}" for warning in found.warnings]
    assert "--model flux1-schnell-fp8.safetensors" in command
    assert not read_found(tmp_path / "y.png").warnings


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x85", "\u2028", "\0"])
def test_no_name_in_a_graph_becomes_a_command(tmp_path: Path, end: str) -> None:
    """What `info --as cli` prints is pasted into shells."""
    name = f"a{end}touch pwned.safetensors"
    graph = patched(**{f"IPAdapter{end}touch pwned": {}, "LoraLoader": {"lora_name": name, "strength_model": 1}})
    png(tmp_path / "x.png", {"prompt": graph})
    found = read_found(tmp_path / "x.png")
    assert len(found.warnings) == 2
    *comments, command = as_form(found, "cli", "x.png").splitlines()
    assert len(comments) == 2 and all(comment.startswith("# ") for comment in comments)
    assert command.startswith("fluxsplit sample") and "pwned" not in command


@pytest.mark.parametrize(
    "nodes",
    [
        {"Lora_Loader_Stack_(rgthree)": {"lora_01": "None", "strength_01": 1.0, "lora_02": "", "strength_02": 1}},
        {"Lora_Loader_Stack_(rgthree)": {"lora_01": "a.safetensors", "strength_01": 0}},
        {"Power_Lora_Loader_(rgthree)": {"PowerLoraLoaderHeaderWidget": {"type": "x"}, "Add Lora": ""}},
        {"LoraLoader": {"lora_name": "None", "strength_model": 1}},
        {"LoraLoader": {"lora_name": "a.safetensors", "strength_model": "0"}},
        {"CR_Load_LoRA": {"switch": "Off", "lora_name": "a.safetensors", "strength_model": 1}},
        {"ControlNetApplyAdvanced": {"strength": 0}},
        {"ConditioningConcat": {}},
        {"ConditioningAverage": {"conditioning_from": ["7", 0], "conditioning_to_strength": 1.0}},
    ],
)
def test_what_does_nothing_is_not_told(nodes: dict[str, dict[str, object]]) -> None:
    assert read_comfy(patched(**nodes), "").warnings == ()


def test_many_loras_are_counted_and_those_of_a_pages_table_read() -> None:
    stack = {f"lora_{n}": {"on": True, "lora": f"{n}.safetensors", "strength": 1} for n in range(6)}
    (warning,) = read_comfy(patched(**{"Power_Lora_Loader": stack}), "").warnings
    assert warning.endswith("3.safetensors and 2 more, which fluxsplit does not")
    graph = json.loads(json.dumps(GUI))
    node = {"id": 70, "type": "Power Lora Loader (rgthree)", "inputs": [{"name": "model", "link": 1}]}
    for on in (True, False):
        table = {"on": on, "lora": "fox.safetensors", "strength": 1, "strengthTwo": None}
        graph["nodes"][2]["inputs"][0]["link"] = 70
        page = graph | {
            "nodes": [*graph["nodes"], node | {"widgets_values": [{}, {"type": "header"}, table, {}, ""]}],
            "links": [*graph["links"], [70, 70, 0, 3, 0, "MODEL"]],
        }
        assert ("fox.safetensors" in str(read_comfy("", json.dumps(page)).warnings)) == on


def test_names_of_strangers_are_text_and_no_paths(tmp_path: Path) -> None:
    graph = json.loads(patched(**{"Lora\ud800x": {"lora_stack": ["9", 0]}}))
    for number, name in enumerate(("..\\..\\home/u/evil\x1b[31m.ckpt", "/", "\n", "flux-demo")):
        graph["4"]["inputs"]["ckpt_name"] = name
        png(tmp_path / f"{number}.png", {"prompt": json.dumps(graph)})
        found = read_found(tmp_path / f"{number}.png")
        as_form(found, "json", "x").encode()
        words = shlex.split(as_form(found, "cli", "x").splitlines()[-1])
        wanted = (["evil[31m.ckpt"], [], [], ["demo"])[number]
        assert [word for before, word in pairwise(words) if before == "--model"] == wanted
