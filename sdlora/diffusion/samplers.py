"""The samplers that users know by name, and the diffusers scheduler of each for a discrete diffusion.

A base's noise process says which samplers it can be drawn with, and on what schedule.

The update rules are diffusers'. What is decided here is the timesteps they are applied at, and these follow
A1111's WebUI, so that a preview shows what its users will get:

* ``DDIM``: every (T // steps)-th timestep plus 1, ending at the first trained noise level. As everywhere
  with this rule, above 100 steps only numbers that divide T start from full noise.
* ``Euler``, ``Euler a``, ``DPM++ 2M``: evenly from the last timestep to the first, then to no noise.
  (DPM++ takes whole timesteps, so its inner ones are rounded; WebUI's are fractions.)
* ``... Karras``: noise levels spaced as in Karras et al. 2022, equation 5, rho 7.
* ``Euler trailing``: in equal steps from the very last timestep on, WebUI's schedule type ``Simple``, but for
  rounding; few steps are better for it.
* ``UniPC``: evenly from the last timestep down, of second order (bh2), as its authors advise with guidance;
  WebUI's default is the third (bh1), which cannot end without noise.
* ``LCM``: of the 50 timesteps that such adapters are distilled at; above 50 steps, of all.

A base whose schedule ends in pure noise (zero terminal SNR) is sampled from that last timestep on, in equal
steps ("trailing", Lin et al. 2024, section 3.3); its infinite noise level is taken as 4096, as in diffusers.

A scheduler counts its steps, so each one serves a single batch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..config.schema import SamplerName
from ..errors import ConfigError, shown
from .process import NoiseProcess, Scheduler

Build = Callable[[dict[str, Any], int], Any]


@dataclass(frozen=True)
class Sampler:
    """A sampler as users see it.

    Attributes:
        webui_name: WebUI's word for it in the ``Sampler:`` field of an image's settings.
        webui_schedule: WebUI's ``Schedule type:``, or None where it states none.
        ancestral: new noise enters at every step.
        second_order: every step but the last calls the denoiser twice.
        build: makes the diffusers scheduler of a discrete diffusion from the settings of its schedule
            (:meth:`sdlora.diffusion.ddpm.DDPM.schedule`) and the number of steps.
    """

    webui_name: str
    webui_schedule: str | None
    ancestral: bool
    build: Build
    second_order: bool = False


def find_sampler(name: str) -> Sampler:
    """Return the sampler of that name; case and spaces do not matter.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    return SAMPLERS[_known(name)]


def make_scheduler(name: str, process: NoiseProcess, steps: int) -> Scheduler:
    """Return a new scheduler of that sampler for a process, with its timesteps set, on the CPU.

    Args:
        name: one of :data:`SAMPLERS`.
        process: the noise the base was trained with.
        steps: number of denoising steps, 1 to ``process.max_steps``.

    Raises:
        ConfigError: for an unknown name, one that cannot undo this process, or an impossible number of steps.
    """
    check_sampling(name, process, steps)
    scheduler = process.schedulers[_known(name)](steps)
    if hasattr(scheduler, "set_begin_index"):
        # else diffusers looks the first step up by its timestep, and of two equal ones takes the second
        scheduler.set_begin_index(0)
    return scheduler


def check_sampling(name: str, process: NoiseProcess, steps: int) -> None:
    """Raise ConfigError unless that sampler can make an image of the process's noise in that many steps."""
    if _known(name) not in process.schedulers:
        raise ConfigError(
            f"sampler `{name}`: cannot take away the noise of a base that predicts "
            f"{process.prediction.name}; use {' or '.join(process.schedulers)}"
        )
    if not 1 <= steps <= process.max_steps:
        raise ConfigError(
            f"`steps={steps}`: an image takes 1 to {process.max_steps} denoising steps; 20 to 30 are usual"
        )


def _known(name: str) -> SamplerName:
    """Return the name as it is spelled in the table."""
    known = {_plain(sampler): sampler for sampler in SAMPLERS}
    sampler = known.get(_plain(name))
    if sampler is not None:
        return sampler
    close = difflib.get_close_matches(_plain(name), list(known), 1, cutoff=0.5)
    hint = f"did you mean `{known[close[0]]}`? " if close else ""
    raise ConfigError(f"sampler `{shown(name)}`: unknown; {hint}There are {', '.join(SAMPLERS)}")


def _plain(name: str) -> str:
    return "".join(name.lower().split())


def _ddim(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import DDIMScheduler

    spacing = _spacing(shared, "leading")
    offset = 1 if spacing == "leading" else 0
    scheduler = DDIMScheduler(
        **shared, clip_sample=False, set_alpha_to_one=False, steps_offset=offset, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _euler(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**shared, timestep_spacing=_spacing(shared, _even(steps)))
    scheduler.set_timesteps(steps)
    return scheduler


def _euler_ancestral(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler(**shared, timestep_spacing=_spacing(shared, _even(steps)))
    scheduler.set_timesteps(steps)
    return scheduler


def _spacing(shared: dict[str, Any], usual: str) -> str:
    """Return how timesteps are spaced: from the very last one on if it alone is pure noise."""
    return "trailing" if shared["rescale_betas_zero_snr"] else usual


def _even(steps: int) -> str:
    """Return the spacing from the last timestep to the first; a single step must be the last one."""
    return "linspace" if steps > 1 else "trailing"


def _dpm(shared: dict[str, Any], steps: int, **more: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**shared, **{**_DPM, **more})
    count = shared["num_train_timesteps"]
    first = count / steps - 1 if _spacing(shared, "even") == "trailing" else 0
    # given one by one: diffusers' own "linspace" makes one step more and drops the first timestep
    scheduler.set_timesteps(
        timesteps=torch.linspace(count - 1, first, steps, dtype=torch.float64).round().int().tolist()
    )
    return scheduler


def _dpm_karras(shared: dict[str, Any], steps: int, **more: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**shared, **{**_DPM, **more}, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    return scheduler


def _dpm_sde(shared: dict[str, Any], steps: int) -> Any:
    return _dpm(shared, steps, algorithm_type="sde-dpmsolver++")


def _dpm_sde_karras(shared: dict[str, Any], steps: int) -> Any:
    return _dpm_karras(shared, steps, algorithm_type="sde-dpmsolver++")


def _single_step_sde_karras(shared: dict[str, Any], steps: int) -> Any:
    from .dpm_sde import DPMSolverSDE

    return _two_calls(DPMSolverSDE, shared, steps, use_karras_sigmas=True)


def _heun(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import HeunDiscreteScheduler

    return _two_calls(HeunDiscreteScheduler, shared, steps)


def _two_calls(kind: Any, shared: dict[str, Any], steps: int, **more: Any) -> Any:
    """Return a scheduler of a class that knows no schedule that ends in pure noise."""
    settings = dict(shared)
    betas = list(settings["trained_betas"])
    if settings.pop("rescale_betas_zero_snr"):  # 2^-24 of signal is kept, as in diffusers' others
        before = math.prod(1.0 - beta for beta in betas[:-1])
        betas[-1] = 1.0 - 2.0**-24 / before
    spacing = _spacing(shared, _even(steps))
    scheduler = kind(**{**settings, "trained_betas": betas}, timestep_spacing=spacing, **more)
    scheduler.set_timesteps(steps)
    return scheduler


def _unipc(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import UniPCMultistepScheduler

    spacing = _spacing(shared, "linspace")
    scheduler = UniPCMultistepScheduler(**shared, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return scheduler


def _lcm(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import LCMScheduler

    trained = shared["num_train_timesteps"]
    scheduler = LCMScheduler(**shared, clip_sample=False)
    scheduler.set_timesteps(steps, original_inference_steps=50 if steps <= 50 <= trained else trained)
    return scheduler


def _euler_trailing(shared: dict[str, Any], steps: int) -> Any:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**shared, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


# DPM-Solver++ of second order, multistep (Lu et al. 2022b, algorithm 2); the last step is of first order
_DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}

SAMPLERS: dict[SamplerName, Sampler] = {
    "DDIM": Sampler("DDIM", None, False, _ddim),
    "Euler": Sampler("Euler", "Automatic", False, _euler),
    "Euler a": Sampler("Euler a", "Automatic", True, _euler_ancestral),
    "DPM++ 2M": Sampler("DPM++ 2M", "Uniform", False, _dpm),
    "DPM++ 2M Karras": Sampler("DPM++ 2M", "Karras", False, _dpm_karras),
    "DPM++ 2M SDE": Sampler("DPM++ 2M SDE", "Uniform", True, _dpm_sde),
    "DPM++ 2M SDE Karras": Sampler("DPM++ 2M SDE", "Karras", True, _dpm_sde_karras),
    "DPM++ SDE Karras": Sampler("DPM++ SDE", "Karras", True, _single_step_sde_karras, second_order=True),
    "UniPC": Sampler("UniPC", None, False, _unipc),
    "LCM": Sampler("LCM", "Automatic", True, _lcm),
    "Heun": Sampler("Heun", "Automatic", False, _heun, second_order=True),
    "Euler trailing": Sampler("Euler", "Simple", False, _euler_trailing),
}
assert tuple(SAMPLERS) == get_args(SamplerName)
