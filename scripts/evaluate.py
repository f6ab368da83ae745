"""Judge trained models by DreamBooth's protocol: DINO, CLIP-I, CLIP-T, PRES and DIV.
`--help` lists the options.

Draws every prompt of the paper's list four times with each checkpoint, as text_to_image.py would, and
compares with the subject's own images. A run that was stopped draws what is missing. Weights of the judges
are read from folders on this machine: facebook/dino-vits16 and openai/clip-vit-base-patch32 of transformers.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm.command_line import Ending, parse_options, progress_bar, start_logging
from ldm.config import PRECISIONS
from ldm.fields import DEVICES, PRECISION_HELP, SAMPLER_NAMES, option
from ldm.values import ConfigError

logger = logging.getLogger("evaluate")
SHEET_SIDE = 128  # pixels of an image on a sheet
SHEET = "evaluation"  # the text that marks a sheet


@dataclass(frozen=True)
class EvaluateOptions:
    """Judge trained models by DreamBooth's protocol (arXiv 2208.12242, section 4)."""

    EXAMPLE: ClassVar[str] = (
        "python scripts/evaluate.py --ckpt_path output/my_dog/dreambooth_epoch_4.ckpt "
        'output/my_dog/dreambooth_epoch_8.ckpt \\\n      --instance_data_dir my_dog --subject "sks dog" '
        "--class_word dog --prompts living \\\n      --dino dino-vits16 --clip clip-vit-base-patch32 "
        "--output_path output/judged"
    )
    OTHER_NAMES: ClassVar[dict[str, str]] = {"ckpt": "ckpt_path", "lora_ckpt_path": "ckpt_path"}

    ckpt_path: tuple[str, ...] | None = option(
        None, "what", "checkpoints that have learned the subject, to be compared [required]", metavar="PATH"
    )
    base_path: str | None = option(
        None, "what", "the model that they are LoRA of, where they are LoRA [no]", metavar="PATH"
    )
    zero_terminal_snr: bool = option(
        False, "what", "the LoRA were trained with it; whole models of a run say so themselves"
    )
    instance_data_dir: str | None = option(None, "what", "the images of the subject [required]")
    subject: str | None = option(None, "what", 'what prompts call it: "sks dog" [required]')
    class_word: str | None = option(None, "what", 'and without the rare word: "dog" [required]')
    prompts: str = option(
        "objects", "what", "objects or living: the paper's 25 of that kind; or a file, {} for the subject"
    )
    subjects: str | None = option(
        None, "what", "JSON or YAML with a list `subjects` of all these, instead [no]", metavar="PATH"
    )
    dino: str | None = option(None, "judges", "folder of dino-vits16 [required]", metavar="PATH")
    clip: str | None = option(None, "judges", "folder of clip-vit-base-patch32 [required]", metavar="PATH")
    alexnet: str | None = option(
        None, "judges", "torchvision's AlexNet, alexnet-owt-7be5be79.pth, for DIV [no DIV]", metavar="PATH"
    )
    dino_preprocessing: str = option(
        "transformers", "judges", "transformers: the whole image; original: its centre, as DINO's authors do",
        choices=("transformers", "original"),
    )  # fmt: skip
    n_samples: int = option(4, "drawing", "images per prompt", least=1)
    prior_images: int = option(20, "drawing", "images of the class, for PRES; 0: no PRES", least=0)
    sampler: str = option("ddim", "drawing", "how to sample", choices=SAMPLER_NAMES)
    sampling_steps: int = option(50, "drawing", "denoising steps", aliases=("--steps",), least=1, most=1000)
    guidance_scale: float = option(
        7.5, "drawing", "classifier-free guidance scale", aliases=("--scale",), least=0
    )
    batch_size: int = option(4, "drawing", "images at a time", least=1)
    seed: int = option(42, "drawing", "of the noise, the same for every checkpoint", least=0)
    config: str = option("auto", "drawing", "YAML of the networks; auto: the one that fits the checkpoint")
    output_path: str = option(
        "output/judged", "output", "folder: images/, results.json, table.md and a sheet for each subject"
    )
    device: str = option("auto", "run", "where to draw; auto: Ascend if there is one", choices=DEVICES)
    precision: str = option("auto", "run", PRECISION_HELP, choices=PRECISIONS)

    def check(self) -> None:
        """Raise ConfigError where something is missing."""
        for name in ("dino", "clip"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: the folder of a judge's weights, see --help")
        for name in ("dino", "clip", "alexnet"):
            if getattr(self, name) and not Path(getattr(self, name)).exists():
                raise ConfigError(f"{name} {getattr(self, name)}: no such file or folder")
        self.cases  # noqa: B018 (read, and so checked)

    @cached_property
    def cases(self) -> list:
        from ldm.evaluation.protocol import KEYS, case_of, read_cases

        if self.subjects:
            return read_cases(Path(self.subjects), ROOT)
        given = {name: getattr(self, name) for name in KEYS if name != "name"}
        return [case_of(given, ROOT, "command line")]


def main(argv: list[str] | None = None) -> None:
    with Ending("evaluate.py"):
        options = parse_options(EvaluateOptions, argv)
        start_logging("INFO")
        from ldm.evaluation.judges import ClipJudge, DinoJudge
        from ldm.evaluation.lpips import load_lpips

        clip, dino = ClipJudge(Path(options.clip)), DinoJudge(Path(options.dino), options.dino_preprocessing)
        judges = clip, dino, load_lpips(Path(options.alexnet)) if options.alexnet else None
        require_own(Path(options.output_path))
        artist, results = Artist(options), {}
        for case in options.cases:
            drawn = {label: artist.draw(case, label, path) for label, path in case.checkpoints.items()}
            results[case.name] = judge(case, drawn, options, *judges)
            save_sheet(case, drawn, Path(options.output_path) / f"{case.name}.png")
        write_results(options, results)


def require_own(output: Path) -> None:
    """Raises ConfigError where what this command is to write would take the place of something else."""
    path = output / "results.json"
    try:
        is_own = not path.exists() or "subjects" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        is_own = False
    if not is_own or ((output / "table.md").exists() and not path.exists()):
        raise ConfigError(f"output_path {output}: has a results.json or table.md of another kind")


class Artist:
    """Draws what is missing of a case's images; what is compiled for one checkpoint serves the next."""

    def __init__(self, options: EvaluateOptions) -> None:
        self.options, self.drawer = options, None

    def draw(self, case, label: str, checkpoint: Path) -> dict[str, list[Path]]:
        """The images of each prompt, and under "" those of the class. Raises ConfigError where there are
        some that were drawn in another way.
        """
        from ldm.drawings import Line, drawings_of
        from ldm.sampling.drawer import sized

        sampling, source = self._open(checkpoint)
        line = sized(sampling, source.config)
        folder = Path(self.options.output_path) / "images" / case.name / label
        folder.mkdir(parents=True, exist_ok=True)
        found, missing = {}, []
        rows = [
            (template, template.replace("{}", case.subject), self.options.n_samples)
            for template in case.prompts
        ]
        rows += [("", f"a photo of a {case.class_word}", self.options.prior_images)]
        for number, (template, prompt, count) in enumerate(rows, 1):
            stem = f"p{number:02d}" if template else "class"
            found[template] = [folder / f"{stem}_{n:03d}.png" for n in range(count)]
            line_options = replace(line, n_samples=max(1, count))
            drawings = drawings_of([Line(prompt, "", line_options, True)], line_options)[:count]
            missing += [pair for pair in zip(drawings, found[template])]
        self._draw(missing, f"{case.name}, {label}")
        return found

    def _open(self, checkpoint: Path):
        """The model with a checkpoint's weights."""
        from ldm.run.checkpoints import embedding_beside
        from ldm.sample_options import SampleOptions
        from ldm.sampling.drawer import Drawer
        from ldm.weights.choice import open_model, put_on_device

        options, names = self.options, ("sampler", "sampling_steps", "guidance_scale", "seed", "config")
        names += ("batch_size", "device", "precision", "zero_terminal_snr")
        shared = {name: getattr(options, name) for name in names}
        files = {"ckpt_path": str(checkpoint)}
        if options.base_path:
            files = {"ckpt_path": options.base_path, "lora_ckpt_path": (str(checkpoint),)}
            if (word := embedding_beside(checkpoint)).is_file():  # of --train_token
                files["embedding_path"] = (str(word),)
        sampling = SampleOptions(**shared, **files, n_samples=options.n_samples, n_iter=1)
        source = open_model(sampling)
        sampling, source = put_on_device(sampling, source)
        if self.drawer and self.drawer.source.config == source.config:
            self.drawer.load(sampling, source)
        else:
            self.drawer = Drawer(sampling, source)
        return sampling, source

    def _draw(self, wanted: Sequence[tuple], what: str) -> None:
        from ldm.images import save_image

        missing = []
        for drawing, path in wanted:
            if not path.exists():
                missing.append((drawing, path))
            elif not is_same(path, self.drawer.texts(drawing)):
                raise ConfigError(
                    f"{path}: was drawn in another way than this command says: give another output_path"
                )
        logger.info("%s: %d of %d images to be drawn", what, len(missing), len(wanted))
        paths = iter([path for _, path in missing])
        with progress_bar(what)(len(missing)) as bar:
            for batch in self.drawer.batches([drawing for drawing, _ in missing]):
                for drawing, array in zip(batch, self.drawer.draw(batch)):
                    save_image(array, next(paths), self.drawer.texts(drawing))
                    bar.update()


def is_same(path: Path, texts: dict[str, str]) -> bool:
    """Whether an image was drawn as these texts say."""
    from ldm.image_metadata import OWN
    from ldm.images import read_texts

    try:
        return read_texts(path).get(OWN) == texts[OWN]
    except (OSError, ValueError):
        return False


def judge(case, drawn: dict, options: EvaluateOptions, clip, dino, lpips) -> dict:
    """The scores of each checkpoint, of each of its prompts, and of the subject's own images."""
    from ldm.evaluation import protocol
    from ldm.image_files import read_image

    real = [read_image(path) for path in case.images]
    real_clip, real_dino = clip.images(real), dino.images(real)
    without_word = [template.replace("{}", case.class_word) for template in case.prompts]
    texts = dict(zip(case.prompts, clip.texts(without_word)))
    found = {"real images": {"dino": protocol.among(real_dino), "clip_i": protocol.among(real_clip)}}
    for label, images in drawn.items():
        by_prompt = {}
        for template in case.prompts:
            opened = [read_image(path) for path in images[template]]
            vectors = clip.images(opened)
            by_prompt[template] = {
                "dino": protocol.similarity(dino.images(opened), real_dino),
                "clip_i": protocol.similarity(vectors, real_clip),
                "clip_t": protocol.similarity(vectors, texts[template][None]),
            }
            if lpips and len(opened) > 1:
                by_prompt[template]["div"] = diversity(opened, lpips)
        found[label] = protocol.mean_of(list(by_prompt.values())) | {"prompts": by_prompt}
        if images[""]:
            opened = [read_image(path) for path in images[""]]
            found[label]["pres"] = protocol.similarity(dino.images(opened), real_dino)
    return found


def diversity(images: Sequence, lpips: Callable) -> float:
    """Mean LPIPS over pairs."""
    import numpy as np

    from ldm.evaluation.judges import in_batches
    from ldm.evaluation.protocol import pairs_of
    from ldm.images import to_pixels

    pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
    first, second = np.array(pairs_of(len(pixels))).T
    return float(in_batches(lpips, pixels[first], pixels[second]).mean())


def save_sheet(case, drawn: dict, path: Path) -> None:
    """A row for each prompt, in it the first image of each checkpoint; the subject's own above."""
    import numpy as np

    from ldm import images
    from ldm.image_files import read_image

    def row(caption: str, paths: Sequence[Path]) -> np.ndarray:
        shown = np.stack([images.cover(read_image(its), SHEET_SIDE, SHEET_SIDE) for its in paths])
        return images.with_caption(images.grid(shown, len(shown)), caption)

    rows = [row(case.subject, case.images[:6])]
    labels = ", ".join(drawn)
    for template in case.prompts:
        caption = template.replace("{}", case.subject)
        rows.append(row(caption, [found[template][0] for found in drawn.values()]))
    width = max(its.shape[1] for its in rows)
    padded = [np.pad(its, ((0, 0), (0, width - its.shape[1]), (0, 0)), constant_values=255) for its in rows]
    if path.exists() and SHEET in images.read_texts(path):
        path.unlink()  # of an earlier run, with fewer checkpoints; another image is not ours
    path = images.free_path(path.parent, f"{path.stem}_") if path.exists() else path
    images.save_image(np.concatenate(padded), path, {SHEET: labels})
    logger.info("sheet: %s, columns %s", path, labels)


def write_results(options: EvaluateOptions, results: dict) -> None:
    from ldm.evaluation import protocol
    from ldm.files import write_text

    rows = protocol.rows_of(results)
    own = [label for label in rows if label != "real images"]
    paper = {f"the paper: {label}": its for label, its in protocol.PAPER.items()}
    text = protocol.table(rows | paper, own)
    output = Path(options.output_path)
    settings = {name: value for name, value in asdict(options).items() if name != "output_path"}
    content = {"settings": settings, "subjects": results, "mean": rows, "paper": protocol.PAPER}
    write_text(output / "results.json", json.dumps(protocol.finite(content), indent=2) + "\n")
    write_text(output / "table.md", text + "\n")
    print(text)
    subjects = f"{len(results)} subject{'s' if len(results) > 1 else ''}"
    print(
        f"\nMeans over {subjects}; the best in bold. CLIP-T: of the prompt without the rare word. The "
        "paper's rows are of its 30 subjects (PRES, DIV: 15), and it does not say which CLIP it took: "
        f"compare them only about. {output / 'results.json'} has every prompt."
    )


if __name__ == "__main__":
    main()
