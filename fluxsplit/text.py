"""Prompt → conditioning: T5 and CLIP loaded, used, dropped.

Both compute in fp32, whatever their weights are stored in, as ComfyUI does; T5 overflows in fp16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fluxsplit import prompts
from fluxsplit.checkpoint import Part
from fluxsplit.errors import FluxsplitError
from fluxsplit.lean_import import without
from fluxsplit.weights import WeightFiles, fill

with without("accelerate", "scipy", "torchvision", "peft", "PIL"):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

T5_MIN_TOKENS = 256
"""ComfyUI pads to 256 for dev and schnell alike (`comfy/text_encoders/flux.py`)."""
T5_END, T5_PAD = 1, 0
CLIP_L_HEAD = 64
"""Width of a head of CLIP-L; the file does not tell."""
MAX_TOKENS = 8192


class T5:
    """A T5 encoder with its weights and tokenizer."""

    def __init__(self, part: Part, tokenizer: str, files: WeightFiles, device: torch.device) -> None:
        """Build from `part` (kind `t5`); `tokenizer` is the path of its tokenizer.json."""
        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._min_tokens = int(part.config.get("min_length", T5_MIN_TOKENS))
        self._device = device
        with torch.device("meta"):
            self._model = T5EncoderModel(T5Config(**_t5_dimensions(part)))
        # one table under two names: filled once, then tied by hand (transformers 5 may not, transformers#48154)
        self._model.encoder.set_input_embeddings(nn.Identity())
        fill(self._model, part, files, torch.float32, device)
        self._model.set_input_embeddings(self._model.shared)

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        """Hidden states [1, T, D], fp32, T at least the minimum length; emphasised tokens are moved away from empty."""
        tokens = prompts.t5_tokens(prompt, self._ids, T5_END, T5_PAD, self._min_tokens)
        if len(tokens) > MAX_TOKENS:
            raise FluxsplitError(f"the prompt has {len(tokens)} tokens, the most is {MAX_TOKENS}", "shorten it")
        states = self._run([token.id for token in tokens])
        weights = torch.tensor([token.weight for token in tokens], device=self._device)
        if bool((weights != 1).any()):
            empty = self._run([T5_END] + [T5_PAD] * (len(tokens) - 1))
            moved = empty + (states - empty) * weights[:, None]
            states = torch.where((weights != 1)[:, None], moved, states)
        return states

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids[:-1]

    def _run(self, ids: list[int]) -> torch.Tensor:
        states: torch.Tensor = self._model(input_ids=torch.tensor([ids], device=self._device)).last_hidden_state
        return states


class Clip:
    """A CLIP text encoder with its weights and tokenizer."""

    def __init__(self, part: Part, tokenizer: str, files: WeightFiles, device: torch.device) -> None:
        """Build from `part` (kind `clip`); `tokenizer` is the folder of its vocab.json and merges.txt."""
        folder = Path(tokenizer)
        self._tokenizer: Any = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        self._device = device
        dimensions = _clip_dimensions(part)
        self._length = dimensions["max_position_embeddings"]
        config = CLIPTextConfig(
            **dimensions, bos_token_id=self._tokenizer.bos_token_id, eos_token_id=self._tokenizer.eos_token_id
        )
        with torch.device("meta"):
            self._model = CLIPTextModel(config)
        fill(self._model, part, files, torch.float32, device)
        # a buffer that no file holds
        self._model.embeddings.position_ids = torch.arange(self._length, device=device).expand(1, -1)

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        """Pooled output [1, P], fp32: the state of the first section's end token after the final norm, unprojected."""
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        ids = prompts.clip_first_section(prompt, self._ids, start, end, self._length)
        pooled: torch.Tensor = self._model(input_ids=torch.tensor([ids], device=self._device)).pooler_output
        return pooled

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids[1:-1]


def _t5_dimensions(part: Part) -> dict[str, Any]:
    vocabulary, width = part.shape("shared.weight")
    block = "encoder.block.0.layer"
    buckets, heads = part.shape(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    inner = part.shape(f"{block}.0.SelfAttention.q.weight")[0]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": part.shape(f"{block}.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": part.count("encoder.block.%d."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def _clip_dimensions(part: Part) -> dict[str, Any]:
    vocabulary, width = part.shape("embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": part.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": part.count("encoder.layers.%d."),
        "num_attention_heads": int(part.config.get("num_attention_heads", max(1, width // CLIP_L_HEAD))),
        "max_position_embeddings": part.shape("embeddings.position_embedding.weight")[0],
        "hidden_act": str(part.config.get("hidden_act", "quick_gelu")),
    }
