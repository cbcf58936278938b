"""diffusers over the same file by its own means: from_single_file, then group offloading where there is a card.

Run as a process of its own by `bench.py`; prints one JSON line for each step, then exits. FP8 is asked for as diffusers
offers it (`enable_layerwise_casting`) where `--layerwise` is given; else the weights become the compute dtype.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from fluxsplit import checkpoint
from fluxsplit.checkpoint import Part
from fluxsplit.device import DTYPES, pick_device


def config_of(part: Part) -> dict[str, Any]:
    """diffusers' configuration of the model in the file, whose depth may be reduced."""
    head = part.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": part.shape("x_embedder.weight")[1],
        "num_layers": part.count("transformer_blocks.%d."),
        "num_single_layers": part.count("single_transformer_blocks.%d."),
        "attention_head_dim": head,
        "num_attention_heads": part.shape("x_embedder.weight")[0] // head,
        "joint_attention_dim": part.shape("context_embedder.weight")[1],
        "pooled_projection_dim": part.shape("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": checkpoint.variant_of(part) == "dev",
    }


def load(path: Path, dtype: torch.dtype, device: torch.device, layerwise: bool) -> Any:
    """diffusers' model, loaded and offloaded by diffusers."""
    part = checkpoint.part(path, "transformer")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(part)))
        model = FluxTransformer2DModel.from_single_file(str(path), config=folder, torch_dtype=dtype)
    if layerwise:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if device.type == "cuda":
        model.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
    return model.eval()


def inputs_of(config: Any, size: tuple[int, int], text_tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A random latent and conditioning, as the model's forward takes them."""
    rows, columns = size[1] // 16, size[0] // 16
    grid = torch.arange(rows * columns)
    image_ids = torch.stack([torch.zeros_like(grid), grid // columns, grid % columns], dim=1).float()
    random = torch.Generator().manual_seed(0)
    tensors = {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, generator=random),
        "encoder_hidden_states": torch.randn(1, text_tokens, config.joint_attention_dim, generator=random) * 0.1,
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=random),
    }
    sent = {name: value.to(device, dtype) for name, value in tensors.items()}
    sent |= {"img_ids": image_ids.to(device), "txt_ids": torch.zeros(text_tokens, 3, device=device)}
    if config.guidance_embeds:
        sent["guidance"] = torch.tensor([3.5], device=device, dtype=dtype)
    return sent


@torch.inference_mode()
def main() -> None:
    """Load, step, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--text-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--layerwise", action="store_true")
    args = parser.parse_args()
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    model = load(args.path, dtype, device, args.layerwise)
    sent = inputs_of(model.config, (args.width, args.height), args.text_tokens, dtype, device)
    for step in range(args.steps):
        wall_s, cpu_s = time.monotonic(), time.process_time()
        output = model(timestep=torch.tensor([1.0 - step / args.steps], device=device, dtype=dtype), **sent)[0]
        finite = bool(output.isfinite().all())
        used = {"step_s": time.monotonic() - wall_s, "step_cpu_s": time.process_time() - cpu_s, "finite": finite}
        if device.type == "cuda":
            used |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        print(json.dumps(used), flush=True)


if __name__ == "__main__":
    main()
