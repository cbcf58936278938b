"""Turn the packaged demo model back into training checkpoints, so that training can go on from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from demo_flow import FlowConfig, build_flow
from demo_muon import split_parameters
from demo_text import Tokenizers, build_encoders
from demo_vae import build_vae
from fluxsplit import checkpoint
from fluxsplit.weights import WeightFiles


def _load(module: nn.Module, path: str, kind: str) -> dict[str, Tensor]:
    files, shapes = WeightFiles(), module.state_dict()
    state = {
        name: files.stored(source).float().reshape(shapes[name].shape)
        for name, source in checkpoint.part(path, kind).sources.items()
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith(("position_ids", "embed_tokens.weight"))]
    if left or unexpected:
        raise ValueError(f"{kind}: missing {left}, unexpected {unexpected}")
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def unpack(demo: Path, work: Path, config: FlowConfig) -> str:
    """Write `text.pt`, `vae.pt` and `flow.pt` into `work` from the file in `demo`; existing ones are kept."""
    path = str(demo / "flux-demo.safetensors")
    written = []
    if not (work / "text.pt").exists():
        t5, clip = build_encoders(Tokenizers(demo / "tokenizers"))
        torch.save({"t5": _load(t5, path, "t5"), "clip": _load(clip, path, "clip")}, work / "text.pt")
        written.append("text.pt")
    if not (work / "vae.pt").exists():
        vae = build_vae()
        torch.save({"vae": _load(vae, path, "vae")}, work / "vae.pt")
        written.append("vae.pt")
    if not (work / "flow.pt").exists():
        model = build_flow(config)
        state = _load(model, path, "transformer")
        matrices, rest = split_parameters(model)
        torch.save(
            {
                "model": state,
                "ema": {name: tensor.clone() for name, tensor in state.items()},
                "adamw": torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01).state_dict(),
                "momenta": [torch.zeros_like(matrix) for matrix in matrices],
                "step": 0,
                "spent_s": 0.0,
                "pictures": 0,
                "config": asdict(config),
            },
            work / "flow.pt",
        )
        written.append("flow.pt")
    return f"{work}: {', '.join(written) or 'nothing was missing'}"
