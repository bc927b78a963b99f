"""Whether one sees what an image shows: a small classifier that knows the subjects from seven icon sets.

The network, its images and its augmentation are those that the mini base is judged by
(``tools/mini_base/classifier.py``). A judge of styles has to see past style, too: it also learns from the
two sets that no base may learn from, and from drawings with swapped light and dark, other inks and papers,
outlines only, and thicker or thinner lines. It is trained once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from sdlora.errors import ConfigError
from sdlora.files import replacing

from .icon_sets import all_sets, known_subjects

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS, BATCH, PARTS = 1200, 64, 8
_RATE = 2e-3


class SubjectJudge:
    """Names what images show.

    Args:
        folder: where the trained classifier is kept, under a name that tells what it was made from.
        icons: where icon packages are kept.
        steps: of its training.
    """

    def __init__(self, folder: Path, icons: Path, steps: int = STEPS) -> None:
        from safetensors.torch import load_file, save_file

        classifier, config, _ = _parts()
        self._classes = [subject for subject, _ in known_subjects()]
        self._side = config.IMAGE_SIZE
        file = folder / f"judge-{_made_of(steps)}.safetensors"
        if file.is_file():
            self._judge = classifier.Judge(len(self._classes)).eval()
            self._judge.load_state_dict(load_file(file))
            return
        print("training the judge of subjects (once; some minutes)", flush=True)
        try:
            self._judge = _trained(icons, steps)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the judge of subjects: {error}") from error
        weights = {name: tensor.contiguous() for name, tensor in self._judge.state_dict().items()}
        with replacing(file) as temporary:
            save_file(weights, temporary)

    def knows(self, subject: str) -> bool:
        """Whether that subject is one of its classes."""
        return subject in self._classes

    def ranks(self, images: Sequence[Image], subjects: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return the place of each image's subject among the judge's guesses (1: named); NaN if unknown."""
        from PIL import Image as Pil

        side = (self._side, self._side)
        small = [np.asarray(image.convert("RGB").resize(side, Pil.Resampling.BOX)) for image in images]
        pixels = torch.from_numpy(np.stack(small)).movedim(-1, 1).float().div(127.5).sub(1.0)
        with torch.no_grad():
            scores = torch.cat([self._judge(part) for part in pixels.split(64)]).numpy()
        ranks = np.full(len(images), np.nan)
        for i, subject in enumerate(subjects):
            if self.knows(subject):
                score = scores[i, self._classes.index(subject)]
                ranks[i] = 1 + int((scores[i] > score).sum())
        return ranks


def _trained(icons: Path, steps: int) -> Any:
    classifier, _, renders = _parts()
    torch.manual_seed(0)
    icon_images = renders.base_images(icons, all_sets())
    images = renders.render_variants(icon_images, icons, count=4, seed=1)
    names = [name for _, name in known_subjects()]
    classes = torch.tensor([names.index(image.name) for image in icon_images])
    classes = classes.repeat_interleave(images.shape[1])
    flat = images.reshape(-1, *images.shape[2:])
    judge = classifier.Judge(len(names)).train()
    optimizer = torch.optim.AdamW(judge.parameters(), _RATE, weight_decay=0.05)
    for step in range(steps):
        rng = random.Random(step)
        chosen = torch.randint(len(flat), (BATCH,), generator=torch.Generator().manual_seed(step))
        # parts of the batch are changed alike: cheap, and varied enough over the steps
        parts = renders.to_tensor(flat[chosen.numpy()]).chunk(PARTS)
        batch = torch.cat([recoloured(classifier.augment(redrawn(part, rng), rng), rng) for part in parts])
        loss = F.cross_entropy(judge(batch), classes[chosen], label_smoothing=0.05)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"judge: {step + 1} of {steps} steps, loss {loss.item():.2f}", flush=True)
    return judge.eval()


def redrawn(images: Tensor, rng: random.Random) -> Tensor:
    """Return drawings (n, 3, h, w) in [-1, 1] on white as outlines, with other lines, or as they are."""
    choice = rng.random()
    if choice < 0.2:
        local = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        edges = (images - local).abs().amax(1, keepdim=True)
        return (1 - rng.uniform(4, 10) * edges).clamp(-1, 1).expand_as(images)
    if choice < 0.3:
        return -F.max_pool2d(-images, 3, stride=1, padding=1)
    if choice < 0.4:
        return F.max_pool2d(images, 3, stride=1, padding=1)
    return images


def recoloured(images: Tensor, rng: random.Random) -> Tensor:
    """Return drawings (n, 3, h, w) in [-1, 1] with light and dark swapped, in two tones, or as they are."""
    choice = rng.random()
    if choice < 0.15:
        return -images
    if choice < 0.4:
        ink, paper = (torch.tensor([rng.uniform(-1, 1) for _ in range(3)]).view(3, 1, 1) for _ in range(2))
        if (ink.mean() - paper.mean()).abs() < 0.5:  # nothing to be seen
            return images
        share = images.mean(1, keepdim=True).add(1).div(2).clamp(0, 1)
        return ink + (paper - ink) * share
    return images


def _made_of(steps: int) -> str:
    """Return a digest of what the judge is made from, so that another one is never taken for it."""
    classifier, config, _ = _parts()
    sets = [[icon_set.package, icon_set.version] for icon_set in all_sets()]
    code = [inspect.getsource(part) for part in (classifier, _trained, redrawn, recoloured)]
    text = json.dumps([sets, known_subjects(), config.IMAGE_SIZE, steps, BATCH, PARTS, code])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parts() -> tuple[Any, Any, Any]:
    try:
        from tools.mini_base import classifier, config, renders
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the judge of subjects needs the package {error.name}: pip install -e '.[build-base]'; or "
            "measure without it with --no-icons"
        ) from error
    return classifier, config, renders
