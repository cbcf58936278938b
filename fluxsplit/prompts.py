"""Prompt text → weighted token ids, as ComfyUI reads it.

Parentheses are emphasis: `(red)` weighs 1.1, `((red))` 1.21, `(red:1.3)` 1.3, and `\\(` is a literal parenthesis.
They are stripped before tokenising, and every segment of its own weight is tokenised by itself, which changes the
ids at its edges (ComfyUI `comfy/sd1_clip.py`, v0.3.64). A word that would run over the end of a CLIP section starts
the next one, unless it is 8 tokens or longer, which is split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxsplit.errors import FluxsplitError

EMPHASIS = 1.1
LONG_SEGMENT_TOKENS = 8
MAX_DEPTH = 100
_LITERAL = {"\\(": "\ue000", "\\)": "\ue001"}  # private use: stands in while parentheses are parsed
_UNESCAPED = {"\ue000": "(", "\ue001": ")"}

Tokenize = Callable[[str], list[int]]
"""Text → ids without the start and end tokens."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token id and how much its effect is multiplied."""

    id: int
    weight: float = 1.0


def weighted_segments(text: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight), parentheses resolved and escapes undone."""
    for escape, stand_in in _LITERAL.items():
        text = text.replace(escape, stand_in)
    segments = _resolve(text, 1.0, MAX_DEPTH)
    for stand_in, literal in _UNESCAPED.items():
        segments = [(part.replace(stand_in, literal), weight) for part, weight in segments]
    return [(part, weight) for part, weight in segments if part]


def _resolve(text: str, weight: float, depth: int) -> list[tuple[str, float]]:
    if depth == 0:
        raise FluxsplitError(f"the prompt nests parentheses more than {MAX_DEPTH} deep", "write \\( for a literal one")
    segments: list[tuple[str, float]] = []
    for part in _top_level(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            segments.append((part, weight))
            continue
        inner, inner_weight = part[1:-1], weight * EMPHASIS
        before, colon, number = inner.rpartition(":")
        if colon and before:
            try:
                inner, inner_weight = before, float(number)
            except ValueError:
                inner = part[1:-1]
        segments += _resolve(inner, inner_weight, depth - 1)
    return segments


def _top_level(text: str) -> list[str]:
    """Cut at outermost parentheses, which stay with what they hold.

    Unbalanced ones go as in ComfyUI: after a stray `)` an opening one no longer starts a group until the count is
    back at zero, and an unclosed `(` stays in the text.
    """
    parts: list[str] = []
    begin = depth = 0
    for at, char in enumerate(text):
        if char == "(":
            if depth == 0:
                parts.append(text[begin:at])
                begin = at
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[begin : at + 1])
                begin = at + 1
    parts.append(text[begin:])
    return [part for part in parts if part]


def t5_tokens(text: str, tokenize: Tokenize, end: int, pad: int, min_length: int) -> list[Token]:
    """Tokens for T5: all of them, the end token, then padding up to `min_length`; never truncated."""
    tokens = [Token(i, weight) for part, weight in weighted_segments(text) for i in tokenize(part)]
    tokens.append(Token(end))
    return tokens + [Token(pad)] * (min_length - len(tokens))


def clip_first_section(text: str, tokenize: Tokenize, start: int, end: int, length: int) -> list[int]:
    """Ids [length] of the first section for CLIP, whose end token's state is all that Flux takes from it.

    Weights play no part in it: ComfyUI applies them to the sequence output only.
    """
    ids = [start]
    for part, _ in weighted_segments(text):
        group = tokenize(part)
        room = length - 1 - len(ids)
        if len(group) > room:
            if len(group) >= LONG_SEGMENT_TOKENS:
                ids += group[:room]
            break
        ids += group
    return ids + [end] * (length - len(ids))
