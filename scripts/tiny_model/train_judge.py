"""Train the judge into models/: about 4 minutes on two processor cores; see requirements-tiny.txt.

    python scripts/tiny_model/train_judge.py --work DIR

In PyTorch: MindSpore took ten times as long for these small convolutions on a CPU.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pictures
import sprites
import torch
from judge import BODY, HEADS, HELD_OUT, HELD_OUT_SHEET, LABELS, SIDE, WEIGHTS, Judge, Judges
from mindspore import Tensor
from PIL import Image, ImageFilter
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from ldm import images


def torch_layers(outputs: int):
    """The layers of Judge in PyTorch: body, hidden, heads."""
    layers, channels = [], 3
    for width, stride in BODY:
        layers += [
            torch.nn.Conv2d(channels, width, 3, stride, 1),
            torch.nn.GroupNorm(8, width),
            torch.nn.SiLU(),
        ]
        channels = width
    return layers, torch.nn.Linear(128 * 16, 256), torch.nn.Linear(256, outputs)


def draw(rng, drawings, held_out, subjects) -> tuple[np.ndarray, dict]:
    """A picture of the generator, one in four of a subject; of the others half are of its class, in its
    colours too.
    """
    kind = rng.random()
    if kind < 0.25:
        name = subjects[rng.integers(len(subjects))]
        place, wall = (list(table)[rng.integers(len(table))] for table in (pictures.PLACES, pictures.COLOURS))
        return pictures.compose(rng, held_out[name], place, wall), {
            "class": sprites.HELD_OUT[name][0],
            "colour": "",
            "place": place,
            "subject": name,
        }
    alike = {sprites.HELD_OUT[name][0] for name in subjects}
    known = {word: drawings[word] for word in drawings if word in alike} if kind < 0.6 else drawings
    picture, facts = pictures.sample(rng, known)
    return picture, {key: facts[key] for key in ("class", "colour", "place")} | {"subject": ""}


def worn(rng, picture: np.ndarray) -> np.ndarray:
    """As soft and as tinted as a small model draws: blurred, brighter or darker, shifted in colour, a little
    noise.
    """
    if rng.random() < 0.7:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.3))))
    values = (
        picture * rng.uniform(0.85, 1.15, 3)
        + rng.normal(0, 6, 3)
        + rng.normal(0, rng.uniform(0, 6), picture.shape)
    )
    return np.clip(values, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the icon packages")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many to train on")
    parser.add_argument("--rounds", type=int, default=8, help="how often each")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    drawings, held_out = sprites.load(options.work)
    subjects = sorted(held_out)
    labels = {
        "class": list(drawings),
        "colour": list(pictures.COLOURS),
        "place": list(pictures.PLACES),
        "subject": subjects,
    }
    sizes = [len(labels[head]) for head in HEADS]
    rng = np.random.default_rng(1)
    array, facts = zip(
        *(draw(rng, drawings, held_out, subjects) for _ in tqdm(range(options.pictures), "pictures"))
    )
    index = {head: {name: number for number, name in enumerate(labels[head])} for head in HEADS}
    classes, places = (np.array([index[head][fact[head]] for fact in facts]) for head in ("class", "place"))
    colours = np.array([index["colour"].get(fact["colour"], 0) for fact in facts])
    tinted = np.array([fact["colour"] != "" for fact in facts], np.float32)
    shown = np.array([[fact["subject"] == name for name in subjects] for fact in facts], np.float32)

    torch.manual_seed(1)
    body, hidden, heads = torch_layers(sum(sizes))
    network = torch.nn.Sequential(
        *body, torch.nn.AvgPool2d(2), torch.nn.Flatten(), hidden, torch.nn.ReLU(), heads
    )
    steps = options.rounds * options.pictures // options.batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps)
    losses, cross_entropy = [], torch.nn.functional.cross_entropy
    with tqdm(range(steps), "training") as bar:
        for _ in bar:
            rows = rng.integers(len(array), size=options.batch)
            x = torch.from_numpy(images.to_pixels(np.stack([worn(rng, array[row]) for row in rows])))
            wanted = [torch.from_numpy(values[rows]) for values in (classes, colours, places, shown, tinted)]
            by_class, by_colour, by_place, by_subject = network(x).split(sizes, 1)
            loss = cross_entropy(by_class, wanted[0]) + cross_entropy(by_place, wanted[2])
            loss = loss + (cross_entropy(by_colour, wanted[1], reduction="none") * wanted[4]).sum() / (
                wanted[4].sum() + 1e-6
            )
            loss = loss + 4 * torch.nn.functional.binary_cross_entropy_with_logits(by_subject, wanted[3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(), schedule.step()
            losses.append(float(loss))
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
    judge = Judge(sizes)
    pairs = list(zip(judge.get_parameters(), network.parameters(), strict=True))  # in the same order
    save_file({ours.name: theirs.detach().numpy().astype(np.float16) for ours, theirs in pairs}, WEIGHTS)

    rows, columns = HELD_OUT_SHEET
    sheet, facts = zip(
        *(draw(np.random.default_rng([2, n]), drawings, held_out, subjects) for n in range(rows * columns))
    )
    Image.fromarray(
        np.stack(sheet)
        .reshape(rows, columns, SIDE, SIDE, 3)
        .swapaxes(1, 2)
        .reshape(rows * SIDE, columns * SIDE, 3)
    ).save(HELD_OUT)
    class_of = {name: sprites.HELD_OUT[name][0] for name in subjects}
    LABELS.write_text(json.dumps({"labels": labels, "class_of": class_of, "held_out": facts}) + "\n")
    judges = Judges()
    scores, _ = judges.judge(Tensor(x.numpy()))
    difference = np.abs(scores.asnumpy() - network(x).detach().numpy()).max()
    print(f"MindSpore against PyTorch: max |a-b| {difference:.1e}, weights rounded to float16")
    print(json.dumps(judges.accuracy(), indent=2))


if __name__ == "__main__":
    main()
