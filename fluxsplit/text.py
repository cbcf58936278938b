"""Prompt → conditioning: T5 and CLIP loaded, used, dropped.

Both compute in fp32, whatever their weights are stored in, as ComfyUI does; T5 overflows in fp16.

T5-XXL is 4.8 GB in float8 and would be 19 GB in fp32. So its blocks come and go like the transformer's: the forward
over them is ours, every prompt goes through a block before the next is brought in, and of a block a piece of one
matrix at a time is expanded. Each block is read once for all prompts of a command. Of the embedding table only the
rows of the prompts' tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fluxsplit import prompts
from fluxsplit.checkpoint import Part
from fluxsplit.errors import FluxsplitError
from fluxsplit.lean_import import without
from fluxsplit.loading import EveryBlockThere, Loader
from fluxsplit.stored_layers import fill
from fluxsplit.text_plan import SCRATCH_BYTES
from fluxsplit.weights import WeightFiles

try:
    with without("accelerate", "scipy", "sklearn", "torchvision", "peft", "PIL"):
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
except ImportError:  # something that it found cannot be without one of these
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

T5_MIN_TOKENS = 256
"""ComfyUI pads to 256 for dev and schnell alike (`comfy/text_encoders/flux.py`)."""
T5_END, T5_PAD = 1, 0
CLIP_L_HEAD = 64
"""Width of a head of CLIP-L; the file does not tell."""
MAX_TOKENS = 8192


def _ignore(done: int, total: int) -> None:
    """Nobody wants to know."""


def _is_weighted(tokens: Sequence[prompts.Token]) -> bool:
    return any(token.weight != 1 for token in tokens)


class T5Tokens:
    """What prompts are to T5."""

    def __init__(self, part: Part, tokenizer: str) -> None:
        """For the encoder in `part` (kind `t5`); `tokenizer` is the path of its tokenizer.json."""
        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._min_tokens = int(part.config.get("min_length", T5_MIN_TOKENS))

    def of(self, prompt: str) -> list[prompts.Token]:
        """The tokens of a prompt, padded to the minimum length; raises FluxsplitError for over `MAX_TOKENS`."""
        tokens = prompts.t5_tokens(prompt, self._ids, T5_END, T5_PAD, self._min_tokens)
        if len(tokens) > MAX_TOKENS:
            raise FluxsplitError(f"the prompt has {len(tokens)} tokens, the most is {MAX_TOKENS}", "shorten it")
        return tokens

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids[:-1]


class T5:
    """A T5 encoder with its weights and tokenizer."""

    def __init__(self, part: Part, tokens: T5Tokens, files: WeightFiles, device: torch.device) -> None:
        """Build from `part` (kind `t5`)."""
        self._tokens, self.device = tokens, device
        with torch.device("meta"):
            self._model = T5EncoderModel(T5Config(**_t5_dimensions(part)))
        # one table under two names: filled once, then tied by hand (transformers 5 may not, transformers#48154)
        self._model.encoder.set_input_embeddings(nn.Identity())
        fill(self._model, part, files, torch.float32, device, SCRATCH_BYTES)
        self.blocks = tuple(self._model.encoder.block)
        self.loader: Loader = EveryBlockThere()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], on_block: Callable[[int, int], None] = _ignore) -> list[torch.Tensor]:
        """Hidden states [1, T, D] of each prompt, T at least the minimum length: fp32, on the CPU.

        All in one pass over the blocks. Emphasised tokens are moved away from those of an empty prompt. `on_block` is
        told blocks done and their number.
        """
        tokens = [self._tokens.of(text) for text in texts]
        ids = [tuple(token.id for token in line) for line in tokens]
        empties = {len(line): (T5_END, *[T5_PAD] * (len(line) - 1)) for line in tokens if _is_weighted(line)}
        wanted = list(dict.fromkeys([*ids, *empties.values()]))
        states = dict(zip(wanted, self._run(wanted, on_block), strict=True))
        return [
            self._moved(states[own], states[empties[len(line)]], line) if _is_weighted(line) else states[own]
            for own, line in zip(ids, tokens, strict=True)
        ]

    def _moved(self, states: torch.Tensor, empty: torch.Tensor, tokens: Sequence[prompts.Token]) -> torch.Tensor:
        weights = torch.tensor([token.weight for token in tokens])[:, None]
        return torch.where(weights != 1, empty + (states - empty) * weights, states)

    def _run(self, lines: Sequence[tuple[int, ...]], on_block: Callable[[int, int], None]) -> list[torch.Tensor]:
        """The encoder over each line of token ids, a batch of one each (`T5Stack.forward` of transformers)."""
        encoder = self._model.encoder
        states = [self._model.shared(torch.tensor([line], device=self.device)) for line in lines]
        biases: dict[int, torch.Tensor] = {}  # by length: of relative positions, made by the first block for all
        for number, block in enumerate(self.blocks):
            with self.loader.brought_in(number):
                for i, line in enumerate(lines):
                    states[i], bias, *_ = block(states[i], position_bias=biases.get(len(line)))
                    biases.setdefault(len(line), bias)
            on_block(number + 1, len(self.blocks))
        return [encoder.final_layer_norm(states.pop(0)).cpu() for _ in lines]  # one after the other leaves the card


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
