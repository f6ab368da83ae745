"""The training step against a plain PyTorch loop with diffusers and torch.optim.AdamW."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from conftest import SHALLOW, V1, in_half, random_model, torch_networks, weights_as_arrays
from torch_training import torch_training
from trainings import OPTIONS, make_samples, make_trainer, progress_of, weights_of_trainer

from ldm.training import trained as trained_module
from ldm.training import trainer as trainer_module
from ldm.training.trained import count_values, settle_recompute
from ldm.training.trainer import UpdateResult
from ldm.weights.arrays import as_numpy
from ldm.weights.diffusers_names import diffusers_names
from ldm.weights.embeddings import ROW

STEPS = 20


def compare(tmp_path, config, options, with_class=True):
    """Largest relative difference of the losses, and relative L2 difference of the change of the weights."""
    samples = make_samples(tmp_path, options, with_class)
    model = random_model(config)
    before = weights_as_arrays(model)
    trainer = make_trainer(model, config, options, samples)
    # building the trainer renames nothing
    assert {p.name for p in model.get_parameters()} - {ROW} == before.keys()
    ours = np.array([trainer.one_update()[0] for _ in range(STEPS)])
    stop = trainer.text_stop and trainer.text_stop.update
    theirs, final = torch_training(torch_networks(before, config), config, options, samples, STEPS, stop)
    difference = change = 0.0
    weights = trainer.weights()
    for parameter in model.get_parameters():
        if parameter.name == ROW:
            continue  # which is in the table
        moved = as_numpy(weights.get(parameter.name, parameter)) - before[parameter.name]
        folder, names = diffusers_names(parameter.name, config)
        names = [n if (folder, n) in final else n.removeprefix("text_model.") for n in names]
        if (folder, names[0]) not in final:
            assert not moved.any(), f"{parameter.name} is frozen and moved"
            continue
        reference = (
            np.concatenate([final[folder, name] for name in names]).reshape(moved.shape)
            - before[parameter.name]
        )
        difference += np.square(moved - reference, dtype=np.float64).sum()
        change += np.square(reference, dtype=np.float64).sum()
    return np.abs(ours / np.where(theirs == 0, 1, theirs) - (theirs != 0)).max(), np.sqrt(difference / change)


PREDICTS_V = dataclasses.replace(
    SHALLOW, noise_schedule=dataclasses.replace(SHALLOW.noise_schedule, prediction_type="v_prediction")
)
VARIANTS = {
    "text_encoder_accumulation_clipping_recompute": (
        SHALLOW,
        dict(
            train_text_encoder=True,
            gradient_accumulation_steps=2,
            clip_grad=True,
            max_grad_norm=0.5,
            recompute=True,
        ),
    ),
    "v_prediction_frozen_text_accumulation_clipping": (
        PREDICTS_V,
        dict(train_text_encoder=False, gradient_accumulation_steps=2, clip_grad=True, max_grad_norm=0.5),
    ),
    "v_prediction_min_snr_offset_noise_and_an_own_rate_of_the_text_encoder": (
        PREDICTS_V,
        dict(min_snr_gamma=5.0, noise_offset=0.1, text_encoder_learning_rate=3e-5, max_timestep=900),
    ),
    "text_encoder_frozen_after_eight_updates": (
        SHALLOW,
        dict(text_encoder_stop=0.2, min_snr_gamma=3.0, clip_grad=True, max_grad_norm=0.5),
    ),
    "a_word_of_a_frozen_text_encoder": (
        SHALLOW,
        dict(train_text_encoder=False, train_token="sks", token_learning_rate=1e-3),
    ),
    "stable_diffusion_1_text_encoder": (V1, dict(train_text_encoder=True)),
}


@pytest.mark.parametrize("config, changes", VARIANTS.values(), ids=VARIANTS)
def test_twenty_steps_equal_pytorch(tmp_path, config, changes):
    loss_error, weight_error = compare(tmp_path, config, dataclasses.replace(OPTIONS, **changes))
    print(
        f"largest relative loss difference {loss_error:.2e}, relative L2 difference of the change "
        f"{weight_error:.2e}"
    )
    assert loss_error <= 1e-4
    assert weight_error <= 1e-3


def test_recipes_of_no_effect_change_no_bit(tmp_path):
    """The rates of all kinds the same, weights of the loss that are 1, a warm-up and decay of none."""
    neutral = dataclasses.replace(
        OPTIONS, text_encoder_learning_rate=OPTIONS.start_learning_rate, min_snr_gamma=1e30,
        lr_schedule="constant", max_timestep=1000,
    )  # fmt: skip
    weights, losses = [], []
    for options in (OPTIONS, neutral):
        trainer = make_trainer(random_model(SHALLOW), SHALLOW, options, make_samples(tmp_path, options))
        losses.append([trainer.one_update()[0] for _ in range(3)])
        weights.append(weights_of_trainer(trainer))
    assert np.array_equal(*losses) and weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(values, weights[1][name]) for name, values in weights[0].items())


def test_twenty_steps_of_an_accelerator_equal_pytorch(tmp_path, accelerator):
    options = dataclasses.replace(OPTIONS, clip_grad=True, max_grad_norm=0.5)
    loss_error, weight_error = compare(tmp_path, SHALLOW, options)
    print(f"largest relative loss difference {loss_error:.2e}, change of the weights {weight_error:.2e}")
    assert loss_error <= 1e-4 and weight_error <= 1e-3


def test_an_accelerator_in_float16_trains_float32_masters(tmp_path, accelerator, monkeypatch):
    """Its losses are those of a CPU in float16, as far as that rounds; an overflow leaves all as it was; and
    a CPU takes over its state.
    """
    config, options = in_half(SHALLOW), dataclasses.replace(OPTIONS, use_ema=True, clip_grad=True)
    samples, model = make_samples(tmp_path, options), random_model(config)
    trainer = make_trainer(model, config, options, samples)
    dtypes = [str(parameter.dtype) for parameter in trainer.masters.own]
    assert set(dtypes) == {"Float16", "Float32"} and 4 * len(trainer.masters.trained) < len(dtypes)
    losses = [trainer.one_update()[0] for _ in range(8)]
    before = {name: array.copy() for name, array in trainer.state()[0].items()}
    trainer.loss_scale.value = 2.0**60
    assert trainer.one_update().skipped
    arrays, counters = trainer.state()
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())
    followed = dict(zip((p.name for p in trainer.masters.own), trainer.masters.own))
    for name, master in trainer.weights().items():
        own = followed[name]
        assert np.array_equal(own.asnumpy(), ms.Tensor(master).astype(own.dtype).asnumpy())
    monkeypatch.undo()
    cpu = make_trainer(random_model(config), config, options, samples)
    theirs = [cpu.one_update()[0] for _ in range(8)]
    error = np.abs(np.array(losses) / np.array(theirs) - 1).max()
    print(f"largest relative difference of a loss {error:.1e}")
    assert error <= 1e-2
    cpu.restore(arrays, counters, "state")
    assert all(np.array_equal(p.asnumpy(), arrays[name]) for name, p in cpu.state()[0].items())


def test_without_class_pictures_the_loss_is_the_instance_term(tmp_path):
    options = dataclasses.replace(OPTIONS, with_prior_preservation=False, use_ema=True, warmup_steps=3)
    samples, model = make_samples(tmp_path, options, with_class=False), random_model(SHALLOW)
    trainer = make_trainer(model, SHALLOW, options, samples)
    reports = [report for report, _ in zip(trainer.updates(progress_of(options, samples)), range(4))]
    assert all(report.loss == report.instance_loss and report.class_loss == 0 for report in reports)
    assert np.allclose([report.learning_rate for report in reports], np.array([1, 2, 3, 3]) / 3 * 1e-4)
    assert [report.epoch for report in reports] == [1] * 4 and reports[0].total_steps == 40
    averages = trainer.averages()
    assert averages.keys() == trainer.weights().keys()
    assert any(
        not np.array_equal(averages[name].asnumpy(), p.asnumpy()) for name, p in trainer.weights().items()
    )
    trained, all_values = count_values(model, options)[1::-1]
    assert trained == trainer.trained_values == sum(p.size for p in trainer.masters.trained) < all_values
    # weights, two moments, averages, of 4 bytes each
    assert sum(p.nbytes for p in trainer.state()[0].values()) == 4 * 4 * trained


def test_float16_training_and_overflow(tmp_path):
    """An overflow leaves weights and moments alone and halves the scale; then training goes on, with falling
    loss.
    """
    config = in_half(SHALLOW)
    options = dataclasses.replace(
        OPTIONS, init_loss_scale=2.0**40, loss_scale_factor=2.0**12, clip_grad=True, start_learning_rate=1e-3
    )
    samples, model = make_samples(tmp_path, options), random_model(config)
    trainer = make_trainer(model, config, options, samples)
    before = weights_as_arrays(model)
    _, _, skipped = trainer.one_update()
    assert skipped and trainer.loss_scale.value == 2.0**28
    assert all(np.array_equal(value, before[name]) for name, value in weights_as_arrays(model).items())
    assert not any(moment.asnumpy().any() for moment in trainer.optimizer.adam_m)
    reports = [report for report, _ in zip(trainer.updates(progress_of(options, samples)), range(18))]
    assert any(not report.skipped for report in reports) and "OVERFLOW" not in reports[-1].line()
    applied = [report.loss for report in reports if not report.skipped]
    assert np.isfinite(applied).all() and np.mean(applied[-4:]) < np.mean(applied[:4])
    assert {p.dtype for p in model.get_parameters()} == {ms.float32}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    samples = make_samples(tmp_path)
    trainer = make_trainer(random_model(SHALLOW), SHALLOW, OPTIONS, samples)
    trainer.one_update = lambda: UpdateResult(np.array([np.nan, 1, 1]), 0.0, False)
    with pytest.raises(FloatingPointError, match="lower start_learning_rate"):
        next(trainer.updates(progress_of(OPTIONS, samples)))


def test_too_many_overflows_in_a_row_end_the_training_with_its_weights(tmp_path, monkeypatch):
    """A scale that no overflow brings down far enough: after three (here) the run ends, the weights are those
    of before.
    """
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 3)
    options = dataclasses.replace(OPTIONS, init_loss_scale=2.0**100, loss_scale_factor=1.5)
    model = random_model(SHALLOW)
    before = weights_as_arrays(model)
    samples, half = make_samples(tmp_path, options), random_model(in_half(SHALLOW))
    trainer = make_trainer(half, in_half(SHALLOW), options, samples)
    reports = []
    with pytest.raises(
        FloatingPointError,
        match="3 updates in a row overflowed in float16, up to step 3: lower start_learning_rate",
    ):
        reports += trainer.updates(progress_of(options, samples))
    assert trainer.global_step == 3 and trainer.updates_applied == 0
    assert all(np.array_equal(value, before[name]) for name, value in weights_as_arrays(half).items())
    trainer.require_finite_weights()
    trainer.masters.trained[0].set_data(trainer.masters.trained[0] * float("nan"))
    with pytest.raises(FloatingPointError, match="1 weights are not finite after step 3"):
        trainer.require_finite_weights()


def test_recompute_is_decided_once_and_never_with_dropout(monkeypatch):
    for low in (False, True):
        monkeypatch.setattr(trained_module, "memory_is_low", lambda size, low=low: low)
        assert [settle_recompute(given, 10, 0.0) for given in (True, False, None)] == [True, False, low]
        assert settle_recompute(None, 10, 0.1) is False
    monkeypatch.setattr(trained_module, "memory_is_low", lambda size: False)
    assert [settle_recompute(None, size, 0.0, has_lora=True) for size in (10, 10 << 30)] == [False, True]
    with pytest.raises(ValueError, match="recompute does not work with dropout"):
        settle_recompute(True, 10, 0.1)
