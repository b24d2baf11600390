"""Plants known defects, one at a time, in a copy of the package and sees that a test finds each.

    make planted        all of them; `python tests/planted.py WORD` only those with WORD in their name

Most are defects of other implementations of these methods. A defect that no test finds ends this with exit code 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNIT, RUN = "tests/unit/test_", "tests/integration/test_"

# What is wrong, the file, what stands there, what is planted instead, the test that must fail.
DEFECTS = [
    ("attention runs over the batch", "vit.py", "return block(x)", "return block(x.transpose(0, 1)).transpose(0, 1)",
     UNIT + "vit.py::test_features_of_an_image_do_not_depend_on_its_batch_mates"),
    ("positions are added as if the class token had one", "vit.py",
     "return 0 if self.vit.no_embed_class or self.vit.pos_embed is None else", "return",
     UNIT + "vit.py::test_features_are_timms"),
    ("kept patches lose their positions", "vit.py", "take(position.expand(len(tokens), -1, -1), keep)",
     "position[:, : keep.shape[1]]", UNIT + "vit.py::test_keeping_all_patches_in_another_order_only_reorders"),
    ("the image size does not reach timm", "methods/base.py", '{"img_size": image_size}', "{}",
     UNIT + "data2vec.py::test_it_is_public_and_builds_from_a_name"),
    ("the last norm of pooling models is lost", "vit.py", "vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()",
     "vit.fc_norm = nn.Identity()", UNIT + "vit.py::test_features_are_timms"),
    ("masks are scattered patches", "masking.py", "while count < n_masked:", "while False:",
     UNIT + "masking.py::test_masks_are_blocks_and_not_scattered_cells"),
    ("masks fall short of their number", "masking.py", "if count < n_masked:", "if False:",
     UNIT + "masking.py::test_always_exactly_the_number_asked_for"),
    ("the loss is over all patches", "methods/data2vec.py", 'take(encoded.tokens, masks["query"])',
     "encoded.tokens[:, : masks['query'].shape[1]]",
     UNIT + "data2vec.py::test_the_loss_ignores_what_is_predicted_at_patches_that_were_seen"),
    ("the mask has the wrong polarity", "methods/data2vec.py", 'encode(views[0], query=masks["query"])',
     'encode(views[0], query=torch.stack([torch.tensor([i for i in range(16) if i not in q]) for q in masks["query"]]))',
     UNIT + "data2vec.py::test_the_student_does_not_see_the_hidden_patches_and_the_teacher_sees_all"),
    ("the teacher sees the masked image", "methods/data2vec.py",
     "self.teacher.encode(images, hidden", "self.teacher.encode(images, query=query, hidden",
     UNIT + "data2vec.py::test_target_equals_naive_code"),
    ("no norm of each block's state", "methods/data2vec.py", "norm(at_least_fp32(h))", "at_least_fp32(h)",
     UNIT + "data2vec.py::test_target_equals_naive_code"),
    ("no norm after the mean", "methods/data2vec.py", "return layer_norm(take(mean, query))", "return take(mean, query)",
     UNIT + "data2vec.py::test_target_equals_naive_code"),
    ("the lowest blocks instead of the top ones", "methods/data2vec.py", "range(L - K, L)", "range(K)",
     UNIT + "data2vec.py::test_target_equals_naive_code"),
    ("no regressor", "methods/data2vec.py", "self.regressor(take(", "(take(",
     UNIT + "data2vec.py::test_loss_equals_naive_code"),
    ("the loss is summed over patches", "methods/data2vec.py", "beta=self.config.beta)", "beta=self.config.beta) * 10",
     UNIT + "data2vec.py::test_loss_equals_naive_code"),
    ("the loss is in half precision", "methods/data2vec.py", 'at_least_fp32(self.regressor(take(encoded.tokens, masks["query"])))',
     'self.regressor(take(encoded.tokens, masks["query"]))',
     UNIT + "data2vec.py::test_predictions_and_loss_stay_in_fp32_under_autocast"),
    ("the teacher follows train()", "methods/base.py", "self.teacher.eval()", "pass",
     UNIT + "data2vec.py::test_the_teacher_makes_no_noise_takes_no_gradient_and_is_not_decayed"),
    ("the teacher is never updated", "methods/data2vec.py", "ema_update(self.teacher", "(lambda *a: None)(self.teacher",
     UNIT + "data2vec.py::test_after_step_moves_the_teacher_once_by_the_tau_of_the_step"),
    ("nobody is told that the teacher stands still", "methods/base.py", "self._at_backward is not None and", "False and",
     UNIT + "data2vec.py::test_a_loop_that_forgets_after_step_is_warned_once"),
    ("the embedding is the class token", "methods/base.py", "self.student.embed(views[0])", 'self.student.embed(views[0], "cls")',
     UNIT + "data2vec.py::test_in_eval_mode_it_gives_the_embedding_of_the_whole_image"),
    ("position embeddings are decayed", "methods/base.py", 'f"{prefix}.{name}" if prefix else name', "name",
     UNIT + "data2vec.py::test_decayed_parameters_are_the_matrices"),
    ("integer buffers are averaged", "ema.py", "old.copy_(new)", "old.copy_(old * tau + new * (1 - tau))",
     UNIT + "ema.py::test_buffers_are_copied_and_integers_survive"),
    ("buffers are left alone", "ema.py", "old.copy_(new)", "pass",
     UNIT + "ema.py::test_buffers_are_copied_and_integers_survive"),
    ("the teacher is kept in bf16", "ema.py", "parameter.data = parameter.data.float()", "pass",
     UNIT + "ema.py::test_a_half_precision_student_has_a_full_precision_teacher_that_moves"),
    ("the rate divides by a warm-up of nothing", "schedules.py", "if progress < warmup:", "if progress <= warmup:",
     UNIT + "schedules.py::test_runs_of_1_to_25_steps_have_a_rate_at_every_step"),
    ("tau divides by a rise of nothing", "schedules.py", "last if progress >= until else", "",
     UNIT + "schedules.py::test_linear_ramp_rises_then_stays"),
    ("a longer run jumps to its new rate", "schedules.py", "if segment == 0:", "if True:",
     UNIT + "schedules.py::test_a_longer_plan_begins_at_the_present_rate_and_reaches_the_new_one"),
    ("tau rises once an epoch", "train.py", "progress = schedule.progress(step + 1)",
     "progress = schedule.progress((step + 1) // job.steps_per_epoch * job.steps_per_epoch)",
     RUN + "train.py::test_the_teacher_moves_once_a_step_with_the_progress_of_the_step"),
    ("the gradient is clipped after every pass", "train.py", "        logs.add({",
     "            nn.utils.clip_grad_norm_(method.parameters(), config.clip_grad)\n            logs.add({",
     RUN + "train.py::test_accumulation_slices_a_step_and_clips_once"),
    ("passes are summed instead of averaged", "train.py", "loss / config.grad_accum", "loss",
     RUN + "train.py::test_accumulation_slices_a_step_and_clips_once"),
    ("a gradient that is not finite is applied", "train.py", "optimizer.found_inf = skipped", "optimizer.found_inf = 0 * skipped",
     RUN + "train.py::test_a_loss_that_is_not_finite_skips_its_step_and_is_counted"),
    ("an infinite loss with a finite gradient is applied", "train.py", "output.loss * (1 + 0 * output.loss.detach())",
     "output.loss", RUN + "train.py::test_a_loss_that_is_not_finite_skips_its_step_and_is_counted"),
    ("the loop waits for the loss in every step", "train.py", "logs.add({", "output.loss.item(); logs.add({",
     RUN + "train.py::test_a_step_does_not_wait_for_the_device_between_log_lines"),
    ("dropout reaches only the head", "plan.py", "proj_drop_rate=config.dropout", "drop_rate=config.dropout",
     RUN + "train.py::test_dropout_repeats_with_the_seed_and_does_something"),
    ("files only at epochs divisible by ten", "plan.py", "% config.save_every == 0 or e + 1 == config.epochs",
     "% config.save_every == 0", RUN + "train.py::test_a_run_of_5_epochs_leaves_its_last_epoch_and_one_of_25_every_tenth"),
    ("upper-case suffixes are not found", "sources.py", "os.path.splitext(name)[1].lower()", "os.path.splitext(name)[1]",
     UNIT + "sources.py::test_finds_images_at_any_depth_in_any_case_and_nothing_else"),
    ("only the top folder is looked into", "sources.py", "yield from _files(root, below + name + \"/\", seen)", "pass",
     UNIT + "sources.py::test_finds_images_at_any_depth_in_any_case_and_nothing_else"),
    ("16-bit images are clipped", "sources.py", 'if image.mode.startswith("I;16"):', "if False:",
     UNIT + "sources.py::test_sixteen_bits_are_scaled_not_clipped"),
    ("the camera's orientation is ignored", "sources.py", "ImageOps.exif_transpose(image)", "image",
     UNIT + "sources.py::test_the_camera_orientation_is_applied"),
    ("an unreadable image ends the run", "sources.py", "return one_line(error)", "raise",
     RUN + "errors.py::test_unreadable_images_do_not_end_a_run"),
    ("an unreadable image is replaced at random", "data.py", "derive(index, attempt)", "int(torch.randint(10**6, ()))",
     RUN + "errors.py::test_unreadable_images_do_not_end_a_run"),
    ("views depend on who draws them", "data.py", 'seeded(self.seed, "views", position), one_thread()', "one_thread()",
     UNIT + "data.py::test_views_and_masks_do_not_depend_on_workers_or_on_where_a_run_was_resumed"),
    ("masks depend on who draws them", "data.py", 'generator(self.seed, "masks", position)', "torch.default_generator",
     UNIT + "data.py::test_views_and_masks_do_not_depend_on_workers_or_on_where_a_run_was_resumed"),
    ("views of an image are the same in every epoch", "data.py", '"views", position', '"views", index',
     UNIT + "data.py::test_a_folder_smaller_than_a_step_repeats_with_fresh_views"),
    ("a resumed run starts its data over", "train.py", "        job.first_step,\n", "        0,\n",
     RUN + "resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit"),
    ("a resumed run has a fresh optimizer", "train.py", 'optimizer.load_state_dict(job.restored["optimizer"])', "pass",
     RUN + "resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit"),
    ("a resumed run has a fresh teacher", "plan.py", 'method.load_state_dict(content["method_state"])',
     'method.load_state_dict(content["method_state"]); method.teacher = __import__("copy").deepcopy(method.student)',
     RUN + "resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit"),
    ("a resumed run draws other dropout", "train.py", '"dropout", step, micro', '"dropout", step - job.first_step, micro',
     RUN + "resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit"),
    ("an extended run forgets its segments", "plan.py", 'Plan(content["segments"]', "Plan(((0, 48),)",
     RUN + "resume.py::test_more_epochs_make_the_run_longer_without_a_jump_and_resume_exactly_too"),
    ("typed options are ignored on resume", "plan.py", "if name in MAY_DIFFER or", "if True or",
     RUN + "resume.py::test_what_contradicts_the_checkpoint_is_refused_by_name"),
    ("a killed run leaves its lock to its workers", "run.py", "fcntl.lockf(", "fcntl.flock(",
     RUN + "resume.py::test_a_run_killed_at_any_moment_loses_only_what_came_after_its_last_checkpoint"),
    ("files are written in place", "checkpoint.py", 'path.with_name(f".{path.name}.{os.getpid()}.tmp")', "path",
     UNIT + "checkpoint.py::test_a_write_that_fails_leaves_the_old_file_and_no_other"),
    ("pickles are run", "checkpoint.py", "weights_only=True", "weights_only=False",
     UNIT + "checkpoint.py::test_a_file_that_would_run_code_is_refused_and_not_run"),
    ("extract replaces what it cannot read", "extract.py", "image if isinstance(image, str) else self.transform.resized(image)",
     'self.transform.resized(Image.new("RGB", (9, 9)) if isinstance(image, str) else image)',
     RUN + "extract.py::test_unreadable_images_are_left_out_and_listed_never_replaced"),
    ("extract uses another transform than the model's", "extract.py", "images = model.transform.normalized(",
     "images = ImageTransform((16, 16), (0, 0, 0), (1, 1, 1)).normalized(",
     RUN + "extract.py::test_npz_holds_features_and_paths_in_sorted_order"),
    ("the loss is cast down from double", "methods/data2vec.py", "torch.promote_types(x.dtype, torch.float32)", "torch.float32",
     UNIT + "data2vec.py::test_loss_equals_naive_code"),
    ("a tau typed above the rule's end makes a run that cannot be resumed", "config.py",
     "if (config.tau_initial or 0) > last:", "if False:",
     RUN + "resume.py::test_a_tau_that_is_more_than_the_rule_gives_can_be_typed_and_resumed"),
    ("the teacher has another normalisation than the student", "plan.py",
     "encoder.transform = replace(encoder.transform, **start.normalization)",
     "method.student.transform = replace(method.student.transform, **start.normalization)",
     RUN + "resume.py::test_both_encoders_keep_the_normalisation_of_the_weights_they_start_from"),
    ("the mask token of the first weights is lost", "plan.py", "encoder.start_mask_token(start.mask_token)", "pass",
     RUN + "resume.py::test_a_run_may_start_from_a_training_checkpoint_with_its_mask_token"),
    ("changed images are allowed for ever", "plan.py", "for n in OF_THE_CALL}", "for n in ()}",
     RUN + "resume.py::test_changed_images_are_allowed_for_one_call_only"),
    ("the scale of the loss is not restored", "train.py", 'scaler.load_state_dict(job.restored["scaler"])', "pass",
     RUN + "resume.py::test_the_other_precisions_continue_bit_for_bit_too"),
    ("skipped steps are forgotten on resume", "train.py", 'self._skipped + job.restored["skipped"]', "self._skipped",
     RUN + "resume.py::test_the_other_precisions_continue_bit_for_bit_too"),
    ("a line of the metrics is cut by a stop", "train.py", "self._sums.update({name: total.to(job.device) for name, total in window[\"sums\"].items()})", "pass",
     RUN + "resume.py::test_a_line_of_the_metrics_that_spans_the_stop_is_whole"),
    ("every process resumes on the first one's device", "plan.py", "if distributed.processes() > 1:", "if False:",
     RUN + "processes.py::test_each_process_finds_its_own_device_again"),
    ("bad files of other processes go unseen", "train.py", "distributed.union(step.bad)", "step.bad",
     RUN + "processes.py::test_a_bad_file_that_another_process_meets_is_counted_and_listed"),
    ("bad files of an earlier run are held against the next", "run.py", "self.path.unlink(missing_ok=True)", "pass",
     RUN + "errors.py::test_after_too_many_bad_files_mending_or_removing_them_helps"),
    ("names that are no Unicode end a resumed run", "run.py",
     'read_text(encoding="utf-8", errors="surrogateescape")', 'read_text(encoding="utf-8")',
     RUN + "resume.py::test_bad_files_that_were_mended_do_not_end_the_run_that_goes_on"),
    ("what a killed write left stays for ever", "run.py", "leftover.unlink(missing_ok=True)", "pass",
     RUN + "resume.py::test_what_a_killed_write_left_and_spoilt_lines_are_cleared_away"),
    ("the demo clears a folder of somebody else", "demo.py", "not (home / MARK).exists()", 'not (home / "images").is_dir()',
     RUN + "demo.py::test_the_demo_keeps_out_of_other_folders"),
    ("the clock of a dry run starts with the machine", "dry_run.py", "start, seconds = time.perf_counter(), 0.0",
     "start = seconds = 0.0", RUN + "train.py::test_the_time_of_a_dry_run_of_one_step_is_the_time_of_a_step"),
    ("the smaller setting is a larger one", "messages.py", "if time_then < LONG_ON_CPU:", "if True:",
     UNIT + "messages.py::test_a_run_that_no_smaller_setting_makes_short_is_told_so"),
    ("extract keeps all features", "extract.py", "npy.write(compute(pixels).numpy()",
     "npy.write((bad.setdefault(-1, []).append(f := compute(pixels)) or f).numpy()",
     RUN + "extract.py::test_memory_does_not_grow_with_the_number_of_images"),
    ("a line of several processes is one process's after a stop", "train.py", "distributed.mean(total.clone())", "total",
     RUN + "processes.py::test_a_line_that_spans_a_stop_of_two_processes_is_whole"),
    ("each process saves by its own clock", "train.py", "distributed.any_process(time.monotonic() - saved > 60 * config.checkpoint_minutes)",
     "time.monotonic() - saved > 60 * config.checkpoint_minutes",
     RUN + "processes.py::test_processes_whose_clocks_differ_save_together"),
    ("a pipe is waited for without end", "sources.py", "and not _is_special(e)", "", UNIT + "sources.py::test_pipes_are_no_images"),
]  # fmt: skip


def found(file: str, old: str, new: str, test: str) -> bool:
    """Whether the test fails with the defect planted. Raises ValueError when there is no place to plant it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for part in ("data2vec_vision", "tests", "setup.cfg"):
            source = ROOT / part
            copy.mkdir(exist_ok=True)
            shutil.copytree(source, copy / part) if source.is_dir() else shutil.copy(source, copy)
        path = copy / "data2vec_vision" / file
        text = path.read_text()
        if old not in text:
            raise ValueError(f"{file} has no place of {old!r}")
        path.write_text(text.replace(old, new))
        env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(copy / test)],
            cwd=copy, env=env, capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode not in (0, 1):
            raise ValueError(f"{test} did not run: {run.stdout[-500:]}{run.stderr[-500:]}")
        return run.returncode == 1


def main() -> int:
    chosen = [d for d in DEFECTS if len(sys.argv) < 2 or sys.argv[1] in d[0]]
    missed = 0
    for name, *where in chosen:
        try:
            verdict = "found" if found(*where) else "NOT FOUND"
        except ValueError as error:
            verdict = f"NOT PLANTED: {error}"
        missed += verdict != "found"
        print(f"{name:<60} {verdict}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted defects were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
