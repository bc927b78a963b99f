"""What all families with a U-Net share: which layers get adapters, how it is called, the noise process.

A family adds its facts, how its text encoders are used, and further inputs of its U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..devices import onto
from ..diffusion.ddpm import DDPM
from .base import Conditioning, SizeHint
from .facts import DenoiserInfo
from .latent_model import LatentModel

UNET_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
UNET_LINEAR = (*UNET_ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
UNET_ALL = (
    *UNET_LINEAR,
    ".conv1",
    ".conv2",
    ".conv_shortcut",
    ".time_emb_proj",
    ".downsamplers.0.conv",
    ".upsamplers.0.conv",
)
UNET_TARGETS = {"attention": UNET_ATTENTION, "linear": UNET_LINEAR, "all": UNET_ALL}
UNET = DenoiserInfo(
    component="unet",
    title="U-Net",
    diffusers_class="UNet2DConditionModel",
    targets=UNET_TARGETS,
    file_prefix="lora_unet",
)
"""What all U-Nets have in common; each family adds what distinguishes its own."""


class UNetModel(LatentModel):
    """A loaded base; see :class:`sdlora.families.base.DiffusionModel` for what the methods mean."""

    @classmethod
    def make_process(cls, scheduler: Mapping[str, Any], prediction: str, *, ends_in_noise: bool) -> DDPM:
        return DDPM.from_betas(
            scheduler["beta_start"],
            scheduler["beta_end"],
            scheduler["beta_schedule"],
            scheduler.get("num_train_timesteps", 1000),
            prediction,
            zero_terminal_snr=ends_in_noise,
        )

    @property
    def unet(self) -> Any:
        """The denoiser, by its name in diffusers."""
        return self.denoiser

    def _latent_multiple(self) -> int:
        return int(2 ** (len(self.denoiser.config.block_out_channels) - 1))

    def _set_attention(self, *, training: bool) -> None:
        (self.attention.training if training else self.attention.drawing).apply(self.denoiser)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Sequence[SizeHint]
    ) -> Tensor:
        with self._working(self.denoiser):
            output = self.denoiser(
                onto(noisy, self.facts.device, self.facts.dtype),
                onto(timesteps, self.facts.device),
                encoder_hidden_states=onto(text["states"], self.facts.device, self.facts.dtype),
                added_cond_kwargs=self._added(text, sizes),
                return_dict=False,
            )
        return output[0].float()

    def _added(self, text: Conditioning, sizes: Sequence[SizeHint]) -> dict[str, Tensor] | None:
        """Return the U-Net's inputs besides the states of the text, if there are any."""
        return None
