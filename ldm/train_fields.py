"""The fields of train_dreambooth.py's options: each is a flag, a key of a file, a type, a default and a help.
Must not import mindspore.
"""

from dataclasses import dataclass

from ldm.config import PRECISIONS
from ldm.fields import (
    CAPTIONS,
    DETERMINISTIC_HELP,
    DEVICES,
    FLASH_ATTENTION_HELP,
    FORCE_PRECISION_HELP,
    IMAGE_FITS,
    LOG_LEVELS,
    LORA_FORMATS,
    LR_SCHEDULES,
    OPTIMIZERS,
    PRECISION_HELP,
    SAMPLER_NAMES,
    SAVE_DTYPES,
    SAVE_FORMATS,
    TIMESTEPS,
    VERSION_HELP,
    option,
    run_option,
    value_option,
)
from ldm.versions import VERSIONS


@dataclass(frozen=True)
class TrainFields:
    """The methods are ldm.options.TrainOptions'."""

    instance_data_dir: str | None = run_option(
        None, "data", "folder with 3-5 images of the subject (read only) [required]"
    )
    instance_prompt: str | None = value_option(
        None, "data", 'what they show, with a rare word: "a photo of sks dog" [required]'
    )
    class_data_dir: str | None = run_option(
        None, "data",
        "folder of class images; missing ones are generated into it [required with prior preservation]",
    )  # fmt: skip
    class_prompt: str | None = value_option(
        None, "data", 'the same without the rare word: "a photo of a dog" [required with prior preservation]'
    )
    with_prior_preservation: bool = option(
        True, "data", "train on class images too, so that the class is not forgotten"
    )
    num_class_images: int = value_option(
        200, "data", "number of class images; those already there count", least=1
    )
    train_data_repeats: int = value_option(
        40, "data", "how often each instance image is used per epoch", least=1
    )
    image_size: int | None = option(
        None, "data", "side of the training images, in pixels [the model's: 512, or 768]", least=8
    )
    random_crop: bool = option(False, "data", "crop at random instead of at the centre")
    random_flip: bool | None = value_option(
        None, "data",
        "flip half of the images left to right; False for a subject with lettering [as random_crop]",
    )  # fmt: skip

    concepts: str | None = run_option(
        None, "captions",
        "JSON or YAML list of several subjects, each with the keys instance_data_dir, instance_prompt, "
        "class_data_dir, class_prompt, and perhaps num_class_images, train_data_repeats [one subject]",
        aliases=("--concepts_list",),
    )  # fmt: skip
    captions: str = value_option(
        "none", "captions",
        "a prompt of its own for each image: from NAME.txt beside it, its file name, or metadata.jsonl, "
        "metadata.csv or img_txt.csv in the folder; [prompt] in it stands for the instance prompt",
        choices=CAPTIONS,
    )  # fmt: skip
    caption_dropout: float = value_option(
        0.0, "captions", "share of samples that get an empty prompt: keeps guidance strong in long trainings",
        least=0, most=1,
    )  # fmt: skip
    image_fit: str = value_option(
        "crop", "captions",
        "images that are not square: crop, or pad: all of them is seen, their edges drawn out",
        choices=IMAGE_FITS,
    )  # fmt: skip
    masked_loss: bool = option(
        False,
        "captions",
        "learn the subject only where its image is opaque, or NAME.mask.png beside it is white",
    )

    train_config: str = run_option(
        "configs/train_dreambooth_sd_v2.json", "model", "JSON or YAML with any of these options"
    )
    model_config: str = run_option(
        "auto", "model", "YAML of the networks and the noise schedule; auto: the one that fits the checkpoint"
    )
    version: str | None = run_option(
        None, "model", VERSION_HELP, aliases=("-v",), choices=tuple(VERSIONS), metavar="VERSION"
    )
    pretrained_model_path: str = run_option(
        "models/", "model", "folder of the base checkpoint; or a file or a diffusers folder that is it"
    )
    pretrained_model_file: str | None = run_option(
        None, "model", "its name in that folder [the version's published file]", metavar="NAME"
    )
    variant: str | None = run_option(
        None, "model", "of the files in a diffusers folder: fp16, bf16, non_ema [the plain ones]"
    )
    use_ema_weights: bool = run_option(
        False, "model", "begin with the averaged weights that lie in the checkpoint beside the others"
    )
    output_path: str = run_option(
        "output", "model", "folder for checkpoints, log and effective configuration"
    )

    train_text_encoder: bool = option(
        True, "training", "train the text encoder too (otherwise it is frozen)",
        aliases=("--lora_ft_text_encoder",),
    )  # fmt: skip
    cache_latents: bool = option(
        True, "training", "encode the images once, before training; then the VAE leaves memory",
        changes_result=False,
    )  # fmt: skip
    train_batch_size: int = option(
        2, "training", "instance images per step (plus the same number of class images)", least=1,
        changes_result=False,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        1, "training", "steps whose gradients are averaged for one update", least=1, changes_result=False
    )
    epochs: int = run_option(8, "training", "passes over the repeated instance images", least=1)
    prior_loss_weight: float = option(
        1.0, "training", "weight of the class term (lambda in the paper)", least=0
    )
    optim: str = option(
        "adamw", "training",
        "optimizer; adafactor: hardly any memory beside the weights, lion: half of adamw's, at a third of "
        "its rate, prodigy: finds its rate, on twice adamw's memory",
        choices=tuple(OPTIMIZERS),
    )  # fmt: skip
    betas: tuple[float, float] | None = option(
        None,
        "training",
        "decay rates of the moments [0.9 0.999; lion: 0.9 0.99; adafactor has none]",
        least=0,
        below=1,
    )
    weight_decay: float = option(1e-2, "training", "weight decay (never on norms and biases)", least=0)
    start_learning_rate: float | None = value_option(
        None, "training",
        "learning rate; constant, or with the next options [5e-6; prodigy: 1, a factor of what it finds]",
        above=0,
    )  # fmt: skip
    end_learning_rate: float | None = value_option(
        None, "training", "rate at the end of the decay [0 if decay_steps > 0]", least=0
    )
    warmup_steps: int = value_option(0, "training", "updates of linear warm-up from 0", least=0)
    decay_steps: int = value_option(
        0, "training", "updates of decay after the warm-up; 0: none, with --lr_schedule to the end", least=0
    )
    clip_grad: bool = option(False, "training", "clip gradients by their global norm")
    max_grad_norm: float = option(1.0, "training", "the norm to clip to", above=0)
    init_loss_scale: float = option(512, "training", "float16: first loss scale", least=1)
    loss_scale_factor: float = option(2, "training", "float16: factor by which the loss scale moves", above=1)
    scale_window: int = option(
        200, "training", "float16: updates without overflow before the scale grows", least=1
    )
    recompute: bool | None = option(
        None, "training",
        "gradient checkpointing: compute feed-forward layers twice to use less memory [on a CPU where memory "
        "is low, and with LoRA on a full-size model]",
        changes_result=False,
    )  # fmt: skip
    use_ema: bool = option(
        False, "training", "average the weights (decay 0.9999, warmed up); saved in a file of their own"
    )

    max_updates: int | None = run_option(
        None, "recipes", "end after N updates, whatever the epochs [as many as the epochs have]", least=1,
        aliases=("--max_train_steps",),
    )  # fmt: skip
    lr_schedule: str | None = value_option(
        None, "recipes",
        "how the rate falls to the end: calmer last updates, so that more of them harm less; with warm-up "
        f"from 0, as in diffusers {{{','.join(LR_SCHEDULES)}}} [constant, or a cosine over decay_steps]",
        choices=LR_SCHEDULES, aliases=("--lr_scheduler",),
    )  # fmt: skip
    lr_cycles: int = value_option(
        1, "recipes", "of cosine_with_restarts: how often it falls", least=1, aliases=("--lr_num_cycles",)
    )
    lr_power: float = value_option(1.0, "recipes", "of polynomial; 1: a line", above=0)
    text_encoder_learning_rate: float | None = option(
        None, "recipes",
        "of the text encoder, usually a half to a tenth: it learns the word fast and forgets others "
        "[start_learning_rate]",
        above=0, aliases=("--text_encoder_lr",),
    )  # fmt: skip
    text_encoder_stop: float | None = option(
        None, "recipes",
        "freeze the text encoder after this fraction of the run, and compute it no more: prompts keep their "
        "sense [never]", above=0, most=1,
    )  # fmt: skip
    train_token: str | None = option(
        None, "recipes",
        "train this word's embedding, and of the embeddings no other: with a frozen text encoder or LoRA, to "
        "learn what the word means; saved in a file of its own, too [no]", metavar="WORD",
    )  # fmt: skip
    embedding_path: str | None = run_option(
        None, "recipes", "a file of that embedding to go on from [no]", metavar="FILE"
    )
    token_learning_rate: float | None = option(
        None, "recipes", "of that embedding, usually 5 to 100 times the others' [the text encoder's]", above=0
    )
    min_snr_gamma: float | None = option(
        None,
        "recipes",
        "weigh down samples of little noise: often learns faster; 5 in its paper [no]",
        above=0,
    )
    noise_offset: float = value_option(
        0.0, "recipes", "noise of the whole image's colour: for very dark or bright subjects; 0.05 to 0.1",
        least=0,
    )  # fmt: skip
    zero_terminal_snr: bool = option(
        False,
        "recipes",
        "v-prediction: a schedule that ends in pure noise, for very dark or bright images; draw with it, too",
    )
    min_timestep: int = value_option(
        0, "recipes", "train on time steps from here on: higher ones are of shape and layout", least=0,
        most=TIMESTEPS - 1,
    )  # fmt: skip
    max_timestep: int = value_option(
        TIMESTEPS, "recipes", "and below this: lower ones are of detail", least=1, most=TIMESTEPS
    )

    use_lora: bool = option(
        False, "LoRA", "train low-rank additions to the weights, and save them alone: a small file"
    )
    lora_rank: int | None = option(
        None, "LoRA", "rank of the additions [4, or as in --lora_ckpt_path]", least=1
    )
    lora_alpha: float | None = option(
        None, "LoRA", "additions are multiplied by this, over their rank [the rank]", above=0
    )
    lora_targets: str = option(
        "attention", "LoRA",
        "layers that get one: attention, and +feed_forward, +projections, +convolutions [attention]",
        metavar="NAME+NAME",
    )  # fmt: skip
    lora_dropout: float = option(
        0.0, "LoRA", "share of a layer's input that its addition does not see in training", least=0, below=1
    )
    lora_fp16: bool = run_option(True, "LoRA", "numbers in the saved file: float16, or float32 (False)")
    lora_format: str = run_option(
        "kohya", "LoRA", "names in it; kohya is what all programs read", choices=LORA_FORMATS
    )
    lora_ckpt_path: str | None = run_option(None, "LoRA", "a LoRA to go on from, of any program [no]")
    lora_ft_unet: bool = run_option(True, "LoRA", "")  # in files of September 2023

    accept_class_images: bool = run_option(
        False, "class images",
        "take class_data_dir as it is: with images drawn for another prompt or model, and beside sub-folders",
    )  # fmt: skip
    class_sampler: str = value_option(
        "ddim", "class images", "how to generate them; dpm_solver_pp needs 20 steps only",
        choices=SAMPLER_NAMES,
    )  # fmt: skip
    sampling_steps: int = value_option(50, "class images", "denoising steps", least=1, most=TIMESTEPS)
    sample_batch_size: int = run_option(4, "class images", "images at a time", least=1)
    guidance_scale: float = value_option(
        9.0, "class images", "classifier-free guidance scale", aliases=("--scale",), least=0
    )

    validation_prompt: tuple[str, ...] | None = run_option(
        None,
        "validation",
        "prompts of images to see on the way, in output_path/validation [no]",
        metavar="TEXT",
    )
    validation_every: int | None = run_option(
        None, "validation", "updates between them [at every checkpoint]", least=1
    )
    validation_images: int = run_option(4, "validation", "images of each prompt", least=1)
    validation_guidance_scale: float = run_option(
        7.5,
        "validation",
        "classifier-free guidance scale; sampler and steps are those of class images",
        least=0,
    )
    report_to: str = run_option(
        "none", "validation", "also write TensorBoard's files; report.html there is always",
        choices=("none", "tensorboard"),
    )  # fmt: skip

    ckpt_save_interval: int = run_option(1, "run", "epochs between checkpoints", least=1)
    keep_weights: int = run_option(10, "run", "how many checkpoints to keep, the newest ones", least=1)
    save_weights_every: int | None = run_option(
        None, "run", "also write weights to generate with every N updates, and when stopped [no]", least=1
    )
    save_format: str = run_option(
        "mindspore", "run", "of the checkpoints; stability: a file, diffusers: a folder, for other programs",
        choices=SAVE_FORMATS,
    )  # fmt: skip
    save_dtype: str = run_option("float32", "run", "of the numbers in them", choices=SAVE_DTYPES)
    save_state_minutes: float | None = run_option(
        15.0, "run",
        "save a resumable state at a checkpoint when the last one is this many minutes old; 0: at every one, "
        "None: only when stopped", least=0,
    )  # fmt: skip
    save_every: int | None = run_option(
        None, "run", "also save a resumable state every N updates [no]", least=1
    )
    keep_states: int = run_option(
        1, "run", "how many resumable states to keep, the newest ones", aliases=("--keep_checkpoints",),
        least=1,
    )  # fmt: skip
    dry_run: bool = run_option(
        False, "run", "check everything, say what would be done and about how long it takes, and end"
    )
    resume: str | None = run_option(
        None, "run", 'continue from "latest", or from a folder states/step_* [no]', metavar="latest|PATH"
    )
    allow_changed_options: bool = run_option(
        False, "run", "resume even if options, images or base model have changed"
    )
    callback_size: int = run_option(1, "run", "updates between log lines", least=1)
    seed: int = value_option(3407, "run", "all random numbers follow from it", least=0)
    log_level: str = run_option("INFO", "run", "how much to log", choices=LOG_LEVELS)
    device: str = option(
        "auto", "run", "where to run; auto: Ascend if there is one, else CPU", choices=DEVICES,
        changes_result=False,
    )  # fmt: skip
    precision: str = option("auto", "run", PRECISION_HELP, choices=PRECISIONS, changes_result=False)
    force_precision: bool = run_option(False, "run", FORCE_PRECISION_HELP)
    flash_attention: str = option(
        "auto", "run", FLASH_ATTENTION_HELP, choices=("auto", "off"), changes_result=False
    )
    deterministic: bool | None = run_option(None, "run", DETERMINISTIC_HELP)
    mode: int = option(
        0, "run", "0 graph mode, 1 PyNative (for debugging)", aliases=("--ms_mode",), choices=(0, 1),
        changes_result=False,
    )  # fmt: skip
    compile_cache: bool = option(True, "run", "keep compiled graphs for the next start", changes_result=False)
    use_parallel: bool = option(
        False, "run", "data parallel over the processes that mpirun or msrun started", changes_result=False
    )
