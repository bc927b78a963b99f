"""Models of transformers that write about images: BLIP, BLIP-2, Florence-2, Qwen-VL and others."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...devices import choose_device, choose_dtype, make_current
from ...errors import ModelError
from .models import ImageTextFiles, read_config
from .wording import tidy

PROMPTS = {"florence2": "<DETAILED_CAPTION>", "paligemma": "caption en"}
"""Model type -> what it was taught to be asked for a caption."""
CHAT_PROMPT = "Describe this image in one sentence."
"""What models that answer questions are asked."""


class ImageTextModel:
    """A model of transformers, ready to work."""

    def __init__(
        self,
        files: ImageTextFiles,
        *,
        prompt: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        batch_size: int = 1,
        new_tokens: int = 128,
        beams: int = 1,
    ) -> None:
        """Load it: only safetensors, no code of the hub.

        Args:
            files: of the model.
            prompt: what it is asked, or how its text is to begin; the usual question of its kind when None.
            device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; the fastest when None.
            precision: ``fp32``, ``bf16`` or ``fp16``; half on cards when None.
            batch_size: images at a time.
            new_tokens: most tokens that it writes about an image.
            beams: of the search; 1 takes the likeliest token at every place.

        Raises:
            ModelError: when transformers cannot load it.
            ConfigError: when there is no such device.
        """
        self.name, self.batch_size = files.folder.name, batch_size
        self._device = choose_device(device)
        make_current(self._device)
        self._dtype = choose_dtype(precision, self._device)
        self._most, self._beams = new_tokens, beams
        kind = str(read_config(files.folder / "config.json").get("model_type", ""))
        self._processor = _processor(files.folder, kind)
        self._model: Any = _model(files.folder, kind, self._dtype, self._device).eval()
        self._chats = bool(getattr(self._processor, "chat_template", None))
        usual = PROMPTS.get(kind, CHAT_PROMPT if self._chats else "")
        self._prompt = usual if prompt is None else prompt
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is not None and not self._model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # what is written follows the last token of the prompt

    def describe(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """Return what it writes about each upright RGB image, without the prompt."""
        inputs = self._inputs(images)
        with torch.inference_mode():
            written = self._model.generate(
                **inputs, max_new_tokens=self._most, num_beams=self._beams, do_sample=False
            )
        asked = inputs.get("input_ids")
        if asked is not None and written.shape[1] >= asked.shape[1]:
            length = asked.shape[1]
            if torch.equal(written[:, :length], asked):
                written = written[:, length:]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return [[text] if (text := self._without_prompt(tidy(raw))) else [] for raw in texts]

    def close(self) -> None:
        """Free the model's memory, the device's cache included."""
        self._model = self._processor = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def _inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        if self._chats:
            content = [{"type": "image"}, *([{"type": "text", "text": self._prompt}] if self._prompt else [])]
            asked = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            given = self._processor(
                images=[[image] for image in images],
                text=[asked] * len(images),
                padding=True,
                return_tensors="pt",
            )
        elif self._prompt:
            given = self._processor(
                images=list(images), text=[self._prompt] * len(images), padding=True, return_tensors="pt"
            )
        else:
            given = self._processor(images=list(images), return_tensors="pt")
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
        }

    def _without_prompt(self, text: str) -> str:
        """Return a text without the words that its beginning was given (BLIP repeats them)."""
        prompt = tidy(self._prompt)
        if prompt and not self._chats and text.lower().startswith(prompt.lower()):
            return text[len(prompt) :].strip()
        return text


def _processor(folder: Path, kind: str) -> Any:
    """Return what turns images and a prompt into a model's inputs, and its tokens into text."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    usual = {"trust_remote_code": False, "local_files_only": True}
    reason: Exception | None = None
    try:
        processor = AutoProcessor.from_pretrained(str(folder), **usual)
        if hasattr(processor, "image_processor"):
            return processor
    except Exception as error:
        reason = error
    try:
        images = AutoImageProcessor.from_pretrained(str(folder), **usual)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **usual)
        # models put together of two, such as vit-gpt2, have no processor of their own
        return _without_videos(folder, kind, images, tokenizer) or _Pair(images, tokenizer)
    except Exception as error:
        raise ModelError(f"{folder}: {_reason(reason or error)}") from None


def _without_videos(folder: Path, kind: str, images: Any, tokenizer: Any) -> Any:
    """Return the processor of a model that also takes videos, without this part, which needs torchvision.

    None for a model that has no processor of its own.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(kind)
    if name is None:
        return None
    whole: Any = getattr(transformers, name)

    class ImagesOnly(whole):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    settings, _ = whole.get_processor_dict(str(folder), local_files_only=True)
    template = settings.pop("chat_template", None) or tokenizer.chat_template
    processor = ImagesOnly.from_args_and_dict([parts[part] for part in whole.get_attributes()], settings)
    processor.chat_template = template
    return processor


def _model(folder: Path, kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            str(folder),
            dtype=dtype,
            device_map={"": str(device)},  # straight to the device, without a copy in main memory
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, RuntimeError, ImportError, KeyError, ...
        raise ModelError(
            f"{folder}: transformers cannot load it as a model that writes about images"
            f"{f' (model_type {kind})' if kind else ''}: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Pair:
    """An image processor and a tokenizer where a model has no common one."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(
        self, *, images: Any, text: Any = None, padding: bool = True, return_tensors: str = "pt"
    ) -> Any:
        given = dict(self.image_processor(images=images, return_tensors=return_tensors))
        if text is not None:
            asked = self.tokenizer(
                text, padding=padding, add_special_tokens=False, return_tensors=return_tensors
            )
            given["decoder_input_ids"] = asked["input_ids"]
        return given

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        decoded: list[str] = self.tokenizer.batch_decode(ids, **options)
        return decoded
