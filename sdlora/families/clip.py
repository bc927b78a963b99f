"""Prompt encoding that all CLIP-conditioned families share: chunks of 75 tokens, clip skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 75


def chunk_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return token ids (B, n, 77): n chunks of up to 75 tokens, each wrapped BOS..EOS and padded.

    Captions shorter than the longest get chunks of the empty caption, as A1111's WebUI pads them.
    """
    all_chunks = [_chunks(tokenizer, caption) for caption in captions]
    most = max(len(chunks) for chunks in all_chunks)
    empty = _wrap(tokenizer, [])
    return torch.tensor([chunks + [empty] * (most - len(chunks)) for chunks in all_chunks])


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Return how many tokens a caption has, without BOS and EOS."""
    return len(tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)


def encode_chunks(encoder: Any, ids: Tensor, clip_skip: int) -> Tensor:
    """Encode ids (B, n, 77) to states (B, 77 n, width), each chunk by itself.

    ``clip_skip`` n takes the n-th last layer's output; the final layer norm is always applied, as
    A1111's WebUI does for SD1.
    """
    batch, chunks, length = ids.shape
    output = encoder(ids.reshape(batch * chunks, length), output_hidden_states=True)
    inner = getattr(encoder, "text_model", encoder)  # transformers >= 5.6 flattened CLIPTextModel
    states = inner.final_layer_norm(output.hidden_states[-clip_skip])
    return states.reshape(batch, chunks * length, -1)


def encode_penultimate(encoder: Any, ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor | None]:
    """Encode ids (B, n, 77) to the last layer but one, without final norm, each chunk by itself.

    Returns:
        states (B, 77 n, width), and the projected state (B, projection) of the first end token of the
        first chunk, or None for an encoder without projection.
    """
    batch, chunks, length = ids.shape
    flat = ids.reshape(batch * chunks, length)
    inner = getattr(encoder, "text_model", encoder)
    output = inner(flat, output_hidden_states=True)
    states = output.hidden_states[-2].reshape(batch, chunks * length, -1)
    if not hasattr(encoder, "text_projection"):
        return states, None
    # found here, not by transformers: some configs name an end token that the tokenizer does not write
    ends = (ids[:, 0] == eos_token_id).int().argmax(dim=-1)
    first = output.last_hidden_state.reshape(batch, chunks, length, -1)[:, 0]
    return states, encoder.text_projection(first[torch.arange(batch, device=ids.device), ends])


def checkpoint_text_encoder(encoder: Any, enabled: bool) -> None:
    """Switch gradient checkpointing of a transformers model on or off, under its old or new name."""
    prefix = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    if enabled == bool(getattr(encoder, f"is_{prefix}_checkpointing")):
        return
    if enabled:  # non-reentrant: the inputs of a frozen encoder need no gradient
        getattr(encoder, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(encoder, f"{prefix}_checkpointing_disable")()


def _chunks(tokenizer: Any, caption: str) -> list[list[int]]:
    ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
    parts = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
    return [_wrap(tokenizer, part) for part in parts or [[]]]


def _wrap(tokenizer: Any, ids: list[int]) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(ids))
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]
