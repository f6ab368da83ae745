"""The reference of trainings: a plain PyTorch loop with diffusers and torch.optim.AdamW."""

import numpy as np
import torch

from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer


def groups_of(options, named, text_encoder) -> list[dict]:
    """Parameters with their weight decay and rate; where one word is trained, its row joins `named`."""
    table, own = text_encoder.get_input_embeddings().weight, None
    if options.train_token is not None:  # the row of one token, and nothing else of the table
        only = torch.zeros(49408, 1)
        only[Tokenizer().encode(options.train_token)] = 1
        table.register_hook(lambda gradient: gradient * only)
        own = next(name for name, p in text_encoder.named_parameters() if p is table)
        named["text_encoder", own] = table.requires_grad_(True)
    groups = []
    for (folder, name), parameter in named.items():
        is_norm = "norm" in name.split(".")[-2] and "conv_norm" not in name or name.startswith("conv_norm")
        decay = options.weight_decay * (parameter.ndim > 1 and not is_norm)
        text_rate = options.text_encoder_learning_rate or options.start_learning_rate
        rate = options.start_learning_rate if folder == "unet" else text_rate
        if parameter is table and own:
            decay, rate = 0.0, options.token_learning_rate or text_rate
        groups.append({"params": [parameter], "weight_decay": decay, "lr": rate})
    return groups


def snr_weights_of(options, config, schedule) -> np.ndarray:
    if not options.min_snr_gamma:
        return np.ones(1000)
    snr, gamma = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), options.min_snr_gamma
    is_v = config.noise_schedule.prediction_type == "v_prediction"
    return np.array([min(value, gamma) / (value + 1 if is_v else value) for value in snr])


def torch_training(networks, config, options, samples, steps, text_stop=None):  # noqa: PLR0915
    """Losses of each update and the final weights of the reference loop.

    Args:
        networks: UNet, VAE and text encoder; what requires no gradient is not trained.
        text_stop: the update after which the text encoder is trained no longer.
    """
    unet, vae, text_encoder = networks
    schedule = NoiseSchedule(config.noise_schedule)
    trained = [("unet", unet)] + ([("text_encoder", text_encoder)] if options.train_text_encoder else [])
    named = {
        (folder, name): p for folder, network in trained for name, p in network.named_parameters()
        if p.requires_grad
    }  # fmt: skip
    groups = groups_of(options, named, text_encoder)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=1e-8)
    prompts = samples.prompts()
    ids = torch.from_numpy(Tokenizer(77, config.text_encoder.padding)(prompts)).long()
    snr_weights = snr_weights_of(options, config, schedule)
    alphas = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)
    losses = []
    for step in range(steps):
        if step == text_stop:
            for (folder, _), parameter in named.items():
                if folder == "text_encoder":
                    parameter.requires_grad_(False)
                    parameter.grad = None  # which AdamW passes over, decay and all
        optimizer.zero_grad()
        terms = []
        for batch in samples.batches(
            options.train_batch_size,
            options.gradient_accumulation_steps,
            step * options.gradient_accumulation_steps,
        ):
            pixels = torch.from_numpy(np.stack([samples.pixels(sample) for sample in batch]))
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
            t, noise, posterior_noise = zip(
                *(samples.noise(sample, tuple(posterior.mean.shape[1:])) for sample in batch)
            )
            t, noise, posterior_noise = (
                torch.tensor(t),
                torch.from_numpy(np.stack(noise)),
                torch.from_numpy(np.stack(posterior_noise)),
            )
            latents = (posterior.mean + posterior.std * posterior_noise) * config.autoencoder.scale_factor
            a, s = (x[:, None, None, None] for x in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
            context = text_encoder(ids)[0][[prompts.index(sample.prompt) for sample in batch]]
            prediction = unet(a * latents + s * noise, t, context).sample
            target = noise if config.noise_schedule.prediction_type == "epsilon" else a * noise - s * latents
            error = torch.nn.functional.mse_loss(prediction, target, reduction="none")
            error = error * torch.tensor(snr_weights[t.numpy()], dtype=torch.float32)[:, None, None, None]
            if options.masked_loss:
                masks = np.stack([samples.mask(sample, error.shape[-1]) for sample in batch])
                error = error * torch.from_numpy(masks)
            if samples.classes:
                instance, prior = (half.mean() for half in error.chunk(2))
            else:
                instance, prior = error.mean(), torch.tensor(0.0)
            loss = instance + options.prior_loss_weight * prior
            (loss / options.gradient_accumulation_steps).backward()
            terms.append([loss.item(), instance.item(), prior.item()])
        if options.clip_grad:
            torch.nn.utils.clip_grad_norm_(list(named.values()), options.max_grad_norm)
        optimizer.step()
        losses.append(np.mean(terms, axis=0))
    return np.array(losses), {key: p.detach().numpy() for key, p in named.items()}
