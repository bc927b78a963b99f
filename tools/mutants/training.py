"""Faults in what is learned: noise, loss, gradients, steps, schedules, optimizer, checkpoints."""

from __future__ import annotations

from .mutant import Mutant

_SCHEDULES = "sdlora/training/schedules.py"
_SCHEDULE_TESTS = ("training/test_schedules.py",)
_PROCESS = "sdlora/diffusion/process.py"
_DDPM = "sdlora/diffusion/ddpm.py"
_PREDICTION = "sdlora/diffusion/prediction.py"
_NOISE_TESTS = ("diffusion/test_process.py",)
_OBJECTIVE = "sdlora/training/objective.py"
_OBJECTIVE_TESTS = ("training/test_objective.py",)
_PRIOR_TESTS = (
    "training/test_train_data.py::test_regularisation_images_hold_the_adapter_to_the_base_where_asked_for",
    "training/test_train_data.py::test_without_such_images_the_empty_caption_holds_it",
)
_TRAIN = "sdlora/training/train.py"
_STEP = "sdlora/training/step.py"
_ATTACH = "sdlora/adapters/attach.py"
_MASTERS = "sdlora/training/masters.py"
_MASTER_TESTS = ("training/test_masters.py",)
_STATE = "sdlora/training/state.py"
_CHECKPOINT = "sdlora/training/checkpoint.py"
_CHECKPOINT_TESTS = ("training/test_checkpoint.py",)
_RESUME_TESTS = (
    "training/test_train.py::test_stopped_and_resumed_run_ends_bit_identical[plain]",
    "training/test_train.py::test_fp16_on_cpu_trains_with_a_scaler_that_resumes",
)
_LEGAL_RESUME_TESTS = ("training/test_train.py::test_resume_with_other_settings_or_images_is_refused",)
_WEIGHT_TESTS = (
    "training/test_train.py::test_a_lone_image_in_a_short_step_weighs_as_much_as_any_other",
    "training/test_train.py::test_accumulated_micro_batches_give_the_gradient_of_one_large_batch",
)
_DECAY_TESTS = (
    "training/test_train_kinds.py::test_weight_decay_pulls_the_factors_of_dora_and_not_its_magnitudes",
)
_RATE_TESTS = (
    "training/test_train_kinds.py::test_the_first_step_moves_each_group_by_its_own_rate",
    "training/test_train_steps.py",
)
_FOLDER = "sdlora/run_folder.py"
_FOLDER_TESTS = ("test_run_folder.py",)

MUTANTS = (
    # schedules
    Mutant(
        "the linear schedule is the cosine one",
        _SCHEDULES,
        "    return 1.0 - done\n",
        "    return 0.5 * (1.0 + math.cos(math.pi * done))\n",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the cosine schedule is the linear one",
        _SCHEDULES,
        "return 0.5 * (1.0 + math.cos(math.pi * done))",
        "return 1.0 - done",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the constant schedule falls",
        _SCHEDULES,
        "    return 1.0\n",
        "    return 1.0 - 0.5 * done\n",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the warm-up begins at 0",
        _SCHEDULES,
        "return (step + 1) / (warmup + 1)",
        "return step / (warmup + 1)",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the warm-up reaches 1 a step early",
        _SCHEDULES,
        "return (step + 1) / (warmup + 1)",
        "return (step + 1) / warmup",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the schedule counts the steps of the warm-up as done",
        _SCHEDULES,
        "course((step - warmup) / max(1, steps - warmup), known)",
        "course(step / max(1, steps), known)",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the schedule does not end at the last step",
        _SCHEDULES,
        "max(1, steps - warmup)",
        "max(1, steps)",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "cosines with restarts restart once less",
        _SCHEDULES,
        "done * settings.schedule_cycles % 1.0",
        "done * max(1, settings.schedule_cycles - 1) % 1.0",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the power of the polynomial schedule is not used",
        _SCHEDULES,
        "(1.0 - done) ** settings.schedule_power",
        "(1.0 - done)",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "REX is the linear schedule",
        _SCHEDULES,
        "return (1.0 - done) / (0.5 + 0.5 * (1.0 - done))",
        "return 1.0 - done",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the inverse square root counts from the start of the run",
        _SCHEDULES,
        "share / (share + (1.0 - share) * done)",
        "share / (share + done)",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "the floor of the schedule lifts its peak",
        _SCHEDULES,
        "floor + (1.0 - floor) * course(",
        "floor + course(",
        _SCHEDULE_TESTS,
    ),
    Mutant(
        "a warm-up in shares is rounded down",
        "sdlora/config/schema.py",
        "return round(self.warmup_share * steps)",
        "return int(self.warmup_share * steps)",
        (*_SCHEDULE_TESTS, "config/test_defaults.py"),
    ),
    Mutant(
        "the rate of a step does not follow the schedule",
        _STEP,
        "[group.learning_rate * factor for",
        "[group.learning_rate for",
        _RATE_TESTS,
    ),
    # noise
    Mutant(
        "the noise offset has half its size",
        _PROCESS,
        "noise + noise_offset * torch.randn(",
        "noise + 0.5 * noise_offset * torch.randn(",
        _NOISE_TESTS,
    ),
    Mutant(
        "the noise offset is one number an image, not one a channel",
        _PROCESS,
        "(shape[0], shape[1], 1, 1)",
        "(shape[0], 1, 1, 1)",
        _NOISE_TESTS,
    ),
    Mutant(
        "the noise offset is one number a channel for all images",
        _PROCESS,
        "(shape[0], shape[1], 1, 1)",
        "(1, shape[1], 1, 1)",
        _NOISE_TESTS,
    ),
    Mutant(
        "the setting for the noise offset is not used",
        _OBJECTIVE,
        "noise_offset=settings.noise_offset)",
        "noise_offset=0.0)",
        _OBJECTIVE_TESTS,
    ),
    Mutant(
        "all images of a batch share one noise",
        _OBJECTIVE,
        'for generator in batch.generators("noise"):',
        'for generator in [batch.generators("noise")[0] for _ in batch.names]:',
        (*_OBJECTIVE_TESTS, *_WEIGHT_TESTS),
    ),
    Mutant(
        "the last timestep is never drawn",
        _DDPM,
        "torch.randint(0, self.num_timesteps,",
        "torch.randint(0, self.num_timesteps - 1,",
        _NOISE_TESTS,
    ),
    Mutant(
        "the first timestep is never drawn",
        _DDPM,
        "torch.randint(0, self.num_timesteps,",
        "torch.randint(1, self.num_timesteps,",
        _NOISE_TESTS,
    ),
    Mutant(
        "validation's timesteps lie at the beginnings of the parts",
        _DDPM,
        "dtype=torch.float64) + 0.5) / count",
        "dtype=torch.float64)) / count",
        _NOISE_TESTS,
    ),
    Mutant(
        "signal and noise are exchanged",
        _DDPM,
        "noisy = a * clean + s * noise  #",
        "noisy = s * clean + a * noise  #",
        _NOISE_TESTS,
    ),
    Mutant(
        "betas are linear, not their roots",
        _DDPM,
        "torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2",
        "torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)",
        _NOISE_TESTS,
    ),
    Mutant(
        "epsilon's target is the image",
        _PREDICTION,
        "return noise  # (B",
        "return clean  # (B",
        _NOISE_TESTS,
    ),
    Mutant(
        "v's target has the other sign",
        _PREDICTION,
        "return a * noise - s * clean",
        "return s * clean - a * noise",
        _NOISE_TESTS,
    ),
    # loss
    Mutant(
        "min-SNR takes epsilon's weight for that of v",
        _PREDICTION,
        "return snr  # clean",
        "return snr + 1.0  # clean",
        _NOISE_TESTS,
    ),
    Mutant(
        "min-SNR takes v's weight for that of epsilon",
        _PREDICTION,
        "return snr + 1.0  # clean",
        "return snr  # clean",
        _NOISE_TESTS,
    ),
    Mutant(
        "min-SNR takes the larger of both",
        "sdlora/diffusion/weighting.py",
        "snr.clamp(max=gamma)",
        "snr.clamp(min=gamma)",
        _NOISE_TESTS,
    ),
    Mutant(
        "the signal-to-noise ratio is that of amplitudes, not of powers",
        _DDPM,
        "return (alpha_bar / (1.0 - alpha_bar)).float()",
        "return (alpha_bar / (1.0 - alpha_bar)).sqrt().float()",
        _NOISE_TESTS,
    ),
    Mutant(
        "the setting for min-SNR is not used",
        _OBJECTIVE,
        "return process.loss_weights(timesteps, settings.min_snr_gamma)",
        "return process.loss_weights(timesteps, 0.0)",
        _OBJECTIVE_TESTS,
    ),
    Mutant(
        "images do not weigh what they are given",
        _OBJECTIVE,
        "_weights(process, timesteps, settings) * batch.weights",
        "_weights(process, timesteps, settings)",
        ("training/test_train_data.py::test_the_weight_of_a_source_is_the_weight_of_its_gradient",),
    ),
    Mutant(
        "a mask makes an image weigh less",
        _PROCESS,
        "area = weights.flatten(1).sum(1) * errors.shape[1]",
        "area = torch.ones_like(weights).flatten(1).sum(1) * errors.shape[1]",
        ("training/test_train_data.py::test_only_what_the_mask_shows_is_trained",),
    ),
    Mutant(
        "the loss is a sum over values, not their mean",
        _PROCESS,
        "return errors.flatten(1).mean(1)",
        "return errors.flatten(1).sum(1)",
        _NOISE_TESTS,
    ),
    Mutant(
        "regularisation images count without the setting's factor",
        _OBJECTIVE,
        "torch.where(torch.tensor(batch.regularisation), prior, 1.0)",
        "torch.where(torch.tensor(batch.regularisation), 1.0, 1.0)",
        (*_OBJECTIVE_TESTS, *_PRIOR_TESTS),
    ),
    Mutant(
        "the base's prediction is that of the adapter",
        _ATTACH,
        "layer._disable_adapters = True",
        "layer._disable_adapters = False",
        (
            *_PRIOR_TESTS,
            "training/test_train_data.py::"
            "test_disabled_adapters_leave_the_base_bit_for_bit_and_go_on_learning",
        ),
    ),
    # gradients and steps
    Mutant(
        "the gradient is divided by the images of this micro-batch, not of a full step",
        _STEP,
        "weighted.sum() / run.images_per_step",
        "weighted.mean()",
        _WEIGHT_TESTS,
    ),
    Mutant(
        "a micro-batch's gradient is counted again in the next one",
        _MASTERS,
        "        self._compute_grad.zero_()\n",
        "",
        (*_MASTER_TESTS, *_WEIGHT_TESTS),
    ),
    Mutant(
        "a step's gradient is still there in the next one",
        _MASTERS,
        "if self.flat.grad is not None:\n            self.flat.grad.zero_()\n",
        "",
        _MASTER_TESTS,
    ),
    Mutant(
        "masters are rounded with the model",
        _MASTERS,
        "self._compute.copy_(self.flat.data)",
        "self.flat.data.copy_(self._compute.copy_(self.flat.data))",
        _MASTER_TESTS,
    ),
    Mutant(
        "clipping lengthens short gradients",
        _MASTERS,
        "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "max_norm / (norm + 1e-6)",
        _MASTER_TESTS,
    ),
    Mutant(
        "gradients are never clipped",
        _MASTERS,
        "if max_norm > 0:",
        "if max_norm < 0:",
        _MASTER_TESTS,
    ),
    Mutant(
        "each group is clipped by itself",
        _MASTERS,
        "        for gradient in gradients:\n            gradient.mul_(factor)",
        "        for gradient in gradients:\n"
        "            gradient.mul_((max_norm / (gradient.norm() + 1e-6)).clamp(max=1.0))",
        _MASTER_TESTS,
    ),
    Mutant(
        "the setting for clipping is not used",
        _STEP,
        "clip_(run.groups, run.config.optimizer.max_grad_norm)",
        "clip_(run.groups, 0.0)",
        _RATE_TESTS,
    ),
    Mutant(
        "nothing decays",
        "sdlora/training/optimizers.py",
        "settings.weight_decay if group.decays else 0.0",
        "0.0",
        (*_MASTER_TESTS, *_DECAY_TESTS),
    ),
    Mutant(
        "DoRA's magnitudes decay",
        "sdlora/training/trainable.py",
        "decays=not magnitude",
        "decays=True",
        _DECAY_TESTS,
    ),
    Mutant(
        "LoRA+ multiplies the rate of the other factor",
        "sdlora/training/trainable.py",
        "if factor in layer.form.up else 1.0",
        "if factor not in layer.form.up else 1.0",
        _RATE_TESTS,
    ),
    Mutant(
        "the start that PiSSA subtracts is added",
        "sdlora/training/trainable.py",
        "[pair.up, -other.up]",
        "[pair.up, other.up]",
        (
            "training/test_train_kinds.py::test_pissa_takes_the_largest_singular_values_and_leaves_the_base_alone",
        ),
    ),
    Mutant(
        "a file to continue from gets another alpha in every layer of another rank",
        "sdlora/adapters/initial.py",
        "else alpha * module_rank / rank",
        "else alpha",
        ("training/test_train_kinds.py", "adapters/test_attach.py"),
    ),
    Mutant(
        "a run in which nothing was learned ends well",
        _STATE,
        "if run.step == 0 or (run.learned and masters_digest(run) != run.start):",
        "if True:",
        ("training/test_train.py::test_an_adapter_that_did_not_change_is_an_error",),
    ),
    # checkpoints
    Mutant(
        "a second save at one step writes it again",
        _CHECKPOINT,
        "if is_whole(CheckpointFolder(target, step)):",
        "if False:",
        _CHECKPOINT_TESTS,
    ),
    Mutant(
        "a damaged checkpoint of the same step stays damaged",
        _CHECKPOINT,
        "if is_whole(CheckpointFolder(target, step)):",
        "if True:",
        _CHECKPOINT_TESTS,
    ),
    Mutant(
        "checkpoints are sorted as texts",
        _FOLDER,
        "sorted(folders, key=lambda folder: folder.step)",
        "sorted(folders, key=lambda folder: folder.path.name)",
        _FOLDER_TESTS,
    ),
    Mutant(
        "previews are sorted as texts",
        _FOLDER,
        "key=lambda preview: (preview.step, preview.number)",
        "key=lambda preview: preview.file.name",
        _FOLDER_TESTS,
    ),
    Mutant(
        "digests are not compared",
        _CHECKPOINT,
        "if file_digest(folder.path / name) != digest:",
        "if False:",
        _CHECKPOINT_TESTS,
    ),
    Mutant(
        "pruning keeps one more",
        _CHECKPOINT,
        "folders[: -max(1, keep)], folders[-max(1, keep) :]",
        "folders[: -max(1, keep) - 1], folders[-max(1, keep) - 1 :]",
        _CHECKPOINT_TESTS,
    ),
    Mutant(
        "pruning removes the last whole checkpoint",
        _CHECKPOINT,
        "if not any(is_whole(folder) for folder in reversed(kept)):",
        "if False:",
        _CHECKPOINT_TESTS,
    ),
    Mutant(
        "the setting for how many checkpoints are kept is not used",
        _TRAIN,
        "keep, root = run.config.training.keep_checkpoints,",
        "keep, root = 1,",
        ("training/test_train.py::test_run_folder_holds_what_the_documentation_promises",),
    ),
    Mutant(
        "a request to save is not heard",
        _TRAIN,
        "requests & {SAVE, STOP}",
        "requests & {STOP}",
        ("training/test_train_steps.py",),
    ),
    # resuming
    Mutant(
        "the optimizer starts again when a run is resumed",
        _STATE,
        "    _restore_optimizer(run, saved)\n",
        "",
        _RESUME_TESTS,
    ),
    Mutant(
        "the scaler starts again when a run is resumed",
        _STATE,
        'run.scaler.load_state_dict(saved.state["scaler"])',
        "pass",
        (*_RESUME_TESTS, "training/test_train_steps.py"),
    ),
    Mutant(
        "the values start again when a run is resumed",
        _STATE,
        'group.master.load(saved.tensors[f"{group.name}.master"])',
        "pass",
        _RESUME_TESTS,
    ),
    Mutant(
        "a resumed run repeats a step",
        _STATE,
        "run.step, run.started_at = saved.step,",
        "run.step, run.started_at = saved.step - 1,",
        _RESUME_TESTS,
    ),
    Mutant(
        "a run is resumed with other images",
        _STATE,
        'if saved.state["run_id"] != dataset_digest(run.dataset.items):',
        "if False:",
        _LEGAL_RESUME_TESTS,
    ),
    Mutant(
        "a run is resumed with other settings",
        _STATE,
        "    if changed:\n",
        "    if False:\n",
        _LEGAL_RESUME_TESTS,
    ),
    Mutant(
        "a run is resumed with another optimizer's settings",
        _STATE,
        '    "output.",\n',
        '    "output.",\n    "optimizer.",\n',
        ("training/test_train_steps.py",),
    ),
    Mutant(
        "a run is resumed with another seed",
        _STATE,
        '    "output.",\n',
        '    "output.",\n    "training.seed",\n',
        ("training/test_train_steps.py",),
    ),
)
