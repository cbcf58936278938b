"""Files as other tools write them: containers by Pillow, texts as their writers put them together."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIZE = (64, 48)
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769


@dataclass(frozen=True)
class Case:
    """A file of a tool, and what is to be found in it."""

    name: str
    write: Callable[[Path], None]
    wanted: dict[str, Any] = field(default_factory=dict)


def png(path: Path, texts: dict[str, str], exif: Image.Exif | None = None) -> None:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", SIZE).save(path, format="PNG", pnginfo=info, **({} if exif is None else {"exif": exif}))


def png_hiding(path: Path, text: str, gzipped: bool = True, size: tuple[int, int] = SIZE) -> None:
    """A text in the lowest bits of alpha, down the columns, and nowhere else."""
    data = gzip.compress(text.encode()) if gzipped else text.encode()
    hidden = (b"stealth_pngcomp" if gzipped else b"stealth_pnginfo") + (8 * len(data)).to_bytes(4, "big") + data
    bits = [byte >> shift & 1 for byte in hidden for shift in range(7, -1, -1)]
    picture = Image.new("RGBA", size, (9, 9, 9, 255))
    assert len(bits) <= size[0] * size[1]
    for number, bit in enumerate(bits):
        picture.putpixel(divmod(number, size[1]), (9, 9, 9, 254 | bit))
    picture.save(path, format="PNG")


def png_raw(path: Path, key: bytes, text: bytes) -> None:
    """tEXt with the bytes as they are, as stable-diffusion.cpp's stb writer puts them."""
    info = PngInfo()
    info.add(b"tEXt", key + b"\0" + text)
    Image.new("RGB", SIZE).save(path, format="PNG", pnginfo=info)


def comment(path: Path, raw: bytes, form: str = "JPEG", **tags: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = raw
    Image.new("RGB", SIZE).save(path, format=form, exif=exif)


def unicode_comment(text: str, order: str = "be") -> bytes:
    return b"UNICODE\0" + text.encode(f"utf-16-{order}")


A1111 = (
    "a fox, snow\nred\nNegative prompt: blurry\nugly\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Beta, "
    "CFG scale: 3.5, Seed: 7, Size: 512x768, Model hash: ead426278b, Model: flux1-dev-fp8, Version: v1.10.1"
)
FORGE = (
    "a fox, snow\nSteps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, "
    'Size: 512x512, Model hash: ead426278b, Model: flux1-schnell-fp8, Hires prompt: "a, b: c", RNG: CPU, '
    "Version: f2.0.1v1.10.1, Module 1: ae"
)
SDNEXT = (
    "a fox\nNegative prompt: blurry\nSteps: 20, Size: 1024x1024, Sampler: Euler FlowMatch, "
    "Scheduler: FlowMatchEulerDiscreteScheduler, Seed: 7, CFG scale: 3.5, App: SD.Next, "
    "Version: abc, Pipeline: FluxPipeline"
)
SDCPP_JSON = {"models": {"diffusion_model": "models/flux1-schnell-q8_0.gguf"}, "schema": "sdcpp.image.params/v1"}
SDCPP = (
    "a fox, größer\nSteps: 4, CFG scale: 1.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, Size: 512x512, "
    "Model: , RNG: cpu, Sampler: euler simple, TE: t5xxl.gguf, TE: clip_l.gguf, Unet: flux1-schnell-q8_0.gguf, "
    f"Version: stable-diffusion.cpp, SDCPP: {json.dumps(SDCPP_JSON)}"
)
INVOKE = {
    "generation_mode": "flux_txt2img",
    "positive_prompt": "a fox",
    "negative_prompt": "",
    "seed": 7,
    "steps": 4,
    "guidance": 3.5,
    "cfg_scale": 1.0,
    "scheduler": "euler",
    "width": 512,
    "height": 768,
    "model": {"name": "FLUX schnell", "hash": "blake3:ab"},
}
FOOOCUS = {
    "base_model": "juggernaut",
    "base_model_hash": "ab",
    "guidance_scale": 4,
    "negative_prompt": "blurry",
    "prompt": "a fox",
    "resolution": "(1152, 896)",
    "sampler": "dpmpp_2m",
    "scheduler": "karras",
    "seed": "7",
    "steps": 30,
}
SWARM = {
    "sui_image_params": {
        "prompt": "a fox",
        "negativeprompt": "blurry",
        "seed": 7,
        "steps": 20,
        "cfgscale": 1.0,
        "fluxguidancescale": 3.5,
        "sampler": "euler",
        "scheduler": "simple",
        "width": 1024,
        "height": 768,
        "model": "flux1-dev-fp8",
    },
    "sui_models": [{"name": "flux1-dev-fp8", "hash": "0x" + "ab" * 32}],
}
MFLUX = {
    "mflux_version": "0.9",
    "model": "black-forest-labs/FLUX.1-schnell",
    "seed": 7,
    "steps": 4,
    "guidance": None,
    "height": 512,
    "width": 768,
    "quantize": 8,
    "prompt": "a fox",
    "negative_prompt": None,
}
DRAW_THINGS = {
    "c": 'a fox & "snow"',
    "uc": "",
    "seed": 7,
    "steps": 4,
    "scale": 3.5,
    "sampler": "Euler A",
    "size": "512x768",
    "model": "flux.ckpt",
}
NOVELAI = {"steps": 28, "sampler": "k_euler", "seed": 7, "scale": 11, "uc": "lowres"}

API = {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["50", 0], "clip": ["11", 0]}, "is_changed": float("nan")},
    "50": {"class_type": "PrimitiveString", "inputs": {"value": "a fox"}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 2.5, "conditioning": ["6", 0]}},
    "22": {"class_type": "BasicGuider", "inputs": {"model": ["30", 0], "conditioning": ["26", 0]}},
    "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": 2**60}},
    "16": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "17": {
        "class_type": "BasicScheduler",
        "inputs": {"scheduler": "beta", "steps": 20, "denoise": 1.0, "model": ["30", 0]},
    },
    "27": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1152, "height": 944, "batch_size": 4}},
    "30": {
        "class_type": "ModelSamplingFlux",
        "inputs": {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024, "model": ["12", 0]},
    },
    "12": {"class_type": "UNETLoader", "inputs": {"unet_name": "sub\\flux1-dev-fp8.safetensors"}},
    "13": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["25", 0],
            "guider": ["22", 0],
            "sampler": ["16", 0],
            "sigmas": ["17", 0],
            "latent_image": ["27", 0],
        },
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["10", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}
API_WANTED = {
    "tool": "ComfyUI",
    "prompt": "a fox",
    "seed": 2**60,
    "steps": 20,
    "guidance": 2.5,
    "cfg": 1.0,
    "sampler": "euler",
    "scheduler": "beta",
    "shift": 1.15,
    "width": 1152,
    "height": 944,
    "noise_index": 0,
    "model": "flux1-dev-fp8.safetensors",
    "denoise": 1.0,
}
KSAMPLER = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7,
            "steps": 4,
            "cfg": 2.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "sgm_uniform",
            "denoise": 0.75,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "flux1-schnell-fp8.safetensors"}},
    "5": {"class_type": "LatentFromBatch", "inputs": {"samples": ["55", 0], "batch_index": 2, "length": 1}},
    "55": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 4}},
    "6": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "fox", "t5xxl": "a fox", "guidance": 3.0}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}
GUI = {
    "nodes": [
        {"id": 9, "type": "SaveImage", "inputs": [{"name": "images", "link": 9}], "widgets_values": ["ComfyUI"]},
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 7}, {"name": "vae", "link": None}]},
        {
            "id": 3,
            "type": "KSampler",
            "inputs": [
                {"name": "model", "link": 1},
                {"name": "positive", "link": 4},
                {"name": "negative", "link": 6},
                {"name": "latent_image", "link": 2},
            ],
            "widgets_values": [7, "randomize", 4, 1, "euler", "simple", 1],
        },
        {"id": 4, "type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": ["flux1-schnell-fp8.safetensors"]},
        {"id": 5, "type": "EmptySD3LatentImage", "inputs": [], "widgets_values": [1024, 768, 1]},
        {"id": 60, "type": "Reroute", "inputs": [{"name": "", "link": 5}]},
        {"id": 6, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 3}], "widgets_values": ["a fox"]},
        {"id": 7, "type": "CLIPTextEncode", "mode": 2, "inputs": [], "widgets_values": [""]},
    ],
    "links": [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 5, 0, 3, 3, "LATENT"],
        [3, 4, 1, 6, 0, "CLIP"],
        [4, 60, 0, 3, 1, "CONDITIONING"],
        {"id": 5, "origin_id": 6, "origin_slot": 0, "target_id": 60, "target_slot": 0, "type": "CONDITIONING"},
        [6, 7, 0, 3, 2, "CONDITIONING"],
        [7, 3, 0, 8, 0, "LATENT"],
        [9, 8, 0, 9, 0, "IMAGE"],
    ],
}
CIVITAI_EXTRA = {
    "prompt": "a fox",
    "cfgScale": 3.5,
    "steps": 25,
    "seed": 7,
    "sampler": "Euler",
    "resources": [{"modelVersionId": 691639, "strength": 1}],
}
CIVITAI = {**KSAMPLER, "extraMetadata": json.dumps(CIVITAI_EXTRA)}


def comfy_webp(path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "workflow:" + json.dumps(GUI)
    exif[0x0110] = "prompt:" + json.dumps(API)
    Image.new("RGB", SIZE).save(path, format="WEBP", exif=exif)


def draw_things(path: Path) -> None:
    text = json.dumps(DRAW_THINGS).replace("&", "&amp;").replace('"', "&quot;")
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/"><exif:UserComment><rdf:Alt>'
        f'<rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></exif:UserComment>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    png(path, {"XML:com.adobe.xmp": xmp})


def sdcpp_webp(path: Path) -> None:
    text = SDCPP.replace("&", "&amp;").replace("<", "&lt;")
    element = f"<sdcpp:parameters>{text}</sdcpp:parameters>"
    xmp = f"<x:xmpmeta><rdf:RDF><rdf:Description>{element}</rdf:Description></rdf:RDF></x:xmpmeta>"
    Image.new("RGB", SIZE).save(path, format="WEBP", xmp=xmp.encode())


def fooocus_jpeg(path: Path) -> None:
    exif = Image.Exif()
    exif[USER_COMMENT] = json.dumps(FOOOCUS)
    exif[0x927C] = "fooocus"
    exif[0x0131] = "Fooocus v2.5"
    Image.new("RGB", SIZE).save(path, format="JPEG", exif=exif)


def mflux_png(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0131] = "mflux"  # Pillow writes no EXIF that has only a sub-directory
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"ASCII\0\0\0" + json.dumps(MFLUX).encode()
    png(path, {"XML:com.adobe.xmp": "<x:xmpmeta/>", "IPTC": "00"}, exif)


_A = {
    "tool": "A1111",
    "prompt": "a fox, snow\nred",
    "negative": "blurry\nugly",
    "seed": 7,
    "steps": 20,
    "guidance": 3.5,
    "cfg": 1.0,
    "sampler": "dpmpp_2m",
    "scheduler": "beta",
    "width": 512,
    "height": 768,
    "model": "flux1-dev-fp8",
    "model_hash": "ead426278b",
    "noise_source": "gpu",
}
_F = {
    "tool": "Forge",
    "prompt": "a fox, snow",
    "negative": "",
    "seed": 7,
    "steps": 4,
    "guidance": 3.5,
    "cfg": 1.0,
    "sampler": "euler",
    "scheduler": "simple",
    "width": 512,
    "height": 512,
    "noise_source": "cpu",
    "warnings": (),
}
_S = {
    "tool": "stable-diffusion.cpp",
    "prompt": "a fox, größer",
    "seed": 42,
    "steps": 4,
    "guidance": 3.5,
    "cfg": 1.0,
    "sampler": "euler",
    "scheduler": "simple",
    "width": 512,
    "height": 512,
    "model": "flux1-schnell-q8_0.gguf",
    "noise_source": "cpu",
}
_FOX = {"prompt": "a fox", "seed": 7}

CASES = (
    Case("A1111 PNG", lambda p: png(p, {"parameters": A1111}), _A),
    Case("A1111 JPEG", lambda p: comment(p, unicode_comment(A1111)), _A | {"container": "JPEG"}),
    Case("A1111 WebP", lambda p: comment(p, unicode_comment(A1111), "WEBP"), _A | {"container": "WebP"}),
    Case("Forge PNG", lambda p: png(p, {"parameters": FORGE}), _F),
    Case("Forge JPEG, little-endian", lambda p: comment(p, unicode_comment(FORGE, "le")), _F),
    Case(
        "SD.Next PNG",
        lambda p: png(p, {"parameters": SDNEXT}),
        {"tool": "SD.Next", "prompt": "a fox", "negative": "blurry", "seed": 7, "steps": 20, "guidance": 3.5}
        | {"sampler": "euler", "width": 1024},
    ),
    Case("stable-diffusion.cpp PNG", lambda p: png_raw(p, b"parameters", SDCPP.encode()), _S),
    Case(
        "stable-diffusion.cpp JPEG",
        lambda p: Image.new("RGB", SIZE).save(p, format="JPEG", comment=b"parameters\0" + SDCPP.encode() + b"\0"),
        _S,
    ),
    Case("stable-diffusion.cpp WebP", sdcpp_webp, _S),
    Case(
        "InvokeAI PNG",
        lambda p: png(p, {"invokeai_metadata": json.dumps(INVOKE), "invokeai_graph": "{}"}),
        _FOX
        | {"tool": "InvokeAI", "steps": 4, "guidance": 3.5, "cfg": 1.0, "sampler": "euler", "height": 768}
        | {"model": "FLUX schnell"},
    ),
    Case(
        "Fooocus PNG",
        lambda p: png(p, {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"}),
        _FOX
        | {"tool": "Fooocus", "steps": 30, "guidance": 4.0, "sampler": "dpmpp_2m", "scheduler": "simple"}
        | {"width": 1152, "height": 896, "model": "juggernaut"},
    ),
    Case("Fooocus JPEG", fooocus_jpeg, _FOX | {"tool": "Fooocus", "width": 1152}),
    Case(
        "SwarmUI PNG",
        lambda p: png(p, {"parameters": json.dumps(SWARM)}),
        _FOX
        | {"tool": "SwarmUI", "negative": "blurry", "guidance": 3.5, "cfg": 1.0, "steps": 20, "width": 1024}
        | {"scheduler": "simple", "model": "flux1-dev-fp8", "model_hash": "ab" * 32},
    ),
    Case("SwarmUI JPEG", lambda p: comment(p, unicode_comment(json.dumps(SWARM), "le")), _FOX | {"tool": "SwarmUI"}),
    Case(
        "mflux PNG",
        mflux_png,
        _FOX
        | {"tool": "mflux", "steps": 4, "sampler": "euler", "width": 768, "height": 512, "guidance": None}
        | {"model": "black-forest-labs/FLUX.1-schnell"},
    ),
    Case("mflux JPEG", lambda p: comment(p, b"ASCII\0\0\0" + json.dumps(MFLUX).encode()), _FOX | {"tool": "mflux"}),
    Case(
        "Draw Things PNG",
        draw_things,
        {"tool": "Draw Things", "prompt": 'a fox & "snow"', "seed": 7, "steps": 4, "guidance": 3.5, "height": 768},
    ),
    Case(
        "NovelAI PNG",
        lambda p: png(p, {"Software": "NovelAI", "Description": "a fox", "Comment": json.dumps(NOVELAI)}),
        _FOX | {"tool": "NovelAI", "negative": "lowres", "steps": 28, "guidance": 11.0, "sampler": "euler"},
    ),
    Case(
        "NovelAI PNG, stripped",
        lambda p: png_hiding(
            p, json.dumps({"Software": "NovelAI", "Description": "a fox", "Comment": json.dumps(NOVELAI)})
        ),
        _FOX | {"tool": "NovelAI", "negative": "lowres", "steps": 28, "guidance": 11.0, "sampler": "euler"},
    ),
    Case("A1111 PNG, stripped", lambda p: png_hiding(p, A1111), _A),
    Case("A1111 PNG, stripped, not compressed", lambda p: png_hiding(p, A1111, gzipped=False), _A),
    Case("ComfyUI PNG, API graph", lambda p: png(p, {"prompt": json.dumps(API), "workflow": "{}"}), API_WANTED),
    Case("ComfyUI WebP", comfy_webp, API_WANTED | {"container": "WebP"}),
    Case(
        "ComfyUI PNG, KSampler",
        lambda p: png(p, {"prompt": json.dumps(KSAMPLER)}),
        _FOX
        | {"tool": "ComfyUI", "negative": "blurry", "steps": 4, "cfg": 2.0, "guidance": 3.0, "denoise": 0.75}
        | {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform", "noise_index": 2, "width": 512, "height": 768},
    ),
    Case(
        "ComfyUI PNG, page's graph alone",
        lambda p: png(p, {"workflow": json.dumps(GUI)}),
        _FOX
        | {"tool": "ComfyUI", "steps": 4, "cfg": 1.0, "sampler": "euler", "scheduler": "simple"}
        | {"width": 1024, "height": 768, "model": "flux1-schnell-fp8.safetensors", "shift": None},
    ),
    Case(
        "Civitai PNG",
        lambda p: png(p, {"prompt": json.dumps(CIVITAI)}),
        _FOX | {"tool": "Civitai", "steps": 25, "guidance": 3.5, "model": "Civitai model version 691639"},
    ),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or exchanged for ones that mean something."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(broken))
        kind = rng.randrange(5)
        if kind == 0:
            broken[at] = rng.randrange(256)
        elif kind == 1:
            del broken[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            broken[at:at] = broken[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            broken[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"{[{[", b'"\\u0'])
        else:
            broken[at:at] = rng.choice([b",", b":", b'"', b"\0", b"(", b"NaN", b"1e999", b"<lora:", b"\\"])
        broken = broken or bytearray(b"x")
    return bytes(broken)
