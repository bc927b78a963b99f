"""Faults in what is seen of images and captions: order, views, buckets, hold-out, wording, encoding."""

from __future__ import annotations

from .mutant import Mutant

_ORDER = "sdlora/data/batching/order.py"
_ORDER_TESTS = ("data/batching/test_order.py",)
_VIEWS = "sdlora/data/batching/views.py"
_VIEW_TESTS = ("data/batching/test_views.py",)
_BUCKETS = "sdlora/data/batching/buckets.py"
_BUCKET_TESTS = ("data/batching/test_buckets.py",)
_BATCHES = "sdlora/data/batching/batches.py"
_BATCH_TESTS = ("data/batching/test_batches.py",)
_BASE_TESTS = ("families/test_base.py",)
_CACHE = "sdlora/data/batching/cache.py"
_CACHE_TESTS = ("data/batching/test_cache.py",)
_HOLDOUT = "sdlora/data/reading/holdout.py"
_LIKENESS = "sdlora/data/reading/likeness.py"
_HOLDOUT_TESTS = ("data/reading/test_holdout.py",)
_LIKENESS_TESTS = ("data/reading/test_likeness.py",)
_WORDING = "sdlora/data/reading/wording.py"
_WORDING_TESTS = ("data/reading/test_wording.py",)
_BASE = "sdlora/families/base.py"
_CLIP = "sdlora/families/clip.py"
_SD1_TESTS = ("families/test_sd1.py",)
_SDXL_TESTS = ("families/test_sdxl.py",)
_SAMPLERS = "sdlora/diffusion/samplers.py"
_SAMPLER_TESTS = ("diffusion/test_samplers.py",)

MUTANTS = (
    # which image when
    Mutant(
        "a remainder is dropped",
        _ORDER,
        "(full if len(batch) == self._batch_size else short).append((draw(), batch))",
        "(full if len(batch) == self._batch_size else []).append((draw(), batch))",
        _ORDER_TESTS,
    ),
    Mutant(
        "a remainder is filled with images seen already",
        _ORDER,
        "batch = tuple(visits[start : start + self._batch_size])",
        "batch = tuple((visits[start:] + visits)[: self._batch_size])",
        _ORDER_TESTS,
    ),
    Mutant(
        "the last steps of an epoch start again instead of being short",
        _ORDER,
        "plan[at] if at < after else ()",
        "plan[at % len(plan)]",
        _ORDER_TESTS,
    ),
    Mutant(
        "an epoch's last step is left out where it is not full",
        _ORDER,
        "-(-self.batches_per_epoch // (world_size * accumulation))",
        "max(1, self.batches_per_epoch // (world_size * accumulation))",
        _ORDER_TESTS,
    ),
    Mutant(
        "every epoch has the same order",
        _ORDER,
        'random.Random(f"{self._seed}/{epoch}")',
        'random.Random(f"{self._seed}")',
        _ORDER_TESTS,
    ),
    Mutant(
        "processes get neighbouring micro-batches in the wrong order",
        _ORDER,
        "ranks[position % self._world_size]",
        "ranks[position // self._accumulation]",
        _ORDER_TESTS,
    ),
    # which part of it
    Mutant(
        "a quarter of the visits is mirrored",
        _VIEWS,
        'draw_for(seed, "flip", visit) < 0.5',
        'draw_for(seed, "flip", visit) < 0.25',
        _VIEW_TESTS,
    ),
    Mutant(
        "a mirrored image is cropped where the other one is",
        _BUCKETS,
        "return replace(placement, crop=(placement.crop[0], left))",
        "return placement",
        (*_BUCKET_TESTS, *_VIEW_TESTS),
    ),
    Mutant(
        "an image is not mirrored, only its crop",
        _VIEWS,
        "_cut(ImageOps.mirror(image) if view.mirror else image,",
        "_cut(image,",
        _VIEW_TESTS,
    ),
    Mutant(
        "a mask is not mirrored with its image",
        _VIEWS,
        "mask = ImageOps.mirror(mask) if view.mirror else mask",
        "mask = mask",
        _VIEW_TESTS,
    ),
    Mutant(
        "crops are taken from the corner, not the middle",
        _BUCKETS,
        "Placement(bucket, resized, (slack[0] // 2, slack[1] // 2))",
        "Placement(bucket, resized, (0, 0))",
        _BUCKET_TESTS,
    ),
    Mutant(
        "rows and columns of the crop are exchanged",
        _BUCKETS,
        "Placement(bucket, resized, (slack[0] // 2, slack[1] // 2))",
        "Placement(bucket, resized, (slack[1] // 2, slack[0] // 2))",
        _BUCKET_TESTS,
    ),
    Mutant(
        "a random crop never reaches the far edge",
        _VIEWS,
        "(most - least + 1))",
        "(most - least))",
        _VIEW_TESTS,
    ),
    Mutant(
        "the bucket is that of the nearest ratio, not of its logarithm",
        _BUCKETS,
        "return abs(bucket_aspect - aspect),",
        "return abs(math.exp(bucket_aspect) - math.exp(aspect)),",
        _BUCKET_TESTS,
    ),
    Mutant(
        "a tie goes to the smaller bucket",
        _BUCKETS,
        "return abs(bucket_aspect - aspect), -math.prod(bucket),",
        "return abs(bucket_aspect - aspect), math.prod(bucket),",
        _BUCKET_TESTS,
    ),
    Mutant(
        "buckets have more area than the resolution allows",
        _BUCKETS,
        "long = resolution * resolution // short // multiple * multiple",
        "long = -(-resolution * resolution // short // multiple) * multiple",
        _BUCKET_TESTS,
    ),
    Mutant(
        "an image is resized to less than its bucket",
        _BUCKETS,
        "if bucket_height * width >= bucket_width * height:",
        "if bucket_height * width < bucket_width * height:",
        _BUCKET_TESTS,
    ),
    Mutant(
        "SDXL is told a crop at the corner, whatever was cropped",
        _CACHE,
        "SizeHint((item.height, item.width), used.crop, used.bucket)",
        "SizeHint((item.height, item.width), (0, 0), used.bucket)",
        _CACHE_TESTS,
    ),
    Mutant(
        "SDXL is told the bucket's size as the original one",
        _CACHE,
        "SizeHint((item.height, item.width), used.crop, used.bucket)",
        "SizeHint(used.bucket, used.crop, used.bucket)",
        _CACHE_TESTS,
    ),
    Mutant(
        "SDXL is told sizes in another order",
        "sdlora/families/sdxl.py",
        "[*size.original, *size.crop, *size.target]",
        "[*size.original, *size.target, *size.crop]",
        _SDXL_TESTS,
    ),
    # hold-out
    Mutant(
        "similar images stand on both sides of the hold-out",
        _HOLDOUT,
        "groups = near_duplicates([*items, *always_trained])",
        "groups: list[tuple[int, ...]] = []",
        _HOLDOUT_TESTS,
    ),
    Mutant(
        "of two similar images one is held out",
        _HOLDOUT,
        "            held.update(group)\n",
        "            held.update(group[:1])\n",
        _HOLDOUT_TESTS,
    ),
    Mutant(
        "held-out images that are like each other are not measured",
        _HOLDOUT,
        "if group[0] < first:",
        "if group[0] < first or len(group) > 1:",
        _HOLDOUT_TESTS,
    ),
    Mutant(
        "likeness is not carried on from image to image",
        _LIKENESS,
        "lower, upper = sorted((self._root(first), self._root(second)))",
        "lower, upper = sorted((first, second))",
        (*_LIKENESS_TESTS, *_HOLDOUT_TESTS),
    ),
    Mutant(
        "mirror images are not similar",
        _LIKENESS,
        "pair = (bits ^ likenesses[second].bits, bits ^ likenesses[second].mirrored)",
        "pair = (bits ^ likenesses[second].bits, bits ^ likenesses[second].bits)",
        (*_LIKENESS_TESTS, *_HOLDOUT_TESTS),
    ),
    # captions
    Mutant(
        "captions are dropped half as often as asked for",
        _BATCHES,
        'draw_for(seed, "caption", visit) < caption_dropout',
        'draw_for(seed, "caption", visit) < caption_dropout / 2',
        _BATCH_TESTS,
    ),
    Mutant(
        "captions are dropped except as often as asked for",
        _BATCHES,
        'draw_for(seed, "caption", visit) < caption_dropout',
        'draw_for(seed, "caption", visit) >= caption_dropout',
        _BATCH_TESTS,
    ),
    Mutant(
        "an image whose caption is dropped is always mirrored",
        _VIEWS,
        'draw_for(seed, "flip", visit)',
        'draw_for(seed, "caption", visit)',
        _BATCH_TESTS,
    ),
    Mutant(
        "tags are left out half as often as asked for",
        _WORDING,
        "draw() >= self.tag_dropout",
        "draw() >= self.tag_dropout / 2",
        _WORDING_TESTS,
    ),
    Mutant(
        "one kept tag moves",
        _WORDING,
        "kept = Tags(tags.words[: self.keep], tags.between)",
        "kept = Tags(tags.words[: self.keep - 1], tags.between)",
        _WORDING_TESTS,
    ),
    Mutant(
        "of several lines always the first is taken",
        _WORDING,
        "text = item.lines[(start + visits) % len(item.lines)]",
        "text = item.lines[0]",
        _WORDING_TESTS,
    ),
    Mutant(
        "the trigger word stands behind the caption",
        "sdlora/data/reading/captions.py",
        'return f"{trigger_word}, {caption}"',
        'return f"{caption}, {trigger_word}"',
        _WORDING_TESTS,
    ),
    # latents and text
    Mutant(
        "latents are drawn with their variance for their deviation",
        _BASE,
        "torch.exp(0.5 * self.logvar",
        "torch.exp(self.logvar",
        (*_CACHE_TESTS, *_BASE_TESTS),
    ),
    Mutant(
        "latents are the mean, nothing is drawn",
        _BASE,
        ".clamp(-30.0, 20.0)) * noise",
        ".clamp(-30.0, 20.0)) * 0.0",
        (*_CACHE_TESTS, *_BASE_TESTS),
    ),
    Mutant(
        "latents are divided by the scaling factor",
        _BASE,
        "return (latents - self.shift) * self.scaling",
        "return (latents - self.shift) / self.scaling",
        (*_BASE_TESTS, *_BATCH_TESTS),
    ),
    Mutant(
        "latents are not scaled for training",
        _BATCHES,
        'model.facts.latents.scaled(encoded.posterior.sample(visit_generator(seed, "latents", visit)))',
        'encoded.posterior.sample(visit_generator(seed, "latents", visit))',
        _BATCH_TESTS,
    ),
    Mutant(
        "latents lose their shift",
        _BASE,
        "return (latents - self.shift) * self.scaling",
        "return latents * self.scaling",
        _BASE_TESTS,
    ),
    Mutant(
        "one latent is drawn for an image at all visits",
        _BATCHES,
        'visit_generator(seed, "latents", visit)',
        'generator_for(seed, "latents", visit.index)',
        _BATCH_TESTS,
    ),
    Mutant(
        "clip skip takes a layer more",
        _CLIP,
        "output.hidden_states[-clip_skip]",
        "output.hidden_states[-clip_skip - 1]",
        _SD1_TESTS,
    ),
    Mutant(
        "SDXL's text is that of the last layer",
        _CLIP,
        "output.hidden_states[-2]",
        "output.hidden_states[-1]",
        _SDXL_TESTS,
    ),
    # drawing
    Mutant(
        "DDIM steps on other timesteps",
        _SAMPLERS,
        'offset = 1 if spacing == "leading" else 0',
        "offset = 0",
        _SAMPLER_TESTS,
    ),
    Mutant(
        "guidance counts from 0",
        "sdlora/generation/render.py",
        "negative + self._guidance * (rest - negative)",
        "rest + self._guidance * (rest - negative)",
        _SAMPLER_TESTS,
    ),
)
