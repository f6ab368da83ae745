"""A short form of the demonstration: an eighth of the class pictures.

It fails where DreamBooth stops working.
"""

import subprocess
import sys

from conftest import ROOT
from drawer import CONFIG  # noqa: E402
from evaluation import Evaluation  # noqa: E402

SHORT = ["--num_class_images=20", "--ckpt_save_interval=4"]
# Without captions the short form gave 0.96, 0.92 and 0.96 with seeds 1, 2 and 3, and 1.00 for the prompt; the
# base model gives 0. The seed is fixed, so that the margin of eight times that spread is for the roundings of
# other processors.
SUBJECT_FLOOR, PROMPT_FLOOR = 0.75, 0.85


def test_the_subject_is_learned_and_the_prompt_followed(tmp_path):
    command = [
        sys.executable,
        "train_dreambooth.py",
        f"--train_config={CONFIG}.json",
        f"--output_path={tmp_path / 'out'}",
    ]
    subprocess.run(
        [*command, f"--class_data_dir={tmp_path / 'class'}", *SHORT], cwd=ROOT, check=True, timeout=900
    )
    evaluation = Evaluation(tmp_path / "sheets", each=1)
    accuracy = evaluation.judges.accuracy()
    assert accuracy["judge_class_right"] >= 0.95 and accuracy["judge_place_right"] >= 0.98
    assert accuracy["judge_subject_recall"] >= 0.95 and accuracy["judge_subject_false_alarms"] <= 0.02
    figures = evaluation.fidelity(
        evaluation.draw_subject_in_new_places(tmp_path / "out/dreambooth_epoch_4.ckpt", "penguin"), "penguin"
    )
    print(figures)
    assert figures["subject_fidelity"] >= SUBJECT_FLOOR and figures["prompt_fidelity"] >= PROMPT_FLOOR
