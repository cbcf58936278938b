"""Flow training of the demo model: diffusers' Flux transformer, from scratch, on drawn pictures.

Pictures are drawn as they are needed, so nothing repeats. Every step uses one picture size, with
fewer pictures where they are larger, so that all steps take the same time; several processes
average their gradients. Block matrices are trained with Muon, the rest with AdamW.

The last part of the run distils guidance, as Flux's own makers did: a frozen copy of the averaged weights
says in which direction a caption moves the velocity, and the model learns to go further that way by itself
(after Meng et al., arXiv 2210.03142; and arXiv 2502.12154 for adding it to the target of the data).
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from captions import caption, to_text
from demo_latents import image_ids, pack, project
from demo_muon import Muon, fast_bf16, split_parameters
from demo_text import WIDTH as TEXT_WIDTH
from demo_text import Tokenizers, encode, load_encoders
from shapes import picture, random_scene

if TYPE_CHECKING:
    from demo_assistant import Assistant

Bucket = tuple[int, int]  # image tokens across and down; one token is 16 pixels


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Architecture and schedule of the picture model."""

    heads: int = 3
    head_dim: int = 64
    double_blocks: int = 2
    single_blocks: int = 4
    axes_dims_rope: tuple[int, int, int] = (8, 28, 28)
    rope_short_side_tokens: int = 8
    batch: int = 32  # pictures of 128x128 a step and process
    matrix_lr: float = 2.5e-3
    lr: float = 1.5e-3
    ema: float = 0.995
    decay_from: float = 0.55  # part of the run after which learning rates fall to zero
    empty_captions: float = 0.07
    guide: float = 2.0  # guidance that is distilled: 1 for none
    guide_from: float = 0.8  # part of the run from which on it is


# Shares of the steps by size class (shorter side 128, 192-256, 384-512), and how often a picture
# holds two objects, up to each part of the run.
STAGES: tuple[tuple[float, tuple[float, float, float], float], ...] = (
    (0.12, (1.0, 0.0, 0.0), 0.3),
    (0.40, (0.85, 0.15, 0.0), 0.5),
    (0.47, (0.65, 0.35, 0.0), 0.55),
    (0.92, (0.47, 0.49, 0.04), 0.55),
    (1.01, (0.22, 0.76, 0.02), 0.55),
)
BUCKETS: tuple[tuple[Bucket, ...], ...] = (
    ((8, 8), (8, 8), (8, 8), (11, 8), (8, 11), (10, 8), (8, 10)),
    ((12, 12), (16, 16), (16, 16), (16, 12), (12, 16)),
    ((32, 32), (32, 24), (24, 32), (24, 24)),
)


def build_flow(config: FlowConfig) -> FluxTransformer2DModel:
    """An untrained transformer that starts as the identity: zero modulations, zero output."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=config.axes_dims_rope,
    )
    for name, module in model.named_modules():
        zeroed = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")
        if name.endswith(zeroed) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    """Attention by two batched products, [B, S, H, D]: for a hundred tokens on a CPU three times as fast as fused."""
    batch, tokens, heads, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(batch * heads, tokens, width) for t in (query, key, value))
    shares = torch.bmm(q * width**-0.5, k.mT).softmax(-1)
    return torch.bmm(shares, v.to(shares.dtype)).view(batch, heads, tokens, width).transpose(1, 2)


# -- data --------------------------------------------------------------------------------------


def stage(part: float) -> tuple[tuple[float, float, float], float]:
    """Size shares and share of pairs at this part of the run."""
    for until, shares, pairs in STAGES:
        if part < until:
            return shares, pairs
    return STAGES[-1][1:]


def make_batch(
    rng: np.random.Generator, bucket: Bucket, size: int, pairs: float, empty: float
) -> tuple[Tensor, list[str]]:
    """Drawn pictures as tokens [B, N, 64] and their prompts."""
    tokens, prompts = [], []
    for _ in range(size):
        scene = random_scene(rng, 2 if rng.random() < pairs else 1)
        prompts.append("" if rng.random() < empty else to_text(caption(rng, scene)))
        image = picture(scene, rng, bucket[0] * 16, bucket[1] * 16)
        tokens.append(torch.from_numpy(pack(project(image))))
    return torch.stack(tokens), prompts


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise: a s / (1 + (a - 1) s)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def draw_sigmas(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Mostly shifted logit-normal, wide enough for four-step sampling; spread evenly over the batch.  # [B]"""
    strata = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    normal = torch.sigmoid(torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)))
    kind = torch.rand(batch, generator=generator)
    wide = math.sqrt(tokens / 64)
    high, low = shift_sigmas(normal, 4.5 * wide), shift_sigmas(normal, 1.6 * wide)
    uniform = torch.rand(batch, generator=generator)
    return torch.where(kind < 0.6, high, torch.where(kind < 0.9, low, uniform))


def velocity(
    model: FluxTransformer2DModel, noised: Tensor, sigmas: Tensor, states: Tensor, pooled: Tensor, places: Tensor
) -> Tensor:
    """The model's prediction of noise - picture.  # [B, N, 64]"""
    predicted: Tensor = model(
        hidden_states=noised,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=sigmas,
        img_ids=places,
        txt_ids=torch.zeros(states.shape[1], 3, device=noised.device),
        return_dict=False,
    )[0]
    return predicted


# -- training ----------------------------------------------------------------------------------


class FlowTrainer:
    """The state of a run: models, optimisers, averages, and the time spent."""

    def __init__(self, work: Path, tokenizer_folder: Path, config: FlowConfig, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.work, self.config, self.device = work, config, device
        torch.manual_seed(3)
        self.tokenizers = Tokenizers(tokenizer_folder)
        self.t5, self.clip = load_encoders(work, self.tokenizers)
        self.t5.to(device)
        self.clip.to(device)
        self.model = build_flow(config).to(device)
        if device == "cpu":
            transformer_flux.dispatch_attention_fn = plain_attention
        matrices, rest = split_parameters(self.model)
        self.muon = Muon(matrices, self.rank, self.world)
        self.adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step, self.spent_s, self.pictures, self.loss = 0, 0.0, 0, 1.0
        self.teacher: FluxTransformer2DModel | None = None
        self.path = work / "flow.pt"
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["adamw"])
        for held, saved in zip(self.muon.momenta, state["momenta"], strict=True):
            held.copy_(saved)
        self.average = state["ema"]
        self.step, self.spent_s = state["step"], state["spent_s"]
        self.pictures = state["pictures"]

    def save(self) -> None:
        """Write the checkpoint; momenta are gathered from all processes."""
        momenta = [held.clone() for held in self.muon.momenta]
        if self.world > 1:
            own = {i for group in self.muon.groups for i in group}
            for index, held in enumerate(momenta):
                held.mul_(float(index in own))
                dist.all_reduce(held)
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "ema": self.average,
            "adamw": self.adamw.state_dict(),
            "momenta": momenta,
            "step": self.step,
            "spent_s": self.spent_s,
            "pictures": self.pictures,
            "config": asdict(self.config),
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def losses(self, part: float) -> tuple[Tensor, int]:
        """The step's loss and how many pictures it saw."""
        shares, pairs = stage(part)
        common = np.random.default_rng((17, self.step))  # the same size on every process of a lockstep run
        own = np.random.default_rng((29, self.step, self.rank))
        choices = BUCKETS[int(common.choice(3, p=shares))]
        bucket = choices[int(common.integers(len(choices)))]
        count = bucket[0] * bucket[1]
        size = max(1, round(self.config.batch * 84 / (count + 20)))
        tokens, prompts = make_batch(own, bucket, size, pairs, self.config.empty_captions)
        generator = torch.Generator().manual_seed((self.step * 64 + self.rank) * 7 + 1)
        sigmas = draw_sigmas(size, count, generator)
        noise = torch.randn(tokens.shape, generator=generator)
        tokens, noise, sigmas = (t.to(self.device) for t in (tokens, noise, sigmas))
        with torch.no_grad():
            ids = [self.tokenizers.t5_ids(prompts), self.tokenizers.clip_ids(prompts)]
            states, pooled = encode(self.t5, self.clip, *(i.to(self.device) for i in ids))
        mix = sigmas[:, None, None]
        noised, wanted = (1 - mix) * tokens + mix * noise, noise - tokens
        places = image_ids(bucket[1], bucket[0], self.config.rope_short_side_tokens).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=fast_bf16(self.device)):
            predicted = velocity(self.model, noised, sigmas, states, pooled, places)
            if self._guiding(part):
                captioned = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
                wanted = wanted + self._further(noised, sigmas, states, pooled, places) * captioned[:, None, None]
        return (predicted.float() - wanted).square().mean(), size * self.world

    def _guiding(self, part: float) -> bool:
        """Whether guidance is being distilled; the first process freezes the teacher when it begins."""
        if part < self.config.guide_from or self.config.guide == 1:
            return False
        path = self.work / "teacher.pt"
        if self.teacher is None and self.rank == 0 and not path.exists():
            torch.save(self.average, path)
        if self.teacher is None and path.exists():
            self.teacher = build_flow(self.config).to(self.device).eval().requires_grad_(False)
            self.teacher.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
        return self.teacher is not None

    @torch.no_grad()
    def _further(self, noised: Tensor, sigmas: Tensor, states: Tensor, pooled: Tensor, places: Tensor) -> Tensor:
        """What guidance adds to the velocity, by the teacher: (guide - 1) * (captioned - uncaptioned).  # [B, N, 64]"""
        ids = [self.tokenizers.t5_ids([""]), self.tokenizers.clip_ids([""])]
        empty, empty_pooled = encode(self.t5, self.clip, *(i.to(self.device) for i in ids))
        both_states = torch.cat([states, empty.expand_as(states)])
        both_pooled = torch.cat([pooled, empty_pooled.expand_as(pooled)])
        assert self.teacher is not None
        both = velocity(self.teacher, noised.repeat(2, 1, 1), sigmas.repeat(2), both_states, both_pooled, places)
        captioned, uncaptioned = both.float().chunk(2)
        return (self.config.guide - 1) * (captioned - uncaptioned)

    def update(self, scale: float) -> None:
        """Average the gradients over processes and step both optimisers."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= self.world
            for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * scale
        self.adamw.step()
        self.muon.step(self.config.matrix_lr * scale)
        self.model.zero_grad(set_to_none=True)
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [current[k] for k in self.average], 1 - decay)

    def run(self, minutes: float, assistant: Assistant | None = None, save_every_s: float = 90) -> None:
        """Train until `minutes` of training, over all runs together, are spent."""
        total_s = minutes * 60
        before = last_save = last_log = time.time()
        while self.spent_s < total_s:
            part = self._agree(self.spent_s / total_s)
            falling = max(0.0, (1 - part) / (1 - self.config.decay_from))
            loss, size = self.losses(part)
            loss.backward()
            if assistant is not None:
                size += assistant.take_in(self.model, size, part)
            self.update(min(1.0, (self.step + 1) / 100, falling))
            self.step += 1
            self.pictures += size
            self.loss += 0.02 * (loss.item() - self.loss)
            now = time.time()
            self.spent_s = self._agree(self.spent_s + now - before)
            before = now
            if self.rank == 0 and now - last_log > 20:
                last_log = now
                log = {"step": self.step, "part": round(part, 4), "loss": round(self.loss, 4)}
                log |= {"pictures": self.pictures, "spent_s": round(self.spent_s)}
                print(json.dumps(log), flush=True)
            if self._agree(now - last_save) > save_every_s:
                last_save = now
                self.save()
        self.save()

    def _agree(self, value: float) -> float:
        """The first process's value, so that all take the same decisions."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)
