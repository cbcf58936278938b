"""The heavy rooms against implementations that share no code with them: `reference_flux`, diffusers, transformers.

Both sides read the same weight file, made here with random values. Ours runs through the stages' own `run`.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference_flux as reference
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file, save, save_file
from transformers import CLIPTokenizer, T5TokenizerFast

import synthetic_checkpoint
from fluxsplit import checkpoint, fp8, prompts, schedule, stage_decode, stage_sample, stage_text
from fluxsplit.defaults import resolution_shift, shift_of
from fluxsplit.events import Events
from fluxsplit.jobs import DecodeJob, ImageJob, ModelFiles, SampleJob, TextJob
from fluxsplit.latent_space import LatentSpace
from fluxsplit.noise import initial_noise
from fluxsplit.sampling import SAMPLE, drive
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.text import Clip, T5Tokens
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles
from synthetic_checkpoint import TINY, Dimensions, Shapes

LATENT_TOLERANCE = 5e-5
TEXT_TOLERANCE = 1e-5
TOKENIZERS = Path(__file__).parents[2] / "shared" / "tokenizers"
AXES = (8, 12, 12)
CLIP_HEADS = 2
METADATA = {
    "fluxsplit.config": json.dumps(
        {"clip": {"num_attention_heads": CLIP_HEADS}, "transformer": {"axes_dims_rope": list(AXES)}}
    )
}
PREFIX = synthetic_checkpoint.PREFIXES
Tensors = dict[str, torch.Tensor]

needs_tokenizers = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason=f"the tokenizers of T5 and CLIP are not in {TOKENIZERS}"
)


# Weights made for the tests


def dimensions(variant: str) -> Dimensions:
    return replace(TINY, dev=variant == "dev")


_GAINS = {
    "SelfAttention.q.weight": math.sqrt(TINY.t5_heads / TINY.t5_inner),  # T5 does not divide by the root of the head
    "SelfAttention.o.weight": 0.3,
    "DenseReluDense.wo.weight": 0.3,
    "_in.out_layer.weight": 0.5,
    "final_layer.linear.weight": 0.4,
}
"""So that states and latents have the size of a trained model's, and rounding grows no more than in one."""


def random_weights(shapes: Shapes, seed: int = 0) -> Tensors:
    """Values that make every tensor matter: no two alike, biases and norms well away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= 1.0 if "shared" in name or "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
            values *= next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
        else:
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        weights[name] = values
    return weights


def transformer_weights(variant: str, seed: int = 0) -> Tensors:
    return random_weights(synthetic_checkpoint.flux_shapes(dimensions(variant)), seed)


def _cast(weights: Tensors, matrices: torch.dtype, others: torch.dtype) -> Tensors:
    return {name: w.to(matrices if w.ndim == 2 else others) for name, w in weights.items()}


def _scaled(weights: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Matrices as float8 codes that use the whole range, and the scale of each layer."""
    stored, scales = {}, {}
    for name, w in weights.items():
        if w.ndim == 2:
            scale = w.abs().max() / torch.finfo(dtype).max
            stored[name], scales[name.removesuffix(".weight")] = (w / scale).to(dtype), scale
        else:
            stored[name] = w.to(torch.bfloat16)
    return stored, scales


def _legacy_scaled(weights: Tensors, dtype: torch.dtype, marker_elements: int, with_input_scales: bool) -> Tensors:
    stored, scales = _scaled(weights, dtype)
    stored |= {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    if with_input_scales:
        stored |= {f"{layer}.scale_input": torch.tensor(0.37) for layer in scales}
    return stored | {"scaled_fp8": torch.empty(marker_elements, dtype=dtype).zero_()}


def _some_scaled(weights: Tensors) -> Tensors:
    """Only the blocks quantised; scales of shape [1]."""
    stored = _legacy_scaled(weights, torch.float8_e4m3fn, 2, True)
    for name, w in weights.items():
        if w.ndim == 2 and "blocks" not in name:
            stored[name] = w.to(torch.float16)
            for end in (".scale_weight", ".scale_input"):
                del stored[name.removesuffix(".weight") + end]
    return {name: w.reshape(1) if name.endswith("scale_weight") else w for name, w in stored.items()}


def _comfy_quant(weights: Tensors, dtype: torch.dtype, as_bytes: bool) -> Tensors:
    stored, scales = _scaled(weights, dtype)
    name = "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"
    entry = torch.tensor(list(json.dumps({"format": name, "full_precision_matrix_mult": True}).encode())).byte()
    for layer, scale in scales.items():
        if as_bytes:
            stored[f"{layer}.weight"] = stored[f"{layer}.weight"].view(torch.uint8)
        stored |= {
            f"{layer}.weight_scale": scale,
            f"{layer}.input_scale": 2 * scale,
            f"{layer}.comfy_quant": entry.clone(),
        }
    return stored


def _listed_quant(weights: Tensors, prefix: str) -> tuple[Tensors, dict[str, str]]:
    """Layers named in the file's metadata, codes kept as bytes."""
    stored = _comfy_quant(weights, torch.float8_e4m3fn, True)
    layers = {prefix + name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")}
    table = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in sorted(layers)}}
    kept = {name: w for name, w in stored.items() if not name.endswith((".comfy_quant", ".input_scale"))}
    return kept, {"_quantization_metadata": json.dumps(table)}


STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "fp32": lambda w: w,
    "fp16": lambda w: _cast(w, torch.float16, torch.float16),
    "bf16": lambda w: _cast(w, torch.bfloat16, torch.bfloat16),
    "e4m3": lambda w: _cast(w, torch.float8_e4m3fn, torch.bfloat16),
    "e4m3 throughout": lambda w: _cast(w, torch.float8_e4m3fn, torch.float8_e4m3fn),
    "e5m2": lambda w: _cast(w, torch.float8_e5m2, torch.float32),
    "scaled e4m3": lambda w: _legacy_scaled(w, torch.float8_e4m3fn, 0, False),
    "scaled e5m2": lambda w: _legacy_scaled(w, torch.float8_e5m2, 2, True),
    "scaled in part": _some_scaled,
    "comfy_quant e4m3": lambda w: _comfy_quant(w, torch.float8_e4m3fn, True),
    "comfy_quant e5m2": lambda w: _comfy_quant(w, torch.float8_e5m2, False),
    "listed quant": lambda w: _listed_quant(w, "")[0],
}


def write_weights(path: Path, weights: Tensors, kind: str, prefix: str = "") -> Path:
    """A file of `weights` stored as `kind`."""
    metadata = dict(METADATA)
    if kind == "listed quant":
        metadata |= _listed_quant(weights, prefix)[1]
    stored = {prefix + name: w.contiguous() for name, w in STORED[kind](weights).items()}
    save_file(stored, path, metadata)
    return path


# Our side


class Recorder(Events):
    """Events kept in memory."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        super().__init__(self.stream)

    def of(self, event: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.stream.getvalue().splitlines())
        return [line for line in lines if line["event"] == event]


def ours(path: Path, images: list[ImageJob], out: Path, dtype: str = "fp32", vae: str = "") -> list[torch.Tensor]:
    """VAE-space latents [1, 16, h, w] of each image, by the sample stage."""
    recorder = Recorder()
    files = ModelFiles(transformer=str(path), vae=vae)
    job = SampleJob(tuple(images), files, str(out), format="safetensors", dtype=dtype, device="cpu")
    stage_sample.run(job, recorder)
    assert not recorder.of("failed"), recorder.of("failed")
    return [load_file(result["path"])["latents"] for result in recorder.of("result")]


def encode(
    job_prompts: list[str], text_encoder: Path, clip: Path, out: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(t5, pooled) of each prompt, by the text stage."""
    outputs = tuple(str(out / f"{i}.safetensors") for i in range(len(job_prompts)))
    job = TextJob(
        tuple(job_prompts),
        outputs,
        str(text_encoder),
        str(clip),
        str(TOKENIZERS / "t5xxl" / "tokenizer.json"),
        str(TOKENIZERS / "clip_l"),
        "cpu",
    )
    stage_text.run(job, Recorder())
    return [(tensors["t5"], tensors["pooled"]) for tensors in map(load_file, outputs)]


def conditioning(path: Path, seed: int, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Random t5 [1, T, D] and pooled [1, P], written to `path` as well."""
    generator = torch.Generator().manual_seed(seed)
    t5 = torch.randn(1, tokens, TINY.context, generator=generator)
    pooled = torch.randn(1, TINY.pooled, generator=generator)
    save_file({"t5": t5, "pooled": pooled}, path)
    return t5, pooled


class Differences:
    """The largest of each kind, printed when the module is done (`pytest -rP`, `-s`)."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def note(self, what: str, value: float) -> None:
        self.largest[what] = max(value, self.largest.get(what, 0.0))


@pytest.fixture(scope="module")
def differences() -> Iterator[Differences]:
    found = Differences()
    yield found
    print("".join(f"\nlargest difference, {what}: {value:.2g}" for what, value in found.largest.items()))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return float((a - b).abs().max())


# Sampling against the reference


@dataclass(frozen=True)
class Case:
    variant: str
    scheduler: str
    sampler: str
    size: tuple[int, int] = (64, 64)
    index: int = 0
    stored: str = "fp32"
    prefix: str = ""
    steps: int = 4
    cfg: float = 1.0
    guidance: float | None = None
    shift: float | None = None
    sigmas: tuple[float, ...] = ()
    seed: int = 7

    def __str__(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}"
        return f"{self.variant}-{self.scheduler}-{self.sampler}-{size}-{self.index}-{self.stored}-cfg{self.cfg}"


SCHEDULERS, SAMPLERS = ("simple", "normal", "beta", "sgm_uniform"), ("euler", "heun", "dpmpp_2m")
SIZES = ((64, 64), (72, 88), (64, 104), (120, 48), (16, 24))
"""72x88 pixels are 11x9 latents: both sides odd."""
GRID = [
    Case(
        variant,
        scheduler,
        sampler,
        size=SIZES[number % len(SIZES)],
        index=(0, 3)[number % 3 == 1],
        stored=tuple(STORED)[number % len(STORED)],
        prefix=("", PREFIX["transformer"])[number % 2],
        cfg=2.5 if number % 7 == 3 else 1.0,
        seed=1000 + number,
    )
    for number, (sampler, variant, scheduler) in enumerate(itertools.product(SAMPLERS, ("dev", "schnell"), SCHEDULERS))
]
MORE = [
    Case("dev", "simple", "euler", (72, 88), 3, "e4m3", steps=11, guidance=1.0, shift=1.15),
    Case("dev", "beta", "dpmpp_2m", (72, 64), 3, "e5m2", steps=6, guidance=7.25, cfg=1.7),
    Case("dev", "normal", "heun", (64, 72), 3, "scaled e4m3", steps=4, shift=0.5, seed=2**32 - 1),
    Case("schnell", "simple", "dpmpp_2m", (72, 88), 3, "listed quant", PREFIX["transformer"], cfg=4.0),
    Case("schnell", "simple", "euler", stored="scaled in part", sigmas=(0.9, 0.5, 0.30000001, 0.02, 0.0)),
    Case("schnell", "simple", "heun", (88, 72), stored="comfy_quant e5m2", steps=1, shift=1.0),
]


def test_the_table_covers_every_value() -> None:
    cases = GRID + MORE
    assert {case.stored for case in cases} == set(STORED)
    assert {case.size for case in cases} >= set(SIZES)
    for variant in ("dev", "schnell"):
        mine = [case for case in cases if case.variant == variant]
        assert {(c.scheduler, c.sampler) for c in mine} == set(itertools.product(SCHEDULERS, SAMPLERS))
        assert {c.index for c in mine} == {0, 3} and any(c.cfg != 1 for c in mine)


@pytest.mark.parametrize("case", GRID + MORE, ids=str)
def test_latents_equal_the_reference(case: Case, tmp_path: Path, differences: Differences) -> None:
    path = write_weights(
        tmp_path / "flux.safetensors", transformer_weights(case.variant, case.seed), case.stored, case.prefix
    )
    texts = [conditioning(tmp_path / "wanted", 1)]
    if case.cfg != 1:
        texts.append(conditioning(tmp_path / "unwanted", 2, tokens=11))
    width, height = case.size
    image = ImageJob(
        prompt="a fox",
        conditioning=str(tmp_path / "wanted"),
        seed=case.seed,
        width=width,
        height=height,
        steps=case.steps,
        guidance=case.guidance,
        cfg=case.cfg,
        negative_conditioning=str(tmp_path / "unwanted"),
        sampler=case.sampler,
        scheduler=case.scheduler,
        sigmas=case.sigmas,
        shift=case.shift,
        noise_index=case.index,
    )
    (got,) = ours(path, [image], tmp_path / "out")

    mu = case.shift
    if mu is None and case.variant == "dev":
        mu = 0.5 + (width * height / 256 - 256) * 0.65 / 3840
    levels = case.sigmas or reference.noise_levels(case.scheduler, case.steps, case.variant, mu)
    wanted = reference.sample(
        reference.read_weights(path, case.prefix),
        seed=case.seed,
        size=case.size,
        levels=levels,
        sampler=case.sampler,
        texts=texts,
        axes=AXES,
        guidance=3.5 if case.guidance is None else case.guidance,
        cfg=case.cfg,
        index=case.index,
    )
    differences.note("latents of the reference", far(got, wanted))
    assert wanted.std() > 0.3
    assert far(got, wanted) <= LATENT_TOLERANCE


def test_what_the_reference_tells_apart(tmp_path: Path) -> None:
    """That the tolerance means something: a tensor off by 3 % or a small change of a setting is far over it."""
    path = write_weights(tmp_path / "flux.safetensors", transformer_weights("dev"), "fp32")
    weights = reference.read_weights(path)
    t5, pooled = conditioning(tmp_path / "text", 1)
    x = reference.noise(1, 3, 5, 0)

    def velocity(weights: Tensors, sigma: float = 0.7, guidance: float = 3.5, axes: Any = AXES) -> torch.Tensor:
        return reference.velocity(weights, x, sigma, t5, pooled, guidance, axes)

    with torch.inference_mode():
        right = velocity(weights)
        for name in weights:
            assert far(velocity({**weights, name: weights[name] * 1.03}), right) > LATENT_TOLERANCE, name
        for changed in (velocity(weights, 0.7005), velocity(weights, 0.7, 3.504), velocity(weights, axes=(8, 8, 16))):
            assert far(changed, right) > LATENT_TOLERANCE


def test_a_file_of_the_synthetic_script(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    synthetic_checkpoint.write(path, synthetic_checkpoint.flux_shapes(TINY), "e4m3", METADATA)
    texts = [conditioning(tmp_path / "text", 1)]
    (got,) = ours(path, [ImageJob("", str(tmp_path / "text"), 5, 64, 64)], tmp_path)
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    wanted = reference.sample(
        reference.read_weights(path), seed=5, size=(64, 64), levels=levels, sampler="euler", texts=texts, axes=AXES
    )
    assert far(got, wanted) <= LATENT_TOLERANCE


# Against diffusers' own pipeline


def to_diffusers(weights: Tensors) -> Tensors:
    """diffusers' own converter, with the width 3072 that is written into it exchanged for the tensors'."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert code.co_consts.count(3072) == 1
    constants = tuple(len(weights["img_in.bias"]) if value == 3072 else value for value in code.co_consts)
    module = convert_flux_transformer_checkpoint_to_diffusers.__globals__
    return types.FunctionType(code.replace(co_consts=constants), module)(dict(weights))


def stock_transformer(weights: Tensors, variant: str) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=TINY.double_blocks,
        num_single_layers=TINY.single_blocks,
        attention_head_dim=TINY.head,
        num_attention_heads=TINY.hidden // TINY.head,
        joint_attention_dim=TINY.context,
        pooled_projection_dim=TINY.pooled,
        guidance_embeds=variant == "dev",
        axes_dims_rope=AXES,
    )
    transformer.load_state_dict(to_diffusers(weights), strict=True)
    return transformer.eval()


@pytest.mark.parametrize(
    ("variant", "size", "steps", "cfg"),
    [
        ("schnell", (64, 96), 4, 1.0),
        ("schnell", (32, 32), 2, 3.0),
        ("dev", (96, 64), 20, 1.0),
        ("dev", (32, 48), 4, 3.0),
    ],
)
def test_latents_equal_the_pipeline_of_diffusers(
    variant: str,
    size: tuple[int, int],
    steps: int,
    cfg: float,
    tmp_path: Path,
    differences: Differences,
) -> None:
    weights = transformer_weights(variant, seed=3)
    path = write_weights(tmp_path / "flux.safetensors", weights, "fp32")
    t5, pooled = conditioning(tmp_path / "wanted", 1, tokens=12)
    bad_t5, bad_pooled = conditioning(tmp_path / "unwanted", 2, tokens=12)
    image = ImageJob(
        "", str(tmp_path / "wanted"), 11, *size, steps, cfg=cfg, negative_conditioning=str(tmp_path / "unwanted")
    )
    (got,) = ours(path, [image], tmp_path)

    dynamic = {"use_dynamic_shifting": True, "shift": 3.0} if variant == "dev" else {"shift": 1.0}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=stock_transformer(weights, variant),
    )
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline(
        prompt_embeds=t5,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=bad_t5,
        negative_pooled_prompt_embeds=bad_pooled,
        true_cfg_scale=cfg,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    wanted = pipeline._unpack_latents(packed, size[1], size[0], 8) / 0.3611 + 0.1159
    differences.note("latents of diffusers' pipeline", far(got, wanted))
    assert far(got, wanted) <= LATENT_TOLERANCE


# Layouts


def _save(path: Path, tensors: Tensors) -> None:
    """Write a file whose data starts at a multiple of 64 bytes.

    The library pads headers to 8. fp32 matrices are used where they lie in the file, and MKL's product with a single
    vector adds up in another order where they are not at a multiple of 16: layouts would differ by some 3e-6.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, METADATA)
    length = int.from_bytes(raw[:8], "little")
    padding = b" " * (-(8 + length) % 64)
    path.write_bytes((length + len(padding)).to_bytes(8, "little") + raw[8 : 8 + length] + padding + raw[8 + length :])


def _diffusers_names(weights: Tensors) -> Tensors:
    """By way of bytes or half words where torch does not join float8."""
    dtypes = {name: w.dtype for name, w in weights.items()}
    assert len({dtypes[name] for name in weights if weights[name].ndim == 2}) == 1
    matrix = next(w.dtype for w in weights.values() if w.ndim == 2)
    if matrix.itemsize > 1:
        return to_diffusers(weights)
    asbytes = {name: w.view(torch.uint8) if w.dtype == matrix else w for name, w in weights.items()}
    return {name: w.view(matrix) if w.dtype == torch.uint8 else w for name, w in to_diffusers(asbytes).items()}


def _sharded(folder: Path, tensors: Tensors, stem: str) -> None:
    """Two shards and their index, cut so that the halves of a block fall apart."""
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        _save(folder / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stored_parts(variant: str, kind: str) -> dict[str, Tensors]:
    shapes = {name: make(dimensions(variant)) for name, make in synthetic_checkpoint.SHAPES.items()}
    parts = {name: random_weights(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return {name: weights if name == "vae" else STORED[kind](weights) for name, weights in parts.items()}


def vae_config() -> dict[str, Any]:
    levels = len(TINY.vae_widths)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": TINY.vae_widths,
        "layers_per_block": TINY.vae_blocks,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def converted_vae(weights: Tensors) -> Tensors:
    """diffusers' names; its converter leaves the attention's matrices as 1x1 convolutions squeezed or not."""
    return convert_ldm_vae_checkpoint(dict(weights), vae_config())


def assert_same_parameters(path: Path, other: Path) -> None:
    """Every parameter of the transformer has the same bits, read from either place."""
    files = WeightFiles()
    here, there = (checkpoint.part(place, "transformer").sources for place in (path, other))
    assert set(here) == set(there)
    for name, source in here.items():
        stored, wanted = files.stored(source), files.stored(there[name])
        assert stored.dtype == wanted.dtype and stored.shape == wanted.shape, name
        assert torch.equal(stored.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(("variant", "kind"), [("schnell", "fp32"), ("dev", "e4m3"), ("schnell", "bf16")])
def test_every_layout_gives_the_same_bits(variant: str, kind: str, tmp_path: Path) -> None:
    parts = stored_parts(variant, kind)
    vae = converted_vae(parts["vae"])
    _save(tmp_path / "bfl.safetensors", parts["transformer"])
    _save(tmp_path / "prefixed.safetensors", {PREFIX["transformer"] + n: w for n, w in parts["transformer"].items()})
    _save(tmp_path / "aio.safetensors", {PREFIX[p] + n: w for p, ws in parts.items() for n, w in ws.items()})
    named = _diffusers_names(parts["transformer"])
    _save(tmp_path / "diffusers.safetensors", named)
    folder = tmp_path / "folder"
    _save(folder / "transformer" / "diffusion_pytorch_model.safetensors", named)
    _save(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    (folder / "model_index.json").write_text("{}")
    shards = tmp_path / "shards"
    _sharded(shards / "transformer", named, "diffusion_pytorch_model")
    _sharded(shards / "vae", vae, "diffusion_pytorch_model")
    (shards / "model_index.json").write_text("{}")
    conditioning(tmp_path / "text", 1)
    image = ImageJob("", str(tmp_path / "text"), 3, 72, 88, steps=3)

    layouts = ["bfl.safetensors", "prefixed.safetensors", "aio.safetensors", "diffusers.safetensors"]
    layouts += ["folder", "folder/transformer", "shards", "shards/transformer"]
    got = {name: ours(tmp_path / name, [image], tmp_path / "out" / name)[0] for name in layouts}
    for name in layouts:
        assert_same_parameters(tmp_path / name, tmp_path / "bfl.safetensors")
        assert torch.equal(got[name], got["bfl.safetensors"]), (name, far(got[name], got["bfl.safetensors"]))

    _save(tmp_path / "vae.safetensors", parts["vae"])
    _save(tmp_path / "vae-diffusers.safetensors", vae)
    latent = next((tmp_path / "out" / "folder").glob("*.safetensors"))
    places = ["vae.safetensors", "vae-diffusers.safetensors", "aio.safetensors", "folder", "shards", "folder/vae"]
    pictures = [decode(tmp_path / name, [latent], tmp_path / "png" / name)[0].tobytes() for name in places]
    assert len(set(pictures)) == 1


@needs_tokenizers
def test_every_layout_of_text_encoders_gives_the_same_bits(tmp_path: Path) -> None:
    parts = stored_parts("schnell", "e4m3")
    t5, clip = parts["t5"], parts["clip"]
    _save(tmp_path / "aio.safetensors", {PREFIX[p] + n: w for p, ws in parts.items() for n, w in ws.items()})
    _save(tmp_path / "t5.safetensors", t5)
    _save(tmp_path / "clip.safetensors", clip)
    more_clip = {"logit_scale": torch.tensor(4.6), "text_projection.weight": torch.eye(TINY.pooled)}
    more_clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    _save(tmp_path / "clip-more.safetensors", clip | more_clip)
    _save(tmp_path / "t5-tied.safetensors", t5 | {"encoder.embed_tokens.weight": t5["shared.weight"].clone()})
    for folder in (tmp_path / "folder", tmp_path / "shards"):
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
    _save(tmp_path / "folder" / "text_encoder" / "model.safetensors", clip)
    _save(tmp_path / "folder" / "text_encoder_2" / "model.safetensors", t5)
    _sharded(tmp_path / "shards" / "text_encoder", {n.removeprefix("text_model."): w for n, w in clip.items()}, "model")
    _sharded(tmp_path / "shards" / "text_encoder_2", t5, "model")
    pairs = [("t5.safetensors", "clip.safetensors"), ("aio.safetensors", "aio.safetensors")]
    pairs += [("t5-tied.safetensors", "clip-more.safetensors"), ("folder", "folder"), ("shards", "shards")]
    results = []
    for t5_name, clip_name in pairs:
        results += encode(["a (red:1.3) fox"], tmp_path / t5_name, tmp_path / clip_name, tmp_path)
    for t5_states, pooled in results:
        assert torch.equal(t5_states, results[0][0]) and torch.equal(pooled, results[0][1])


# Noise and noise levels

DEV_1152 = resolution_shift(944, 1152)
LEVELS = [
    ("simple", 4, "schnell", None, (1.0, 0.75, 0.5, 0.25, 0.0)),
    ("simple", 4, "dev", 1.15, (1.0, 0.904531, 0.759511, 0.512844, 0.0)),
    ("simple", 4, "dev", DEV_1152, (1.0, 0.90673, 0.764179, 0.51927, 0.0)),
    ("normal", 4, "schnell", None, (1.0, 0.667, 0.334, 0.001, 0.0)),
    ("normal", 4, "dev", 1.15, (1.0, 0.863376, 0.612492, 0.000997, 0.0)),
    ("beta", 4, "schnell", None, (1.0, 0.824, 0.501, 0.177, 0.0)),
]
"""Read off ComfyUI v0.3.64 (../shared/reference/flux-conventions.md)."""


@pytest.mark.parametrize(("scheduler", "steps", "variant", "mu", "levels"), LEVELS)
def test_noise_levels_of_comfyui(
    scheduler: str, steps: int, variant: str, mu: float | None, levels: tuple[float, ...]
) -> None:
    assert schedule.sigmas(scheduler, steps, variant, mu) == pytest.approx(levels, abs=6e-7)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("variant", "mu"), [("dev", 1.15), ("dev", 0.5), ("dev", 2.3), ("schnell", None), ("schnell", 1.0)]
)
def test_noise_levels_equal_the_reference(scheduler: str, variant: str, mu: float | None) -> None:
    for steps in (*range(1, 31), 50, 100, 250, 999):
        got = schedule.sigmas(scheduler, steps, variant, mu)
        assert got == tuple(reference.noise_levels(scheduler, steps, variant, mu)), steps


def test_shift_by_resolution() -> None:
    for size, mu in (((512, 512), 0.63), ((1024, 1024), 1.15), ((944, 1152), 1.17573)):
        assert shift_of("dev", {}, *size) == pytest.approx(mu, abs=5e-6)
        assert shift_of("schnell", {}, *size) is None


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (9, 11), (16, 16), (119, 144)])
def test_noise_is_the_item_of_one_draw_of_a_batch(index: int, size: tuple[int, int]) -> None:
    for seed in (0, 42, 2**32 - 1):
        assert torch.equal(initial_noise(seed, *size, index), reference.noise(seed, *size, index))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_on_a_straight_and_a_curved_path(name: str) -> None:
    """On straight paths every sampler is exact; on a curved one, where the answer is known, it has its order."""
    x, clean = torch.full((1,), 2.0), torch.full((1,), 0.5)
    levels = (1.0, 0.8, 0.55, 0.2, 0.0)
    assert drive(SAMPLE[name](x, levels), lambda x, sigma: clean) == pytest.approx(0.5, abs=1e-6)

    def error(steps: int) -> float:
        times = tuple(1 - 0.9 * i / steps for i in range(steps + 1))
        x = torch.ones(1, dtype=torch.float64)
        end = drive(SAMPLE[name](x, times), lambda x, sigma: x - sigma * 2 * sigma)
        return abs(float(end) - 0.01)  # dx/dsigma = 2 sigma: x = sigma^2

    order = math.log2(error(64) / error(128)) if error(64) > 1e-12 else 9.0
    assert order > (0.9 if name == "euler" else 1.8)


# Text

PROMPTS = {
    "plain": "a large red circle above a small blue square, on white",
    "empty": "",
    "blank": "  ",
    "emphasis": "a (red) fox, ((huge)) trees (snow:1.3) (fog:0.5) (((deep (very deep:0.25) night)))",
    "negative weight": "a (cat:-0.5) and (nothing:0)",
    "escapes": r"a fox \(animal\), (red \(dark\):1.2) \\(x\\) \)",
    "open": "a (red fox, ((in) snow",
    "closed": "a red) fox (blue) sky, ) (x:1.5) ( (y))",
    "empty group": "a () fox (( )) (:1.3) (:) end",
    "colons": "(a: b) (10:30 pm:0.8) (x:1.2:1.5) (y:) (z: 2 ) (w:1e-1)",
    "glued": "un(believ:1.4)able(s)!",
    "newlines": "a fox\nin the snow\r\n\n(red\nberries:1.4)\tend \n",
    "unicode": "café, naïve ﬁg — 狐狸 🦊 ½ Ünï “quoted” İstanbul",
    "case": "A FOX's DON'T I'LL 1234 3.14 #tag a_b",
    "marks": "a <|endoftext|> b </s> c <pad> <extra_id_7>",
    "clip just full": "fox " * 75,
    "clip short piece over the end": "fox " * 73 + "(red blue green:1.1) tail",
    "clip long piece over the end": "fox " * 70 + "(one two three four five six seven eight nine ten:1.1) tail",
    "clip short piece fits exactly": "fox " * 72 + "(red blue green:1.1)",
    "long": "a very long sentence about foxes, " * 60 + "(at last:1.5) " + "again " * 20,
}


@pytest.fixture(scope="module")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """T5 in e4m3 with scales and CLIP in fp16."""
    folder = tmp_path_factory.mktemp("text")
    t5 = random_weights(synthetic_checkpoint.t5_shapes(TINY), 1)
    clip = random_weights(synthetic_checkpoint.clip_shapes(TINY), 2)
    return (
        write_weights(folder / "t5.safetensors", t5, "scaled e4m3"),
        write_weights(folder / "clip.safetensors", clip, "fp16"),
    )


@pytest.fixture(scope="module")
def stock_tokenizers() -> tuple[reference.Ids, reference.Ids]:
    """T5's and CLIP's, built by transformers from their folders, as ComfyUI does; ids without start and end."""
    t5 = T5TokenizerFast.from_pretrained(TOKENIZERS / "t5xxl", model_max_length=1 << 30)
    clip = CLIPTokenizer.from_pretrained(TOKENIZERS / "clip_l", model_max_length=1 << 30)
    return lambda text: t5(text)["input_ids"][:-1], lambda text: clip(text)["input_ids"][1:-1]


@pytest.fixture(scope="module")
def byte_pairs() -> reference.ClipBytePairs:
    return reference.ClipBytePairs(TOKENIZERS / "clip_l")


@needs_tokenizers
def test_conditioning_equals_the_reference(
    text_files: tuple[Path, Path],
    stock_tokenizers: tuple[reference.Ids, reference.Ids],
    tmp_path: Path,
    differences: Differences,
    byte_pairs: reference.ClipBytePairs,
) -> None:
    t5_path, clip_path = text_files
    got = encode(list(PROMPTS.values()), t5_path, clip_path, tmp_path)
    t5, clip = reference.read_weights(t5_path), reference.read_weights(clip_path)
    with torch.inference_mode():
        for (name, prompt), (states, pooled) in zip(PROMPTS.items(), got, strict=True):
            wanted = reference.t5_states(t5, prompt, stock_tokenizers[0])
            assert states.shape == wanted.shape, name
            d_t5, d_clip = far(states, wanted), far(pooled, reference.clip_pooled(clip, prompt, byte_pairs, CLIP_HEADS))
            assert d_t5 <= TEXT_TOLERANCE and d_clip <= TEXT_TOLERANCE, (name, d_t5, d_clip)
            differences.note("T5", d_t5)
            differences.note("CLIP", d_clip)
    assert got[list(PROMPTS).index("long")][0].shape[1] > 256


@pytest.fixture(scope="module")
def our_tokenizers(text_files: tuple[Path, Path]) -> tuple[reference.Ids, reference.Ids]:
    """The text encoders' own, ids without start and end."""
    cpu = torch.device("cpu")
    tokens = T5Tokens(checkpoint.part(text_files[0], "t5"), str(TOKENIZERS / "t5xxl" / "tokenizer.json"))
    clip = Clip(checkpoint.part(text_files[1], "clip"), str(TOKENIZERS / "clip_l"), WeightFiles(), cpu)
    return tokens._ids, clip._ids


@needs_tokenizers
@pytest.mark.parametrize("name", PROMPTS)
def test_token_ids_equal_the_reference(
    name: str,
    our_tokenizers: tuple[reference.Ids, reference.Ids],
    stock_tokenizers: tuple[reference.Ids, reference.Ids],
    byte_pairs: reference.ClipBytePairs,
) -> None:
    prompt = PROMPTS[name]
    pieces = reference.emphasised(prompt)
    assert prompts.weighted_segments(prompt) == [(piece, pytest.approx(weight)) for piece, weight in pieces]
    t5_ids, clip_ids = our_tokenizers
    for piece, _ in pieces:
        assert t5_ids(piece) == stock_tokenizers[0](piece)
        assert clip_ids(piece) == stock_tokenizers[1](piece) == byte_pairs(piece)
    section = prompts.clip_first_section(prompt, clip_ids, 49406, 49407, 77)
    assert section == reference.clip_section(prompt, byte_pairs)


@needs_tokenizers
def test_token_ids_by_heart(stock_tokenizers: tuple[reference.Ids, reference.Ids]) -> None:
    """Ids that are printed in many places, so that the stock tokenizers themselves are not taken on trust."""
    t5, clip = stock_tokenizers
    assert clip("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert t5("translate English to German: The house is wonderful.") == [
        13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5,
    ]  # fmt: skip


# VAE


def decode(vae: Path, latents: list[Path], out: Path) -> list[Image.Image]:
    """Pictures by the decode stage."""
    recorder = Recorder()
    stage_decode.run(DecodeJob(tuple(map(str, latents)), str(vae), str(out), "cpu", "fp32"), recorder)
    assert not recorder.of("failed"), recorder.of("failed")
    pictures = []
    for result in recorder.of("result"):
        with Image.open(result["path"]) as image:
            image.load()
            pictures.append(image)
    return pictures


def assert_floored(picture: Image.Image, unit: torch.Tensor) -> None:
    """The bytes of ComfyUI's floor, but for a level where 255 * unit is an integer to the last digits of fp32."""
    levels = unit.double().clamp(0, 1) * 255
    wanted = (unit.float().clamp(0, 1) * 255).to(torch.uint8)
    got = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(wanted.shape)
    other = got != wanted
    assert int(other.sum()) <= 1e-3 * other.numel()
    assert bool(((got.double() - levels)[other].abs() < 1.01).all())
    assert bool(((levels - levels.round())[other].abs() < 255e-5).all())


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_pictures_equal_those_of_the_stock_vae(kind: str, tmp_path: Path) -> None:
    weights = random_weights(synthetic_checkpoint.vae_shapes(TINY), 5)
    weights["decoder.conv_out.weight"] *= 2  # so that some values are clipped
    path = write_weights(tmp_path / "vae.safetensors", weights, kind)
    stock = AutoencoderKL(**vae_config())
    stock.load_state_dict(converted_vae({name: w.float() for name, w in load_file(path).items()}), strict=True)
    stock.eval()
    latents = torch.randn(1, 16, 9, 11, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "x.safetensors")
    (picture,) = decode(path, [tmp_path / "x.safetensors"], tmp_path)
    with torch.inference_mode():
        unit = (stock.decode(latents).sample[0].permute(1, 2, 0).double() + 1) / 2
    assert picture.size == (88, 72) and picture.mode == "RGB"
    assert_floored(picture, unit)
    assert 0.01 < float(((unit < 0) | (unit > 1)).float().mean()) < 0.9
    rounded = (unit.clamp(0, 1) * 255).round().byte().numpy()
    assert picture.tobytes() != rounded.tobytes()


def test_latent_space_is_fluxs() -> None:
    x = torch.tensor([-2.0, 0.0, 1.5])
    assert far(LatentSpace().to_vae(x), x / 0.3611 + 0.1159) == 0
    assert far(LatentSpace().to_model(LatentSpace().to_vae(x)), x) < 1e-6


@needs_tokenizers
def test_prompt_to_picture_equals_the_reference(
    tmp_path: Path, stock_tokenizers: tuple[reference.Ids, reference.Ids], byte_pairs: reference.ClipBytePairs
) -> None:
    """All three stages on one all-in-one file in float8, ComfyUI's layout."""
    parts = stored_parts("dev", "scaled e4m3")
    path = tmp_path / "aio.safetensors"
    tensors = {PREFIX[p] + n: w for p, ws in parts.items() for n, w in ws.items()}
    _save(path, tensors)
    prompt = "a (red:1.2) fox"
    encode([prompt], path, path, tmp_path)
    image = ImageJob(prompt, str(tmp_path / "0.safetensors"), 9, 64, 48, steps=4)
    (got,) = ours(path, [image], tmp_path / "latents", vae=str(path))
    (picture,) = decode(path, list((tmp_path / "latents").iterdir()), tmp_path / "images")

    t5, clip = (reference.read_weights(path, PREFIX[part]) for part in ("t5", "clip"))
    with torch.inference_mode():
        states = reference.t5_states(t5, prompt, stock_tokenizers[0])
        pooled = reference.clip_pooled(clip, prompt, byte_pairs, CLIP_HEADS)
    levels = reference.noise_levels("simple", 4, "dev", 0.5 + (12 - 256) * 0.65 / 3840)
    wanted = reference.sample(
        reference.read_weights(path, PREFIX["transformer"]),
        seed=9,
        size=(64, 48),
        levels=levels,
        sampler="euler",
        texts=[(states, pooled)],
        axes=AXES,
        guidance=3.5,
    )
    assert far(got, wanted) <= LATENT_TOLERANCE
    stock = AutoencoderKL(**vae_config())
    stock.load_state_dict(converted_vae(parts["vae"]), strict=True)
    with torch.inference_mode():
        unit = (stock.eval().decode(got).sample[0].permute(1, 2, 0) + 1) / 2
    assert_floored(picture, unit)


# float8 and 16 bits


def _value(code: int, exponent_bits: int) -> float:
    """What a float8 code means, by its fields; e4m3fn has no infinity and one NaN for each sign."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = code >> mantissa_bits & 2**exponent_bits - 1, code & 2**mantissa_bits - 1
    sign = -1.0 if code >> 7 else 1.0
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent_bits == 4 and code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("float8", "exponent_bits"), [(torch.float8_e4m3fn, 4), (torch.float8_e5m2, 5)])
def test_every_code_of_float8(float8: torch.dtype, exponent_bits: int, dtype: torch.dtype) -> None:
    values = [_value(code, exponent_bits) for code in range(256)]
    codes = torch.arange(256).to(torch.uint8)
    finite = torch.tensor([math.isfinite(value) for value in values])
    wanted = torch.tensor(values, dtype=torch.float64)[finite]
    got = fp8.expand(codes[finite].view(float8), dtype)
    assert got.dtype == dtype and torch.equal(got.double(), wanted)
    assert torch.equal(torch.signbit(got), torch.signbit(wanted))
    for code, value in enumerate(values):
        assert fp8.has_nonfinite(codes[code : code + 1].view(float8)) == (not math.isfinite(value)), code
    for scale in (0.00021834, 1.0, 3.7):
        layer = StoredLinear("x", codes[finite].view(float8)[None], scale, None)
        scaled = (wanted.float() * torch.tensor(scale)).to(dtype)
        assert torch.equal(layer.expanded(dtype, torch.device("cpu"))[0], scaled)


def test_the_timestep_is_embedded_from_fp32(tmp_path: Path) -> None:
    """In 16 bits too: 0.7595 is 759.5 for the sinusoids, and not 760, which bf16 would make of it."""
    path = write_weights(tmp_path / "flux.safetensors", transformer_weights("dev"), "bf16")
    weights = reference.read_weights(path)
    pooled = torch.randn(1, TINY.pooled, generator=torch.Generator().manual_seed(0))
    exact = Flux(checkpoint.part(path, "transformer"), WeightFiles(), torch.float32, torch.device("cpu"))
    half = Flux(checkpoint.part(path, "transformer"), WeightFiles(), torch.bfloat16, torch.device("cpu"))

    def embedded(sigma: float, guidance: float) -> torch.Tensor:
        parts = (("time_in", reference.sinusoids(sigma)), ("guidance_in", reference.sinusoids(guidance)))
        return sum(reference._embedded(weights, name, x) for name, x in (*parts, ("vector_in", pooled)))

    sigma = 0.759511
    rounded = float(torch.tensor(sigma, dtype=torch.bfloat16))
    with torch.inference_mode():
        assert far(exact._embed_time(sigma, 3.5, pooled), embedded(sigma, 3.5)) < 1e-5
        got = half._embed_time(sigma, 3.5, pooled).float()
    # 3.5 is 3504 in bf16, as in ComfyUI; what remains is the rounding of the layers
    right, wrong = far(got, embedded(sigma, 3.504)), far(got, embedded(rounded, 3.504))
    assert right < 0.03 and wrong > 4 * right


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp16", 0.006)])
def test_sixteen_bits_stay_near_fp32(dtype: str, tolerance: float, tmp_path: Path, differences: Differences) -> None:
    """Latents have a spread of about 3; the tolerances, on the largest difference, are twice what was seen."""
    path = write_weights(tmp_path / "flux.safetensors", transformer_weights("schnell"), "e4m3")
    texts = [conditioning(tmp_path / "text", 1)]
    image = ImageJob("", str(tmp_path / "text"), 5, 72, 88, steps=4)
    (got,) = ours(path, [image], tmp_path / "half", dtype)
    (again,) = ours(path, [image], tmp_path / "again", dtype)
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    wanted = reference.sample(
        reference.read_weights(path), seed=5, size=(72, 88), levels=levels, sampler="euler", texts=texts, axes=AXES
    )
    differences.note(f"latents in {dtype}", far(got, wanted))
    assert torch.equal(got, again)
    assert 1e-4 < far(got, wanted) <= tolerance
