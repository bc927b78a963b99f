"""What is written about an image is what the model says when it is asked without sdlora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_captioners import (
    CHAT,
    TAGS,
    write_blip,
    write_blip2,
    write_florence2,
    write_qwen2_vl,
    write_tagger,
)
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sdlora.data.captioning.caption import CaptionSettings, load_captioner
from sdlora.data.captioning.image_text import CHAT_PROMPT
from sdlora.data.captioning.models import locate_captioner, wanted_files
from sdlora.data.captioning.tag_lists import TagChoice
from sdlora.data.captioning.wording import with_spaces
from sdlora.errors import ConfigError, ModelError

Write = Callable[[Path], Path]
SHORT = 6


def images() -> list[Image.Image]:
    """Return four images, of which the second has another shape: a batch of them is padded."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 60, 44, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(pixels) for pixels in noise)
    return [first, Image.new("RGB", (80, 40), "red"), *others]


def said_by_sdlora(folder: Path, batch_size: int, **settings: Any) -> list[str]:
    """Return what sdlora's captioner says of the four images, in batches."""
    wanted = CaptionSettings(
        str(folder), device="cpu", precision="fp32", new_tokens=SHORT, batch_size=batch_size, **settings
    )
    model = load_captioner(locate_captioner(wanted.model), wanted)
    shown = images()
    parts = [
        text
        for start in range(0, len(shown), batch_size)
        for text in model.describe(shown[start : start + batch_size])
    ]
    model.close()
    return [" ".join(part) for part in parts]


def blip_says(folder: Path, prompt: str | None) -> list[str]:
    processor = BlipProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for image in images():
        inputs = (
            processor(image, prompt, return_tensors="pt") if prompt else processor(image, return_tensors="pt")
        )
        tokens = model.generate(**inputs, max_new_tokens=SHORT, do_sample=False)[0]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        texts.append(text.removeprefix(prompt or "").strip())
    return texts


def blip2_says(folder: Path, prompt: str | None) -> list[str]:
    processor = Blip2Processor.from_pretrained(folder)
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for image in images():
        inputs = (
            processor(image, prompt, return_tensors="pt") if prompt else processor(image, return_tensors="pt")
        )
        tokens = model.generate(**inputs, max_new_tokens=SHORT, do_sample=False)[0]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        texts.append(text.removeprefix(prompt or "").strip())
    return texts


def qwen2_vl_says(folder: Path, prompt: str | None) -> list[str]:
    """Ask with the prompt put together by hand: an image is a quarter as many tokens as it has patches."""
    tokenizer, eyes = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for image in images():
        seen = eyes(images=image, return_tensors="pt")
        pads = "<|image_pad|>" * (int(seen["image_grid_thw"][0].prod()) // 4)
        text = f"<|vision_start|>{pads}<|vision_end|> {prompt or CHAT_PROMPT}"
        asked = tokenizer(text, return_tensors="pt")
        types = (asked["input_ids"] == 6).long()
        tokens = model.generate(
            **asked, **seen, mm_token_type_ids=types, max_new_tokens=SHORT, do_sample=False
        )[0]
        texts.append(tokenizer.decode(tokens[asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def florence2_says(folder: Path, prompt: str | None) -> list[str]:
    processor = Florence2Processor.from_pretrained(folder)
    model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for image in images():
        inputs = processor(images=image, text=prompt or "<DETAILED_CAPTION>", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=SHORT, do_sample=False)[0]
        texts.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


@pytest.mark.long
@pytest.mark.parametrize("prompt", [None, "a photo of"])
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (write_blip, blip_says),
        (write_blip2, blip2_says),
        (write_florence2, florence2_says),
        (write_qwen2_vl, qwen2_vl_says),
    ],
    ids=["blip", "blip2", "florence2", "qwen2_vl"],
)
def test_a_model_says_what_transformers_says(
    tmp_path: Path, write: Write, says: Callable[[Path, str | None], list[str]], prompt: str | None
) -> None:
    folder = write(tmp_path / "model")
    expected = [" ".join(text.split()) for text in says(folder, prompt)]
    assert len(set(expected)) > 2  # it looks at the image
    assert said_by_sdlora(folder, 3, prompt=prompt) == expected


def wd14_input(image: Image.Image, side: int) -> NDArray[np.float32]:
    """WD14's own preparation: on a white square, bicubic, BGR, 0 to 255."""
    most = max(image.size)
    square = Image.new("RGB", (most, most), "white")
    square.paste(image, ((most - image.width) // 2, (most - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), np.float32)[None, :, :, ::-1]


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_tagger_gives_the_tags_above_their_categorys_threshold(tmp_path: Path, batch: int | str) -> None:
    folder = write_tagger(tmp_path / "wd", batch=batch)
    choice = TagChoice({"general": 0.3, "character": 0.6})
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    expected = []
    for image in images():
        scores = session.run(None, {"input": wd14_input(image, 16)})[0][0]
        limits = [{0: 0.3, 4: 0.6, 9: 2.0}[category] for _, category in TAGS]
        chosen = [place for place in np.argsort(-scores, kind="stable") if scores[place] >= limits[place]]
        names = [TAGS[place][0] for place in chosen]
        expected.append(" ".join(name if name == "o_o" else name.replace("_", " ") for name in names))
    assert len(set(expected)) > 1
    assert said_by_sdlora(folder, 3, tags=choice) == expected


def test_a_tagger_in_torchs_layout_is_shown_rgb_by_its_own_mean_and_asked_for_probabilities(
    tmp_path: Path,
) -> None:
    folder = write_tagger(tmp_path / "timm", channels_first=True, logits=True)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    (folder / "config.json").write_text(f'{{"pretrained_cfg": {{"mean": {mean}, "std": {std}}}}}')
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    expected = []
    for image in images():
        values = wd14_input(image, 16)[..., ::-1] / 255
        values = ((values - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).astype(np.float32)
        scores = 1 / (1 + np.exp(-session.run(None, {"input": values})[0][0]))
        expected.append(" ".join(with_spaces(TAGS[place][0]) for place in range(8) if scores[place] >= 0.4))
    assert len(set(expected)) > 1
    choice = TagChoice({"general": 0.4, "character": 0.4, "rating": 0.4}, order="list")
    assert said_by_sdlora(folder, 2, tags=choice) == expected


def test_no_file_is_opened_that_could_run_code(tmp_path: Path) -> None:
    folder = write_blip(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code"):
        locate_captioner(str(folder))
    with pytest.raises(ModelError, match="can run code"):
        locate_captioner(str(folder / "pytorch_model.bin"))
    (folder / "pytorch_model.bin").rename(weights)
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    with pytest.raises(ModelError, match="own"):
        said_by_sdlora(folder, 1)
    (folder / "config.json").write_text('{"model_type": "blip", "attn_implementation": "someone/kernel"}')
    with pytest.raises(ModelError, match="code of the hub"):
        locate_captioner(str(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "selected_tags.csv").write_text("name,category\na,0\n"), "1 tags"),
        (lambda folder: (folder / "selected_tags.csv").write_text("tag\na\n"), "no column `name`"),
        (lambda folder: (folder / "selected_tags.csv").write_text('name,category\n"a,0\n'), "not valid CSV"),
        (lambda folder: (folder / "selected_tags.csv").write_text("name,category\na\n"), "line 2: has 1"),
        (lambda folder: (folder / "selected_tags.csv").write_bytes(b"name\n\xff\n"), "not UTF-8"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"nothing"), "cannot load it"),
    ],
)
def test_what_is_no_tagger_is_one_line(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = write_tagger(tmp_path / "wd")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        said_by_sdlora(folder, 1)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ModelError, match="run: pip install onnxruntime"):
        said_by_sdlora(write_tagger(tmp_path / "wd"), 1)


def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    folder = write_tagger(tmp_path / "wd")
    files = locate_captioner(str(folder))
    with pytest.raises(ConfigError, match="pip install onnxruntime-gpu"):
        load_captioner(files, CaptionSettings(str(folder), device="cuda"))


def test_of_a_hub_model_only_what_is_read_is_fetched() -> None:
    blip = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "own.py",
        "onnx/model.onnx",
    ]
    assert wanted_files(blip) == ["config.json", "model.safetensors", "tokenizer.json"]
    wd14 = ["config.json", "model.onnx", "model.safetensors", "selected_tags.csv", "sw_jax_cv_config.json"]
    assert wanted_files(wd14) == ["config.json", "model.onnx", "selected_tags.csv"]


def test_the_chat_template_is_the_models_own(tmp_path: Path) -> None:
    folder = write_qwen2_vl(tmp_path / "model")
    before = said_by_sdlora(folder, 1, prompt="a cat")
    (folder / "chat_template.jinja").write_text(CHAT.replace("{{ part['text'] }}", "{{ part['text'] }} . ."))
    assert said_by_sdlora(folder, 1, prompt="a cat") != before
