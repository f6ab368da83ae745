"""Which update is of which epoch, and which ones leave a checkpoint; by hand."""

from ldm.options import TrainOptions
from ldm.training.progress import Progress


def test_updates_epochs_and_checkpoints():
    progress = Progress(samples_per_epoch=8, samples_per_update=3, epochs=3, checkpoint_interval=2)
    assert progress.total_updates == 8 and progress.total_samples == 24
    assert [progress.epoch(update) for update in range(1, 9)] == [1, 1, 2, 2, 2, 3, 3, 3]
    assert [progress.epochs_done(update) for update in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert [progress.epoch_to_save(update) for update in range(9)] == [None] * 6 + [2, None, 3]
    assert [progress.checkpoints_to_come(update) for update in range(9)] == [2, 2, 2, 2, 2, 2, 1, 1, 0]


def test_a_last_update_that_is_filled_up_ends_the_last_epoch():
    progress = Progress(samples_per_epoch=5, samples_per_update=4, epochs=1)
    assert (progress.total_updates, progress.epochs_done(1), progress.epochs_done(2)) == (2, 0, 1)
    assert [progress.epoch_to_save(update) for update in (0, 1, 2)] == [None, None, 1]
    assert [progress.epoch(update) for update in (0, 1, 2)] == [1, 1, 1]


def test_an_update_of_several_epochs_leaves_the_last_of_them():
    progress = Progress(samples_per_epoch=2, samples_per_update=7, epochs=10)
    assert progress.total_updates == 3
    assert [progress.epoch_to_save(update) for update in (1, 2, 3)] == [3, 7, 10]


def test_processes_share_an_update():
    options = TrainOptions(train_batch_size=2, gradient_accumulation_steps=3, train_data_repeats=40, epochs=8)
    progress = Progress.of(options, 5 * options.train_data_repeats, processes=4)
    assert progress.samples_per_update == 24 and progress.total_updates == 67  # 1,600 samples


def test_a_number_of_updates_ends_the_run_whatever_the_epochs(caplog):
    caplog.set_level("INFO")
    options = TrainOptions(
        train_batch_size=2, epochs=8, max_updates=25, ckpt_save_interval=2, text_encoder_stop=0.3
    )
    progress = Progress.of(options, 20, processes=1)
    assert (progress.total_updates, progress.epochs, progress.total_samples) == (25, 3, 50)
    assert "25 updates (--max_updates): 2.50 epochs of 20 samples, instead of 8" in caplog.text
    assert [update for update in range(26) if progress.epoch_to_save(update)] == [20, 25]
    assert progress.epoch_to_save(25) == 3 and progress.checkpoints_to_come(0) == 2
    assert progress.text_stop == 8 and [progress.is_past_text_stop(n) for n in (7, 8)] == [False, True]
    longer = Progress.of(TrainOptions(train_batch_size=2, epochs=1, max_updates=25), 20, processes=1)
    assert (longer.total_updates, longer.text_stop, longer.is_past_text_stop(99)) == (25, None, False)
