"""Stable Diffusion 1.x: one CLIP text encoder, a U-Net with cross-attention, a KL autoencoder.

Also the layout of the mini base, whose smaller sizes all come from its component configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ..diffusion import NoiseProcess, PredictionType
from .base import BaseModelInfo, Conditioning, DiffusionModel, FamilyInfo, Posterior, SizeHint
from .clip import checkpoint_text_encoder, chunk_ids, encode_chunks
from .fingerprint import module_fingerprint

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_LINEAR = (*_ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
_CONVOLUTIONS = (
    ".conv1",
    ".conv2",
    ".conv_shortcut",
    ".time_emb_proj",
    ".downsamplers.0.conv",
    ".upsamplers.0.conv",
)
_TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


class StableDiffusion1(DiffusionModel):
    """A loaded SD1-layout base; see :class:`DiffusionModel` for what the methods mean."""

    info = FamilyInfo(
        name="sd1",
        title="Stable Diffusion 1.x",
        targets={
            "unet": {"attention": _ATTENTION, "linear": _LINEAR, "all": _LINEAR + _CONVOLUTIONS},
            # q, k, v and out must be trained together: partial attention is lossy in WebUI and diffusers
            "text_encoder": {"attention": _TEXT[:4], "linear": _TEXT, "all": _TEXT},
        },
        file_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        unet_naming="diffusers",
        base_model_version="sd_v1",
        is_v2=False,
        architecture="stable-diffusion-v1/lora",
        webui_version="SD1",
    )

    def __init__(
        self,
        base: BaseModelInfo,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler_config: Mapping[str, Any],
        *,
        prediction_type: PredictionType | None = None,
        clip_skip: int = 1,
    ) -> None:
        self.base = base
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.clip_skip = clip_skip
        self.process = NoiseProcess.from_betas(
            scheduler_config["beta_start"],
            scheduler_config["beta_end"],
            scheduler_config["beta_schedule"],
            scheduler_config.get("num_train_timesteps", 1000),
            prediction_type or scheduler_config.get("prediction_type", "epsilon"),
        )
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()

    @property
    def _vae_factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def native_resolution(self) -> int:
        return int(self.unet.config.sample_size) * self._vae_factor

    @property
    def size_multiple(self) -> int:
        return self._vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    def components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def encoder_fingerprint(self, which: Literal["images", "captions"]) -> str:
        if which == "images":
            return module_fingerprint(self.vae.encoder, extra=f"quant={self.vae.config.use_quant_conv}")
        return module_fingerprint(
            self.text_encoder,
            extra=f"skip={self.clip_skip} tokens={sorted(self.tokenizer.get_vocab().items())}",
        )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Posterior:
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return Posterior(distribution.mean.float().cpu(), distribution.logvar.float().cpu())

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        unscaled = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(unscaled).sample.float().clamp(-1.0, 1.0)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        ids = chunk_ids(self.tokenizer, captions).to(self.text_encoder.device)
        return {"states": encode_chunks(self.text_encoder, ids, self.clip_skip)}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> Tensor:
        states = text["states"].to(self.device, self.dtype)
        output = self.unet(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=states,
            return_dict=False,
        )
        return output[0].float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self._vae_factor
        return int(self.unet.config.in_channels), height // factor, width // factor

    def prepare(
        self, *, training: bool, gradient_checkpointing: bool = False, keep_text: bool = True
    ) -> None:
        # Measured on 2 AMX cores: the backward of torch's fused attention in bf16 takes 37 % of a step
        # there; the classic bmm-softmax-bmm makes training 1.7x faster. Forward alone is as fast fused.
        classic = self.device.type == "cpu" and self.dtype == torch.bfloat16 and training
        self.unet.set_attn_processor(AttnProcessor() if classic else AttnProcessor2_0())
        # checkpointing acts only in train mode; nothing else differs (all dropout rates are zero)
        for module in (self.unet, self.text_encoder):
            module.train(training)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        checkpoint_text_encoder(self.text_encoder, gradient_checkpointing)
        self.vae.to("cpu" if training else self.device)
        self.text_encoder.to(self.device if keep_text or not training else "cpu")

    @property
    def device(self) -> torch.device:
        return torch.device(self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        # the U-Net's own weights: adapters inside it may be kept in another format
        return self.unet.conv_in.weight.dtype
