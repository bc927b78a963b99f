"""Faults in what an adapter is: scale, strength, merging, kinds, starts, names in files."""

from __future__ import annotations

from .mutant import Mutant

_CANONICAL = "sdlora/adapters/canonical.py"
_ATTACH = "sdlora/adapters/attach.py"
_ATTACH_TESTS = ("adapters/test_attach.py",)
_HOOKS = "sdlora/adapters/hooks.py"
_HOOK_TESTS = ("adapters/test_hooks.py",)
_DORA = "sdlora/adapters/kinds/dora.py"
_LOHA = "sdlora/adapters/kinds/loha.py"
_LOKR = "sdlora/adapters/kinds/lokr.py"
_LYCORIS = "sdlora/adapters/kinds/lycoris.py"
_KIND_TESTS = ("adapters/test_kinds.py",)
_KIND_FILE_TESTS = ("formats/test_kinds.py",)
_INITIAL = "sdlora/adapters/initial.py"
_SUMS = "sdlora/adapters/sums.py"
_SUM_TESTS = ("families/test_kernels.py::test_a_model_with_kernels_learns_what_pefts_layers_do",)
_LOKR_TESTS = ("training/test_train_kinds.py::test_lokr_factors_follow_the_sides_of_the_layer",)
_PISSA_TESTS = (
    "training/test_train_kinds.py::test_pissa_takes_the_largest_singular_values_and_leaves_the_base_alone",
)
_NAMES = "sdlora/formats/names.py"
_WEBUI = "sdlora/formats/webui.py"
_NAME_TESTS = ("formats/test_roundtrip.py", "formats/test_keys.py")

MUTANTS = (
    Mutant(
        "what an attention puts out is added to the states without the update",
        _SUMS,
        "        put_out.addmm_(inner, factors.up.t())\n",
        "",
        _SUM_TESTS,
    ),
    Mutant(
        "the gradient past a projected sum is only that of its norm",
        _SUMS,
        "before_norm(of_normed, past, total,",
        "before_norm(of_normed, past * 0, total,",
        _SUM_TESTS,
    ),
    Mutant(
        "updates are not divided by the rank",
        _CANONICAL,
        "        return self.alpha / self.rank\n",
        "        return self.alpha\n",
        (*_KIND_TESTS, *_ATTACH_TESTS),
    ),
    Mutant(
        "a missing alpha means 1, not the rank",
        "sdlora/adapters/kinds/lora.py",
        "float(down.shape[0]) if alpha is None else alpha",
        "1.0 if alpha is None else alpha",
        (*_NAME_TESTS, "formats/test_hostile.py"),
    ),
    Mutant(
        "rsLoRA divides by the rank",
        _INITIAL,
        "alpha * math.sqrt(module_rank)",
        "alpha",
        ("adapters/test_initial.py",),
    ),
    Mutant(
        "a layer of another rank has another scale",
        _INITIAL,
        "else alpha * module_rank / rank",
        "else alpha",
        ("adapters/test_initial.py",),
    ),
    Mutant(
        "a fresh adapter changes the base",
        _INITIAL,
        "up = torch.zeros(",
        "up = torch.ones(",
        _ATTACH_TESTS,
    ),
    Mutant(
        "PiSSA's factors are not divided by the scale",
        _INITIAL,
        "roots = (sizes / scale).sqrt()",
        "roots = sizes.sqrt()",
        _PISSA_TESTS,
    ),
    Mutant(
        "PiSSA's start is added to the base",
        "sdlora/training/trainable.py",
        "set_strengths(model, {ADAPTER_NAME: 1.0, START_NAME: -1.0})",
        "set_strengths(model, {ADAPTER_NAME: 1.0, START_NAME: 1.0})",
        (
            "training/test_train_kinds.py::test_each_variant_starts_at_the_base_resumes_exactly_and_is_what_it_trained[pissa]",
        ),
    ),
    # kinds
    Mutant(
        "DoRA takes the norm of the other axis",
        _DORA,
        "if axis != (0 if self.by_output else 1)]",
        "if axis != (1 if self.by_output else 0)]",
        _KIND_TESTS,
    ),
    Mutant(
        "DoRA divides by the norm of the base's weight alone",
        _DORA,
        "self.norm_of(total)",
        "self.norm_of(weight.to(dtype))",
        _KIND_TESTS,
    ),
    Mutant(
        "DoRA starts at norms of columns",
        _DORA,
        "weight.detach().float().flatten(1), dim=1)",
        "weight.detach().float().flatten(1).T.reshape(weight.shape[0], -1), dim=1)",
        (
            "training/test_train_kinds.py::test_dora_in_bf16_starts_at_the_base_and_keeps_its_magnitudes_in_fp32",
        ),
    ),
    Mutant(
        "DoRA's magnitudes are rounded with its factors",
        _DORA,
        "self.magnitude.to(torch.promote_types(torch.float32, dtype))",
        "self.magnitude.to(dtype)",
        (*_KIND_TESTS, *_KIND_FILE_TESTS),
    ),
    Mutant(
        "LoHa's matrices are added",
        _LOHA,
        "product = (a1 @ b1) * (a2 @ b2) * self.scale",
        "product = ((a1 @ b1) + (a2 @ b2)) * self.scale",
        _KIND_TESTS,
    ),
    Mutant(
        "LoHa has no scale",
        _LOHA,
        "product = (a1 @ b1) * (a2 @ b2) * self.scale",
        "product = (a1 @ b1) * (a2 @ b2)",
        _KIND_TESTS,
    ),
    Mutant(
        "LoKr's factors are exchanged",
        _LOKR,
        "torch.kron(first, second) * self.scale",
        "torch.kron(second, first) * self.scale",
        _KIND_TESTS,
    ),
    Mutant(
        "LoKr is scaled where both factors are whole",
        _LOKR,
        "return 1.0 if self.is_full else self.alpha / self.rank",
        "return self.alpha / self.rank",
        _KIND_TESTS,
    ),
    Mutant(
        "LoKr as a plain LoRA has its factors exchanged",
        _LOKR,
        "torch.kron(first[1], second[1]), self.scale",
        "torch.kron(second[1], first[1]), self.scale",
        _KIND_TESTS,
    ),
    Mutant(
        "LoKr splits a side at a factor that does not divide it",
        _LOKR,
        "if factor is not None and size % factor == 0:",
        "if factor is not None:",
        _LOKR_TESTS,
    ),
    Mutant(
        "LoKr splits a side at its smallest divisor",
        _LOKR,
        "first = max(divisor for divisor in range(1, limit + 1)",
        "first = min(divisor for divisor in range(1, limit + 1)",
        _LOKR_TESTS,
    ),
    Mutant(
        "LoKr's second factor is always whole",
        _LOKR,
        "if rank >= max(k, n) / 2:",
        "if True:",
        _LOKR_TESTS,
    ),
    Mutant(
        "a Tucker core is transposed",
        _LYCORIS,
        '"ijkl,jc->ickl"',
        '"jikl,jc->ickl"',
        _KIND_TESTS,
    ),
    # in a model
    Mutant(
        "an adapter at strength 0 takes part",
        _ATTACH,
        "active = [name for name, value in values.items() if value != 0.0]",
        "active = list(values)",
        (*_ATTACH_TESTS, "generation/test_generate.py::test_strength_zero_equals_the_base_bit_for_bit"),
    ),
    Mutant(
        "a hook at strength 0 takes part",
        _HOOKS,
        "if value != 0.0 and (name in self.updates",
        "if (name in self.updates",
        _HOOK_TESTS,
    ),
    Mutant(
        "strengths of hooks are not used",
        _HOOKS,
        "alpha=self._strengths[name])",
        "alpha=1.0)",
        _HOOK_TESTS,
    ),
    Mutant(
        "a merge ignores strengths",
        _ATTACH,
        "merged = merged + value * update.delta(original)",
        "merged = merged + update.delta(original)",
        _ATTACH_TESTS,
    ),
    Mutant(
        "in a merge DoRA follows what was merged before it",
        _ATTACH,
        "merged = merged + value * update.delta(original)",
        "merged = merged + value * update.delta(merged)",
        _HOOK_TESTS,
    ),
    Mutant(
        "a merge is rounded after every adapter",
        _ATTACH,
        "merged = merged + value * update.delta(original)",
        "merged = (merged + value * update.delta(original)).to(weight.dtype).float()",
        _ATTACH_TESTS,
    ),
    Mutant(
        "merged adapters act beside it, too",
        _ATTACH,
        "format once\n        set_strengths(model, {})\n",
        "format once\n",
        _ATTACH_TESTS,
    ),
    Mutant(
        "undoing a merge leaves the weights",
        _ATTACH,
        "base_parameter(self._model, key).copy_(original)",
        "base_parameter(self._model, key)",
        _ATTACH_TESTS,
    ),
    Mutant(
        "the weights kept for undoing are those that are written over",
        _ATTACH,
        'weight.detach().to("cpu", copy=True)',
        'weight.detach().to("cpu")',
        _ATTACH_TESTS,
    ),
    Mutant(
        "a new adapter leaves the others acting",
        _ATTACH,
        "    write_weights(layers, plain)\n    set_strengths(model, {name: 1.0})\n",
        "    write_weights(layers, plain)\n",
        _HOOK_TESTS,
    ),
    Mutant(
        "one strength for the text encoder is taken for the denoiser",
        "sdlora/adapters/strength.py",
        "role = TEXT_ENCODERS if is_text_encoder(component) else DENOISER",
        "role = DENOISER if is_text_encoder(component) else TEXT_ENCODERS",
        (*_ATTACH_TESTS, "adapters/test_strength.py"),
    ),
    # in files
    Mutant(
        "keys of text encoders lack `text_model_`",
        _NAMES,
        "TEXT_PREFIX = ldm.TEXT_ROOT",
        'TEXT_PREFIX = ""',
        _NAME_TESTS,
    ),
    Mutant(
        "SDXL's keys have diffusers' names",
        _WEBUI,
        'and info.denoiser.webui_names == "ldm":',
        'and info.denoiser.webui_names == "none":',
        _NAME_TESTS,
    ),
    Mutant(
        "SDXL's text encoders are exchanged",
        "sdlora/families/sdxl.py",
        'file_prefix="lora_te1"',
        'file_prefix="lora_te2"',
        _NAME_TESTS,
    ),
    Mutant(
        "a module's alpha is not written",
        _WEBUI,
        "elif kind.stores_alpha and not (implied and path in pairs and update.rank == 1):",
        "elif False:",
        _NAME_TESTS,
    ),
    Mutant(
        "an alpha is folded into both factors",
        _WEBUI,
        "folding.scaled(pairs[path].up, alpha / uniform)",
        "folding.scaled(pairs[path].up, (alpha / uniform) ** 2)",
        _NAME_TESTS,
    ),
    Mutant(
        "blocks of the original U-Net are counted from another number",
        "sdlora/families/ldm.py",
        '"mid_block.resnets.1": "middle_block.2"',
        '"mid_block.resnets.1": "middle_block.3"',
        ("families/test_ldm.py",),
    ),
)
