"""The reference of trainings: a plain PyTorch loop with diffusers and torch.optim.AdamW."""

import numpy as np
import torch

from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer


def torch_training(networks, config, options, samples, steps):
    """Losses of each update and the final weights of the reference loop.

    Args:
        networks: UNet, VAE and text encoder; what requires no gradient is not trained.
    """
    unet, vae, text_encoder = networks
    schedule = NoiseSchedule(config.noise_schedule)
    trained = [("unet", unet)] + ([("text_encoder", text_encoder)] if options.train_text_encoder else [])
    named = {
        (folder, name): p for folder, network in trained for name, p in network.named_parameters()
        if p.requires_grad
    }  # fmt: skip
    groups = {True: [], False: []}
    for (_, name), parameter in named.items():
        is_norm = "norm" in name.split(".")[-2] and "conv_norm" not in name or name.startswith("conv_norm")
        groups[parameter.ndim > 1 and not is_norm].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": options.weight_decay}, {"params": groups[False],
        "weight_decay": 0.0}],
        lr=options.start_learning_rate, betas=options.betas, eps=1e-8,
    )  # fmt: skip
    prompts = [options.instance_prompt] + ([options.class_prompt] if samples.class_paths else [])
    ids = torch.from_numpy(Tokenizer(77, config.text_encoder.padding)(prompts)).long()
    alphas = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)
    losses = []
    for step in range(steps):
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
                *(samples.noise(sample, tuple(posterior.mean.shape[1:]), 1000) for sample in batch)
            )
            t, noise, posterior_noise = (
                torch.tensor(t),
                torch.from_numpy(np.stack(noise)),
                torch.from_numpy(np.stack(posterior_noise)),
            )
            latents = (posterior.mean + posterior.std * posterior_noise) * config.autoencoder.scale_factor
            a, s = (x[:, None, None, None] for x in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
            context = text_encoder(ids)[0].repeat_interleave(len(batch) // len(prompts), 0)
            prediction = unet(a * latents + s * noise, t, context).sample
            target = noise if config.noise_schedule.prediction_type == "epsilon" else a * noise - s * latents
            if samples.class_paths:
                (p1, p2), (t1, t2) = prediction.chunk(2), target.chunk(2)
                instance, prior = torch.nn.functional.mse_loss(p1, t1), torch.nn.functional.mse_loss(p2, t2)
            else:
                instance, prior = torch.nn.functional.mse_loss(prediction, target), torch.tensor(0.0)
            loss = instance + options.prior_loss_weight * prior
            (loss / options.gradient_accumulation_steps).backward()
            terms.append([loss.item(), instance.item(), prior.item()])
        if options.clip_grad:
            torch.nn.utils.clip_grad_norm_(list(named.values()), options.max_grad_norm)
        optimizer.step()
        losses.append(np.mean(terms, axis=0))
    return np.array(losses), {key: p.detach().numpy() for key, p in named.items()}
