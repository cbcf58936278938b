"""Flux.1 once more, in plain torch, sharing no code with fluxsplit: what the heavy rooms are compared with.

Written from the published equations and numbers: black-forest-labs/flux (`src/flux/model.py`, `modules/layers.py`,
`math.py`), ComfyUI v0.3.64 (`comfy/samplers.py`, `model_sampling.py`, `sample.py`, `sd1_clip.py`,
`text_encoders/t5.py`, `clip_model.py`) and the papers named below. Where there are several ways to write a thing,
this takes another than fluxsplit does: fused matrices stay fused, RoPE is a product of complex numbers, attention an
einsum, noise levels are computed in fp64, samplers step in velocity or in the logarithm of the signal-to-noise
ratio. All of it is fp32 on the CPU, and slow.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from safetensors import safe_open
from scipy.special import betaincinv
from torch import Tensor

Weights = dict[str, Tensor]
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


# Weights


def read_weights(path: Path, prefix: str = "") -> Weights:
    """Tensors below `prefix` of a safetensors file, in fp32, float8 multiplied with its scale where it has one."""
    with safe_open(str(path), "pt") as file:
        raw = {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        layers = json.loads((file.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))["layers"]
    formats = {layer.removeprefix(prefix): entry["format"] for layer, entry in layers.items()}
    for name in [name for name in raw if name.endswith(".comfy_quant")]:
        formats[name.removesuffix(".comfy_quant")] = json.loads(raw.pop(name).numpy().tobytes())["format"]
    scales = {
        name.removesuffix(end): raw.pop(name)
        for end in (".scale_weight", ".weight_scale")
        for name in list(raw)
        if name.endswith(end)
    }
    weights = {}
    for name, tensor in raw.items():
        layer = name.removesuffix(".weight")
        stored = tensor.view(FLOAT8[formats[layer]]) if tensor.dtype == torch.uint8 else tensor
        weights[name] = stored.to(torch.float32) * scales.get(layer, torch.tensor(1.0))
    return weights


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    product = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return product + w[f"{name}.bias"] if f"{name}.bias" in w else product


# Transformer


def velocity(
    w: Weights, x: Tensor, sigma: float, t5: Tensor, pooled: Tensor, guidance: float | None, axes: Sequence[int]
) -> Tensor:
    """BFL's Flux on latents x [1, 16, h, w] in model space; odd sides go on with the other end's row or column."""
    height, width = x.shape[2:]
    if height % 2:
        x = torch.cat([x, x[:, :, :1]], 2)
    if width % 2:
        x = torch.cat([x, x[:, :, :, :1]], 3)
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    image = _linear(w, "img_in", F.unfold(x, 2, stride=2).mT)  # [1, N, D], patches channel first
    text = _linear(w, "txt_in", t5)
    vector = _embedded(w, "time_in", sinusoids(sigma)) + _embedded(w, "vector_in", pooled)
    if "guidance_in.in_layer.weight" in w and guidance is not None:
        vector = vector + _embedded(w, "guidance_in", sinusoids(guidance))
    turns = _turns(text.shape[1], rows, columns, axes)
    for i in range(_depth(w, "double_blocks.")):
        text, image = _double_block(w, f"double_blocks.{i}.", text, image, vector, turns)
    both = torch.cat([text, image], 1)
    for i in range(_depth(w, "single_blocks.")):
        both = _single_block(w, f"single_blocks.{i}.", both, vector, turns)
    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", F.silu(vector)).chunk(2, -1)
    tokens = _linear(w, "final_layer.linear", _modulated(both[:, text.shape[1] :], shift, scale))
    return F.fold(tokens.mT, (2 * rows, 2 * columns), 2, stride=2)[:, :, :height, :width]


def _depth(w: Weights, prefix: str) -> int:
    return len({name.split(".")[1] for name in w if name.startswith(prefix)})


def sinusoids(value: float) -> Tensor:
    """[1, 256]: 128 cosines, then 128 sines, of 1000 * value over periods from 2 pi to 20000 pi.

    The angles are fp32 as everywhere: at 1000 radians that is an error of 3e-5, which is part of what is matched.
    """
    speeds = torch.exp(torch.arange(128) * torch.tensor(-math.log(10_000) / 128))
    angles = torch.tensor([[value]]) * 1000 * speeds
    return torch.cat([angles.cos(), angles.sin()], 1)


def _embedded(w: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(w, f"{name}.out_layer", F.silu(_linear(w, f"{name}.in_layer", x)))


def _turns(text_tokens: int, rows: int, columns: int, axes: Sequence[int]) -> Tensor:
    """e^(i angle) by token and pair of channels, [T + N, head / 2] (Su et al., arXiv 2104.09864)."""
    places = [(0, 0, 0)] * text_tokens + [(0, row, column) for row in range(rows) for column in range(columns)]
    at = torch.tensor(places, dtype=torch.float64)  # [T + N, 3]
    speeds = [10_000 ** (-torch.arange(0, axis, 2, dtype=torch.float64) / axis) for axis in axes]
    angles = torch.cat([torch.outer(at[:, i], speed) for i, speed in enumerate(speeds)], 1)
    return torch.exp(1j * angles).to(torch.complex64)


def _attention(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    """q, k, v [1, heads, L, head] → [1, L, heads * head]."""
    q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turns for t in (q, k))
    likeness = torch.einsum("bhqd,bhkd->bhqk", q, k.conj()).real / math.sqrt(v.shape[-1])
    return torch.einsum("bhqk,bhkd->bqhd", likeness.softmax(-1), v).flatten(2)


def _heads(w: Weights, norm: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection [1, L, 3 * D] → q, k, v [1, heads, L, head], q and k normalised."""
    head = len(w[f"{norm}.query_norm.scale"])
    q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return _rms(q, w[f"{norm}.query_norm.scale"]), _rms(k, w[f"{norm}.key_norm.scale"]), v


def _rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def _double_block(
    w: Weights, block: str, text: Tensor, image: Tensor, vector: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    streams = {"txt": text, "img": image}
    changes = {s: _linear(w, f"{block}{s}_mod.lin", F.silu(vector)).chunk(6, -1) for s in streams}
    heads = {}
    for s, x in streams.items():
        modulated = _modulated(x, changes[s][0], changes[s][1])
        heads[s] = _heads(w, f"{block}{s}_attn.norm", _linear(w, f"{block}{s}_attn.qkv", modulated))
    q, k, v = (torch.cat([a, b], 2) for a, b in zip(heads["txt"], heads["img"], strict=True))
    attended = _attention(q, k, v, turns)
    parts = {"txt": attended[:, : text.shape[1]], "img": attended[:, text.shape[1] :]}
    for s, before in streams.items():
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = changes[s]
        x = before + gate[:, None] * _linear(w, f"{block}{s}_attn.proj", parts[s])
        inner = _linear(w, f"{block}{s}_mlp.0", _modulated(x, mlp_shift, mlp_scale))
        streams[s] = x + mlp_gate[:, None] * _linear(w, f"{block}{s}_mlp.2", gelu(inner))
    return streams["txt"], streams["img"]


def _single_block(w: Weights, block: str, x: Tensor, vector: Tensor, turns: Tensor) -> Tensor:
    shift, scale, gate = _linear(w, f"{block}modulation.lin", F.silu(vector)).chunk(3, -1)
    fused = _linear(w, f"{block}linear1", _modulated(x, shift, scale))
    width = x.shape[-1]
    attended = _attention(*_heads(w, f"{block}norm", fused[..., : 3 * width]), turns)
    out = _linear(w, f"{block}linear2", torch.cat([attended, gelu(fused[..., 3 * width :])], -1))
    return x + gate[:, None] * out


def gelu(x: Tensor) -> Tensor:
    """GELU by the tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Noise and noise levels


def noise(seed: int, height: int, width: int, index: int) -> Tensor:
    """Item `index` of the batch that ComfyUI draws in one call, [1, 16, height, width]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.randn([index + 1, 16, height, width])[index:]


def noise_levels(scheduler: str, steps: int, variant: str, mu: float | None) -> list[float]:
    """ComfyUI's schedulers on its table of 10000 (dev) or 1000 (schnell) levels, ending in 0.

    Where ComfyUI computes in fp32, so does this, operation by operation: the last bit of a level is 6e-5 radians in
    the embedding of the timestep.
    """
    count = 10_000 if variant == "dev" else 1000

    def level(time: float) -> float:
        t = torch.tensor(time)
        alpha = 1.0 if mu is None else math.exp(mu)
        return float(t if mu is None else torch.reciprocal(t.reciprocal() - 1 + alpha) * alpha)

    if scheduler == "simple":
        return [*(level((count - int(i * (count / steps))) / count) for i in range(steps)), 0.0]
    if scheduler == "beta":
        quantiles = [betaincinv(0.6, 0.6, 1 - i / steps) for i in range(steps)]
        places = dict.fromkeys(round(q * (count - 1)) for q in quantiles)
        return [*(level((place + 1) / count) for place in places), 0.0]
    times = torch.linspace(1, level(1 / count), steps + (scheduler == "sgm_uniform"))
    return [*(level(time) for time in times[:steps].tolist()), 0.0]


# Samplers

Predict = Callable[[Tensor, float], Tensor]
"""(x, sigma) → velocity."""


def euler(predict: Predict, x: Tensor, levels: Sequence[float]) -> Tensor:
    """x moves with its velocity."""
    for now, then in itertools.pairwise(levels):
        x = x + (then - now) * predict(x, now)
    return x


def heun(predict: Predict, x: Tensor, levels: Sequence[float]) -> Tensor:
    """The trapezoidal rule on the velocity; the last step, which ends at 0, is Euler's."""
    for now, then in itertools.pairwise(levels):
        first = predict(x, now)
        second = predict(x + (then - now) * first, then) if then else first
        x = x + (then - now) * (first + second) / 2
    return x


def dpmpp_2m(predict: Predict, x: Tensor, levels: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, in lambda = -log sigma with x written as if alpha were 1.

    ComfyUI applies the variance-exploding form to flow matching; the last step is of first order.
    """
    lambdas = [-math.log(level) if level else math.inf for level in levels]
    data: list[Tensor] = []
    for i, now in enumerate(levels[:-1]):
        data.append(x - now * predict(x, now))
        h = lambdas[i + 1] - lambdas[i]
        estimate = data[i]
        if i and not math.isinf(h):
            slope = (data[i] - data[i - 1]) / (lambdas[i] - lambdas[i - 1])  # of the data, in lambda
            estimate = estimate + slope * h / 2
        decay = math.exp(-h)
        x = decay * x + (1 - decay) * estimate
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


# Text


def emphasised(prompt: str) -> list[tuple[str, float]]:
    """Pieces of a prompt and their weights, as ComfyUI reads parentheses."""
    escaped = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")
    pieces = _weighted(escaped, 1.0)
    return [(piece.replace("\0\1", ")").replace("\0\2", "("), weight) for piece, weight in pieces]


def _weighted(text: str, weight: float) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    for piece in _groups(text):
        if not (piece.startswith("(") and piece.endswith(")") and len(piece) > 1):
            pieces.append((piece, weight))
            continue
        inside, stronger = piece[1:-1], weight * 1.1
        named = regex.fullmatch(r"(?s)(.+):([^:]*)", inside)
        if named and (number := _number(named[2])) is not None:
            inside, stronger = named[1], number
        pieces += _weighted(inside, stronger)
    return pieces


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _groups(text: str) -> list[str]:
    """Maximal runs at depth 0 and groups; depth may go below 0, where `(` opens nothing."""
    groups, current, depth = [], "", 0
    for char in text:
        if char == "(" and depth == 0:
            groups.append(current)
            current = ""
        depth += {"(": 1, ")": -1}.get(char, 0)
        current += char
        if char == ")" and depth == 0:
            groups.append(current)
            current = ""
    return [group for group in [*groups, current] if group]


Ids = Callable[[str], list[int]]
"""Text → token ids without start and end."""


def t5_states(w: Weights, prompt: str, ids: Ids, least: int = 256) -> Tensor:
    """[1, T, D]: padded with 0 to `least` tokens, never cut; emphasis moves a token away from the empty prompt."""
    tokens = [(token, weight) for piece, weight in emphasised(prompt) for token in ids(piece)] + [(1, 1.0)]
    tokens += [(0, 1.0)] * (least - len(tokens))
    states = t5(w, [token for token, _ in tokens])
    if any(weight != 1.0 for _, weight in tokens):
        empty = t5(w, [1] + [0] * (len(tokens) - 1))
        weights = torch.tensor([weight for _, weight in tokens])[:, None]
        states = empty * (1 - weights) + states * weights
    return states


def t5(w: Weights, ids: list[int]) -> Tensor:
    """T5's encoder (Raffel et al., arXiv 1910.10683), version 1.1, without a mask."""
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]  # [buckets, heads]
    length, heads = len(ids), table.shape[1]
    distances = [_bucket(d, len(table)) for d in range(1 - length, length)]
    buckets = torch.tensor(distances)[torch.arange(length)[None] - torch.arange(length)[:, None] + length - 1]
    bias = table[buckets].permute(2, 0, 1)  # [heads, query, key]
    x = w["shared.weight"][torch.tensor(ids)][None]
    for i in range(len({name.split(".")[2] for name in w if name.startswith("encoder.block.")})):
        attention, ff = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        y = _rms(x, w[f"{attention}.layer_norm.weight"])
        q, k, v = (_linear(w, f"{attention}.SelfAttention.{n}", y).unflatten(-1, (heads, -1)) for n in "qkv")
        chosen = (torch.einsum("bqhd,bkhd->bhqk", q, k) + bias).softmax(-1)
        x = x + _linear(w, f"{attention}.SelfAttention.o", torch.einsum("bhqk,bkhd->bqhd", chosen, v).flatten(2))
        y = _rms(x, w[f"{ff}.layer_norm.weight"])
        gated = gelu(_linear(w, f"{ff}.DenseReluDense.wi_0", y)) * _linear(w, f"{ff}.DenseReluDense.wi_1", y)
        x = x + _linear(w, f"{ff}.DenseReluDense.wo", gated)
    return _rms(x, w["encoder.final_layer_norm.weight"])


def _bucket(distance: int, buckets: int) -> int:
    """Half the buckets for each direction; half of those exact, the rest logarithmic up to 128 (8 and 16 of 32)."""
    assert buckets == 32
    far = abs(distance)
    if far >= 8:
        far = min(15, 8 + (far * far // 64).bit_length() - 1)  # floor of 2 * log2(far / 8)
    return far + 16 * (distance > 0)


def clip_pooled(w: Weights, prompt: str, ids: Ids, heads: int) -> Tensor:
    """[1, P]: state of the end token of the first section after the final norm, unprojected."""
    section = clip_section(prompt, ids)
    tokens = torch.tensor(section)
    x = (
        w["text_model.embeddings.token_embedding.weight"][tokens] + w["text_model.embeddings.position_embedding.weight"]
    )[None]
    ahead = torch.ones(len(section), len(section)).triu(1).bool()
    for i in range(len({name.split(".")[3] for name in w if name.startswith("text_model.encoder.layers.")})):
        layer = f"text_model.encoder.layers.{i}"
        y = _layer_norm(w, f"{layer}.layer_norm1", x)
        q, k, v = (_linear(w, f"{layer}.self_attn.{n}_proj", y).unflatten(-1, (heads, -1)) for n in "qkv")
        likeness = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        chosen = likeness.masked_fill(ahead, -math.inf).softmax(-1)
        x = x + _linear(w, f"{layer}.self_attn.out_proj", torch.einsum("bhqk,bkhd->bqhd", chosen, v).flatten(2))
        y = _linear(w, f"{layer}.mlp.fc1", _layer_norm(w, f"{layer}.layer_norm2", x))
        x = x + _linear(w, f"{layer}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return _layer_norm(w, "text_model.final_layer_norm", x)[:, section.index(49407)]


def _layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def clip_section(prompt: str, ids: Ids) -> list[int]:
    """The first 77 ids of ComfyUI's sections: a piece of less than 8 tokens is never cut at a section's end."""
    sections = [[49406]]
    for piece in (ids(text) for text, _ in emphasised(prompt)):
        rest = piece
        while len(sections[-1]) + len(rest) > 76:
            room = 76 - len(sections[-1])
            if len(piece) >= 8:
                sections[-1] += rest[:room]
                rest = rest[room:]
            sections.append([49406])
        sections[-1] += rest
    return (sections[0] + [49407] * 77)[:77]


class ClipBytePairs:
    """CLIP's byte pair encoding (Sennrich et al., arXiv 1508.07909; openai/CLIP `simple_tokenizer.py`)."""

    _WORDS = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )

    def __init__(self, folder: Path) -> None:
        self._ids: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
        self._ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line}

    def __call__(self, text: str) -> list[int]:
        """Ids without start and end."""
        words = self._WORDS.findall(" ".join(unicodedata.normalize("NFC", text).split()).lower())
        return [self._ids[piece] for word in words for piece in self._pieces(word)]

    def _pieces(self, word: str) -> list[str]:
        if word in self._ids and word.startswith("<|"):
            return [word]
        pieces = [_byte_letters()[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = [pair for pair in itertools.pairwise(pieces) if pair in self._ranks]
            if not pairs:
                break
            best = min(pairs, key=lambda pair: self._ranks[pair])
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
        return pieces


@functools.cache
def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte: itself if Latin-1 prints it, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# Putting it together


def sample(
    w: Weights,
    *,
    seed: int,
    size: tuple[int, int],
    levels: Sequence[float],
    sampler: str,
    texts: Sequence[tuple[Tensor, Tensor]],
    axes: Sequence[int],
    guidance: float | None = None,
    cfg: float = 1.0,
    index: int = 0,
) -> Tensor:
    """VAE-space latents [1, 16, h, w] of a picture of `size` (width, height); `texts` is the wanted and, with cfg,
    the unwanted conditioning (t5, pooled)."""

    def predict(x: Tensor, sigma: float) -> Tensor:
        each = [velocity(w, x, sigma, t5, pooled, guidance, axes) for t5, pooled in texts]
        return each[0] if len(each) == 1 else cfg * each[0] + (1 - cfg) * each[1]

    start = noise(seed, size[1] // 8, size[0] // 8, index)
    with torch.inference_mode():
        return SAMPLERS[sampler](predict, start * levels[0], levels) / 0.3611 + 0.1159
