"""Learning rates against diffusers' schedules, and against the 2023 example's; the loss scale."""

import dataclasses
import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from ldm.fields import LR_SCHEDULES
from ldm.options import TrainOptions
from ldm.training.rates import LearningRate, LossScale

UPDATES = 60


def test_learning_rate():
    assert {LearningRate(3e-6)(step) for step in (0, 1, 10_000)} == {3e-6}
    rate = LearningRate(1.0, end=0.1, warmup_steps=4, decay_steps=10)
    assert [rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert math.isclose(rate(9), 0.55) and math.isclose(rate(14), 0.1) and math.isclose(rate(99), 0.1)


def test_loss_scale():
    scale = LossScale(8.0, 2.0, window=3)
    values = []
    for overflow in (False, False, False, True, False, True, True, True, True, True):
        scale.update(overflow)
        values.append(scale.value)
    assert values == [8, 8, 16, 8, 8, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_step_equals_diffusers(schedule, warmup):
    cycles, power = (3 if "restarts" in schedule else 1), (2.0 if schedule == "polynomial" else 1.0)
    options = TrainOptions(
        start_learning_rate=1e-3, lr_schedule=schedule, warmup_steps=warmup, lr_cycles=cycles, lr_power=power
    ).until(UPDATES)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=UPDATES, num_cycles=cycles, power=power
    )
    ours = LearningRate.of(options)
    for step in range(UPDATES + 1):
        wanted = reference.get_last_lr()[0]
        assert math.isclose(ours(step), wanted, rel_tol=1e-12, abs_tol=1e-18), (step, ours(step), wanted)
        optimizer.step(), reference.step()
    assert ours(0) < 1e-3 or not warmup


def test_the_end_of_a_decay_is_that_of_the_run_unless_it_is_given():
    options = TrainOptions(lr_schedule="linear", warmup_steps=10)
    assert options.until(60).decay_steps == 50 and options.until(5).decay_steps == 1
    assert dataclasses.replace(options, decay_steps=7).until(60).decay_steps == 7
    assert (
        TrainOptions(lr_schedule="constant").until(60).decay_steps
        == 0
        == TrainOptions().until(60).decay_steps
    )
    rate = LearningRate(1.0, end=0.5, decay_steps=10, schedule="linear")
    assert [rate(step) for step in (0, 5, 10, 99)] == [1.0, 0.75, 0.5, 0.5]
