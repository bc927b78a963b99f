"""Prompt encoding for all families with CLIP text encoders: chunks of 75 tokens, weights, clip skip.

Prompts have the grammar of :mod:`.emphasis`, in training, previews and generation alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .emphasis import CHUNK_TOKENS, Chunk, layout, weigh


def chunk_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return token ids (B, n, 77); see :func:`chunk_tokens`."""
    return chunk_tokens(tokenizer, prompts)[0]


def chunk_tokens(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and weights, each (B, n, 77): n chunks of up to 75 tokens between BOS and EOS, padded.

    Prompts shorter than the longest get chunks of the empty prompt, as A1111's WebUI pads them. BOS, EOS
    and padding have weight 1.
    """

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    commas = tokenize(",")
    comma = commas[0] if len(commas) == 1 else None
    chunks = [layout(prompt, tokenize, comma) for prompt in prompts]
    most = max(len(prompt_chunks) for prompt_chunks in chunks)
    padded = [prompt_chunks + [Chunk((), ())] * (most - len(prompt_chunks)) for prompt_chunks in chunks]
    ids = torch.tensor([[_wrap(tokenizer, chunk.ids) for chunk in prompt_chunks] for prompt_chunks in padded])
    weights = torch.tensor([[_wrap_weights(chunk) for chunk in prompt_chunks] for prompt_chunks in padded])
    return ids, weights


def count_chunks(tokenizer: Any, prompt: str) -> int:
    """Return how many chunks of 75 tokens a prompt is encoded in."""
    return chunk_ids(tokenizer, [prompt]).shape[1]


def weigh_states(states: Tensor, weights: Tensor) -> Tensor:
    """Apply the weights (B, n, 77) of a prompt's tokens to its states (B, 77 n, width), chunk by chunk."""
    flat = states.reshape(-1, weights.shape[-1], states.shape[-1])
    return weigh(flat, weights.reshape(-1, weights.shape[-1])).reshape(states.shape)


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
    """Encode ids (B, n, 77) to the states of the last layer but one, without final norm, chunk by chunk.

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
    # found here, not by transformers: some configs name an end token that the tokenizer does not produce
    ends = (ids[:, 0] == eos_token_id).int().argmax(dim=-1)
    first = output.last_hidden_state.reshape(batch, chunks, length, -1)[:, 0]
    return states, encoder.text_projection(first[torch.arange(batch, device=ids.device), ends])


def checkpoint_text_encoder(encoder: Any, enabled: bool) -> None:
    """Switch gradient checkpointing of a transformers model on or off, under its old or new name."""
    prefix = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    if enabled == bool(getattr(encoder, f"is_{prefix}_checkpointing")):
        return
    if (
        enabled
    ):  # non-reentrant: the other kind needs inputs with gradients, which a frozen encoder does not have
        getattr(encoder, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(encoder, f"{prefix}_checkpointing_disable")()


def _wrap(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(ids))
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]


def _wrap_weights(chunk: Chunk) -> list[float]:
    return [1.0, *chunk.weights, *[1.0] * (CHUNK_TOKENS + 1 - len(chunk.ids))]
