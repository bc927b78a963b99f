"""What families share that denoise the latents of a KL autoencoder and have CLIP text encoders.

That is: where modules are, and how images and captions are encoded. A family adds its facts, how its text
encoders are used, how its denoiser is called, and its noise process.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..devices import is_out_of_memory, onto
from ..diffusion.process import NoiseProcess
from .attention import Attentions
from .banded import BandedAutoencoder, can_be_banded
from .base import (
    BaseModelInfo,
    Conditioning,
    DiffusionModel,
    LatentSpace,
    ModelFacts,
    Posterior,
    stack_conditioning,
)
from .clip import checkpoint_text_encoder, chunk_tokens, count_chunks, encode_chunks, weigh_states
from .facts import AUTOENCODER
from .fingerprint import module_fingerprint
from .offload import OffloadedBlocks, blocks_to_offload, move
from .visiting import Visit, visiting

_WHOLE = 512  # px; decoding a square of this side as a whole takes some 0.7 GiB
TEXT_LINEAR = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
# q, k, v and out must be trained together: partial attention is lossy in WebUI and diffusers
TEXT_TARGETS = {"attention": TEXT_LINEAR[:4], "linear": TEXT_LINEAR, "all": TEXT_LINEAR}


@dataclass(frozen=True)
class Parts:
    """The components of a loaded base.

    Attributes:
        denoiser: a model of diffusers, e.g. ``UNet2DConditionModel``.
        vae: ``AutoencoderKL``.
        text_encoders: component name -> transformers' CLIP text model.
        tokenizers: the same names -> its tokenizer.
    """

    denoiser: Any
    vae: Any
    text_encoders: Mapping[str, Any]
    tokenizers: Mapping[str, Any]


class LatentModel(DiffusionModel):
    """A loaded base; see :class:`DiffusionModel` for what the methods mean."""

    def __init__(
        self,
        base: BaseModelInfo,
        parts: Parts,
        process: NoiseProcess,
        *,
        settings: ModelConfig,
        device: torch.device,
        attention: Attentions,
        offload: bool = False,
        encoders_wait: bool = False,
    ) -> None:
        self.base, self.process, self.settings = base, process, settings
        self.denoiser, self.vae = parts.denoiser, parts.vae
        self.text_encoders, self.tokenizers = dict(parts.text_encoders), dict(parts.tokenizers)
        self.attention = attention
        factor = vae_factor(self.vae)
        self.facts = ModelFacts(
            native_resolution=int(self.denoiser.config.sample_size) * factor,
            size_multiple=factor * self._latent_multiple(),
            latents=LatentSpace(
                int(self.denoiser.config.in_channels),
                factor,
                float(self.vae.config.scaling_factor),
                float(self.vae.config.shift_factor or 0.0),
            ),
            device=device,
            dtype=next(self.denoiser.parameters()).dtype,  # adapters inside it may be kept in another format
        )
        self._offload = offload
        self._taking_turns = offload or encoders_wait
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            module.requires_grad_(False).eval()
        self._lean = False
        self._visits: dict[int, Visit] = {}
        self._offloaded: OffloadedBlocks | None = None
        # for small cards: decoding takes the most memory of all
        self._whole_px = math.inf
        if offload:
            self.work_in_bands(_WHOLE)

    @classmethod
    @abstractmethod
    def make_process(
        cls, scheduler: Mapping[str, Any], prediction: str, *, ends_in_noise: bool
    ) -> NoiseProcess:
        """Return the noise process that a base was trained with.

        Args:
            scheduler: config of the scheduler in its folder.
            prediction: name of the prediction type.
            ends_in_noise: whether the schedule is rescaled to end in pure noise.
        """

    def _latent_multiple(self) -> int:
        """Return the number that the sides of latents must be multiples of."""
        raise NotImplementedError

    def _set_attention(self, *, training: bool) -> None:
        """Make the denoiser compute its attention the chosen way; by default it keeps torch's own."""

    def components(self) -> Mapping[str, nn.Module]:
        return {self.info.denoiser.component: self.denoiser, **self.text_encoders, AUTOENCODER: self.vae}

    def encoder_fingerprint(self, which: Literal["images", "captions"]) -> str:
        if which == "images":
            quantisation = self.vae.quant_conv  # the encoder's last layer, which some autoencoders lack
            last = module_fingerprint(quantisation) if quantisation is not None else "none"
            # bands and the whole agree but for rounding, so what one encoded is not the other's
            bands = "" if math.isinf(self._whole_px) else f" bands above {self._whole_px} px"
            return module_fingerprint(self.vae.encoder, extra=f"quant={last}{bands}")
        prints = [
            module_fingerprint(
                encoder,
                extra=f"{name} skip={self.settings.clip_skip} pad={self.tokenizers[name].pad_token_id} "
                f"tokens={sorted(self.tokenizers[name].get_vocab().items())}",
            )
            for name, encoder in self.text_encoders.items()
        ]
        return " ".join([self.info.name, *prints])

    def work_in_bands(self, above: int) -> None:
        """Encode and decode images of more than ``above`` x ``above`` px band by band (:mod:`.banded`).

        An autoencoder of a build that cannot be divided keeps working on the whole.
        """
        if can_be_banded(self.vae):
            self._whole_px = above * above

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Posterior:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        with self._working(*self._half("encoder")):
            device = next(self.vae.encoder.parameters()).device
            if math.prod(pixels.shape[2:]) > self._whole_px:
                moments = BandedAutoencoder(self.vae).encode(pixels.to(dtype=self.vae.dtype))
                distribution = DiagonalGaussianDistribution(moments)
            else:
                distribution = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist
        mean, logvar = distribution.mean.float(), distribution.logvar.float()
        return Posterior(mean, logvar) if mean.is_meta else Posterior(mean.cpu(), logvar.cpu())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        with self._working(*self._half("decoder")):
            device = next(self.vae.decoder.parameters()).device
            unscaled = self.facts.latents.unscaled(latents.to(device, self.vae.dtype))
            # one at a time: decoding takes more memory than all else, and a batch is no faster
            images = [self._decode(latent[None]) for latent in unscaled]
        return torch.cat(images).float().clamp(-1.0, 1.0)

    def _half(self, name: str) -> tuple[nn.Module, ...]:
        """Return the half of the autoencoder that encodes or decodes, and its layer beside the latents."""
        beside = self.vae.quant_conv if name == "encoder" else self.vae.post_quant_conv
        return (getattr(self.vae, name), *(() if beside is None else (beside,)))

    def _decode(self, unscaled: Tensor) -> Tensor:
        if math.prod(unscaled.shape[2:]) * vae_factor(self.vae) ** 2 > self._whole_px:
            return BandedAutoencoder(self.vae).decode(unscaled)
        try:
            image: Tensor = self.vae.decode(unscaled).sample
            return image
        except Exception as error:
            if not can_be_banded(self.vae) or not is_out_of_memory(error):
                raise
            warnings.warn(
                "not enough memory to decode a whole image: from now on they are decoded in bands, which "
                "takes longer",
                stacklevel=2,
            )
            self.work_in_bands(0)
        torch.cuda.empty_cache()
        return BandedAutoencoder(self.vae).decode(unscaled)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        groups: dict[int, list[int]] = {}  # by length: padding to another caption's length changes the states
        tokenizer = next(iter(self.tokenizers.values()))
        for row, caption in enumerate(captions):
            groups.setdefault(count_chunks(tokenizer, caption), []).append(row)
        with self._working(*self.text_encoders.values()):
            if len(groups) == 1:
                return self._encode_text(captions)
            encoded: dict[int, Conditioning] = {}
            for rows in groups.values():
                together = self._encode_text([captions[row] for row in rows])
                encoded |= {row: {n: t[i] for n, t in together.items()} for i, row in enumerate(rows)}
        return stack_conditioning([encoded[row] for row in range(len(captions))])

    def _encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Return what :meth:`encode_text` returns; the text encoders are on their device by then."""
        raise NotImplementedError

    def prepare(
        self,
        *,
        training: bool,
        gradient_checkpointing: bool = False,
        keep_text: bool = True,
        keep_images: bool = False,
        lean: bool = False,
    ) -> None:
        self._set_attention(training=training)
        # checkpointing acts only in train mode; nothing else differs (all dropout rates are zero)
        for module in (self.denoiser, *self.text_encoders.values()):
            module.train(training)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        else:
            self.denoiser.disable_gradient_checkpointing()
        for encoder in self.text_encoders.values():
            checkpoint_text_encoder(encoder, gradient_checkpointing)
        self._lean = lean and not training
        if not self._offload and self.facts.device.type != "meta":  # a blueprint has nothing to move
            self._only(())
            self._taking_turns = False
            all_there = not training and not lean
            places = [(self.vae, keep_images or all_there), (self.denoiser, True)]
            places += [(encoder, keep_text or all_there) for encoder in self.text_encoders.values()]
            for module, there in sorted(places, key=lambda place: place[1]):  # make room first
                if module is self.denoiser and self._offloaded is not None:
                    move(module, self.facts.device)
                else:
                    module.to(self.facts.device if there else "cpu")

    def offload_blocks(self, count: int) -> None:
        """Keep the weights of the ``count`` largest blocks of the denoiser in main memory (:mod:`.offload`).

        To be called before anything is put into the denoiser, which is not on the device yet.
        """
        assert self._offloaded is None, "blocks are offloaded once"
        blocks = blocks_to_offload(self.denoiser, count)
        self._offloaded = OffloadedBlocks(blocks, self.facts.device) if blocks else None

    @contextmanager
    def _working(self, *modules: nn.Module) -> Iterator[None]:
        """Have modules on the device: no others if they take turns, within the block if lean, else as is."""
        if self._taking_turns:
            self._only(modules)
        visitors = [
            m for m in modules if self._lean and next(m.parameters()).device.type != self.facts.device.type
        ]
        with visiting(visitors, self.facts.device):
            yield

    def _only(self, modules: Sequence[nn.Module]) -> None:
        """Have these modules and no others on the device; they stay there until others are needed."""
        wanted = {id(module) for module in modules}
        for key in [key for key in self._visits if key not in wanted]:
            self._visits.pop(key).end_with_guests()
        for module in modules:
            if id(module) not in self._visits:
                self._visits[id(module)] = Visit(module, self.facts.device)


def vae_factor(vae: Any) -> int:
    """Return how many px of an image's side one latent stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def one_encoder_states(model: LatentModel, captions: Sequence[str]) -> Tensor:
    """Return the states of the only text encoder with its final norm applied, (B, 77 n, width)."""
    (name, encoder), *_ = model.text_encoders.items()
    ids, weights = chunk_tokens(model.tokenizers[name], captions)
    return weigh_states(encode_chunks(encoder, onto(ids, encoder.device), model.settings.clip_skip), weights)
