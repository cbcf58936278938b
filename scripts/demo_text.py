"""Tokenizers and text encoders of the demo model, trained on captions alone.

A tiny T5 and a tiny CLIP learn to state the scene a caption describes: linear heads read every
attribute from CLIP's pooled vector, and per-token ones from the T5 states. The heads are dropped
and the encoders frozen, so the picture model gets disentangled conditioning from its first step
and text costs it no backward pass.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from captions import Tagged, caption, relation_names, to_text, vocabulary
from shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, random_scene

T5_LENGTH = 20
CLIP_LENGTH = 77
WIDTH = 96
FIELDS: dict[str, int] = {
    "count": 2,
    "relation": len(relation_names()),
    "background": len(BACKGROUNDS),
    "place": len(PLACES) + 1,
    "shape1": len(SHAPES),
    "colour1": len(COLOURS),
    "size1": len(SIZES),
    "shape2": len(SHAPES),
    "colour2": len(COLOURS),
    "size2": len(SIZES),
}
OWN_FIELDS = {"slot": 5, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}
IGNORE = -100


# -- tokenizers --------------------------------------------------------------------------------


def write_t5_tokenizer(path: Path) -> None:
    """A Unigram tokenizer of whole words in T5's layout; any other word becomes `<unk>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0), (",", -2.0), (".", -2.0)]
    pieces += [(f"▁{word}", -2.0) for word in vocabulary() if word.isalpha()]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    marker = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marker])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_clip_tokenizer(folder: Path) -> None:
    """Byte pairs in CLIP's layout: letters, digits, and the merges that make each word one id."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        if not word.isalpha() or len(word) == 1:
            continue
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while True:  # apply the merges there are, in order of rank, then add one
            for left, right in merges:
                parts = _merge(parts, left, right)
            if len(parts) == 1:
                break
            merges.append((parts[-2], parts[-1]))
            vocab.append(parts[-2] + parts[-1])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {piece: index for index, piece in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merge(parts: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and merged[-1] == left and part == right:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def load_clip_tokenizer(folder: Path) -> Tokenizer:
    """The saved byte pairs, split as the stock CLIP tokenizer splits."""
    bpe = BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


class Tokenizers:
    """Both tokenizers, turning prompts into padded id tensors."""

    def __init__(self, folder: Path) -> None:
        self.t5 = Tokenizer.from_file(str(folder / "t5xxl" / "tokenizer.json"))
        self.clip = load_clip_tokenizer(folder / "clip_l")
        self.clip_size = self.clip.get_vocab_size()
        self.t5_size = self.t5.get_vocab_size()
        self.clip_eos = self.clip_size - 1

    def t5_ids(self, prompts: list[str]) -> Tensor:
        """T5 ids with `</s>`, padded with 0.  # [B, T]"""
        rows = [self.t5.encode(prompt).ids for prompt in prompts]
        length = max(T5_LENGTH, *(len(row) for row in rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def clip_ids(self, prompts: list[str], length: int | None = None) -> Tensor:
        """CLIP ids between start and end, padded with the end id.  # [B, T]"""
        bos, eos = self.clip_eos - 1, self.clip_eos
        rows = [[bos, *self.clip.encode(p).ids[: CLIP_LENGTH - 2], eos] for p in prompts]
        length = length or max(len(row) for row in rows)
        return torch.tensor([row + [eos] * (length - len(row)) for row in rows])


# -- models ------------------------------------------------------------------------------------


def build_encoders(tokenizers: Tokenizers) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Untrained encoders in the stock architectures."""
    t5 = T5Config(
        vocab_size=tokenizers.t5_size,
        d_model=WIDTH,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    clip = CLIPTextConfig(
        vocab_size=tokenizers.clip_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizers.clip_eos - 1,
        eos_token_id=tokenizers.clip_eos,
        pad_token_id=tokenizers.clip_eos,
    )
    return T5EncoderModel(t5), CLIPTextModel(clip)


def encode(t5: T5EncoderModel, clip: CLIPTextModel, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """T5 states [B, T, D] and CLIP's pooled vector [B, D]; no masks, padding attends."""
    states = t5(input_ids=t5_ids, attention_mask=torch.ones_like(t5_ids)).last_hidden_state
    return states, clip(input_ids=clip_ids).pooler_output


# -- training ----------------------------------------------------------------------------------


def scene_labels(scene: Scene) -> dict[str, int]:
    """Class numbers of every attribute of a scene."""
    labels = {
        "count": len(scene.things) - 1,
        "relation": relation_names().index(scene.relation),
        "background": BACKGROUNDS.index(scene.background),
        "place": ("", *PLACES).index(scene.things[0].place),
    }
    for number in (1, 2):
        thing = scene.things[number - 1] if number <= len(scene.things) else None
        labels[f"shape{number}"] = SHAPES.index(thing.shape) if thing else IGNORE
        labels[f"colour{number}"] = COLOURS.index(thing.colour) if thing else IGNORE
        labels[f"size{number}"] = SIZES.index(thing.size) if thing else IGNORE
    return labels


def _token_labels(tagged: Tagged, labels: dict[str, int], length: int) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {name: [] for name in OWN_FIELDS}
    for _, slot in tagged:
        rows["slot"].append(slot)
        for name in ("shape", "colour", "size"):
            rows[name].append(labels[f"{name}{slot}"] if slot in (1, 2) else IGNORE)
    return {name: row + [IGNORE] * (length - len(row)) for name, row in rows.items()}


def _junk(rng: np.random.Generator, tagged: Tagged) -> Tagged:
    """Now and then a word nobody knows, so that one does not upset the encoders."""
    if rng.random() > 0.05:
        return tagged
    letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(3, 8)))
    word = "q" + "".join(chr(code) for code in letters)
    at = int(rng.choice((0, len(tagged))))
    return [*tagged[:at], (word, 0), *tagged[at:]]


def text_batch(
    rng: np.random.Generator, tokenizers: Tokenizers, size: int, test: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Ids for both encoders, the scenes' labels [B], and the T5 tokens' labels [B, T]."""
    prompts, labels, tagged_rows = [], [], []
    for _ in range(size):
        scene = random_scene(rng, int(rng.integers(1, 3)), test)
        tagged = caption(rng, scene)
        tagged = tagged if test else _junk(rng, tagged)
        prompts.append(to_text(tagged))
        labels.append(scene_labels(scene))
        tagged_rows.append(tagged)
    t5_ids = tokenizers.t5_ids(prompts)
    own = [_token_labels(tagged, row, t5_ids.shape[1]) for tagged, row in zip(tagged_rows, labels, strict=True)]
    whole = {name: torch.tensor([row[name] for row in labels]) for name in FIELDS}
    tokens = {name: torch.tensor([row[name] for row in own]) for name in OWN_FIELDS}
    return t5_ids, tokenizers.clip_ids(prompts), whole, tokens


class Heads(nn.Module):
    """Linear readers; they exist during pretraining only."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.ModuleDict({n: nn.Linear(WIDTH, c) for n, c in FIELDS.items()})
        self.padding = nn.ModuleDict({n: nn.Linear(WIDTH, c) for n, c in FIELDS.items()})
        self.own = nn.ModuleDict({n: nn.Linear(WIDTH, c) for n, c in OWN_FIELDS.items()})

    def losses(
        self,
        states: Tensor,
        pooled: Tensor,
        whole: dict[str, Tensor],
        tokens: dict[str, Tensor],
    ) -> Tensor:
        """Summed cross entropies over all heads."""
        total = states.new_zeros(())
        last = states[:, -1]  # [B, D], padding in nearly every row
        for name, target in whole.items():
            total = total + F.cross_entropy(self.pooled[name](pooled), target)
            total = total + 0.5 * F.cross_entropy(self.padding[name](last), target)
        for name, target in tokens.items():
            logits = self.own[name](states).flatten(0, 1)
            total = total + F.cross_entropy(logits, target.flatten())
        return total

    @torch.no_grad()
    def accuracy(
        self,
        states: Tensor,
        pooled: Tensor,
        whole: dict[str, Tensor],
        tokens: dict[str, Tensor],
    ) -> dict[str, float]:
        """Share of right answers per head."""
        scores = {}
        for name, target in whole.items():
            known = target != IGNORE
            guess = self.pooled[name](pooled).argmax(-1)
            scores[f"clip {name}"] = float((guess == target)[known].float().mean())
            guess = self.padding[name](states[:, -1]).argmax(-1)
            scores[f"t5 {name}"] = float((guess == target)[known].float().mean())
        for name, target in tokens.items():
            known = target != IGNORE
            guess = self.own[name](states).argmax(-1)
            scores[f"token {name}"] = float((guess == target)[known].float().mean())
        return scores


def train_text(work: Path, tokenizer_folder: Path, minutes: float, device: str) -> None:
    """Write the tokenizers, train both encoders for `minutes`, save them as `text.pt`."""
    write_t5_tokenizer(tokenizer_folder / "t5xxl" / "tokenizer.json")
    write_clip_tokenizer(tokenizer_folder / "clip_l")
    tokenizers = Tokenizers(tokenizer_folder)
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    t5, clip = build_encoders(tokenizers)
    heads = Heads()
    modules = nn.ModuleList([t5, clip, heads]).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.98))
    started, step = time.time(), 0
    while (part := (time.time() - started) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100, (1 - part) / 0.5)
        t5_ids, clip_ids, whole, tokens = _to(text_batch(rng, tokenizers, 128), device)
        states, pooled = encode(t5, clip, t5_ids, clip_ids)
        loss = heads.losses(states, pooled, whole, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text step {step} {part:.2f} loss {loss.item():.4f}", flush=True)
    t5_ids, clip_ids, whole, tokens = _to(text_batch(rng, tokenizers, 2000, test=True), device)
    with torch.no_grad():
        states, pooled = encode(t5, clip, t5_ids, clip_ids)
    scores = heads.accuracy(states, pooled, whole, tokens)
    print("held out:", json.dumps({k: round(v, 4) for k, v in scores.items()}), flush=True)
    state = {"t5": t5.state_dict(), "clip": clip.state_dict(), "scores": scores, "steps": step}
    torch.save(state, work / "text.pt")


def _to(
    batch: tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]], device: str
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    t5_ids, clip_ids, whole, tokens = batch
    whole = {name: value.to(device) for name, value in whole.items()}
    tokens = {name: value.to(device) for name, value in tokens.items()}
    return t5_ids.to(device), clip_ids.to(device), whole, tokens


def load_encoders(work: Path, tokenizers: Tokenizers) -> tuple[T5EncoderModel, CLIPTextModel]:
    """The pretrained encoders, frozen."""
    t5, clip = build_encoders(tokenizers)
    state = torch.load(work / "text.pt", weights_only=True)
    t5.load_state_dict(state["t5"])
    clip.load_state_dict(state["clip"])
    return t5.eval().requires_grad_(False), clip.eval().requires_grad_(False)
