"""What all networks, and PyTorch's, answer to the same random inputs."""

import mindspore as ms
import numpy as np
import torch

from ldm.networks.autoencoder import Decode, Encode


def inputs(config, batch, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 4, 8, 16)).astype(np.float32)  # not square
    t = rng.integers(0, 1000, batch).astype(np.int32)
    context = rng.standard_normal((batch, 77, config.text_encoder.width)).astype(np.float32)
    token_ids = rng.integers(0, config.text_encoder.vocab_size, (batch, 77)).astype(np.int32)
    pixels = rng.uniform(-1, 1, (batch, 3, 32, 48)).astype(np.float32)
    return x, t, context, token_ids, pixels


def outputs(model, x, t, context, token_ids, pixels):
    tensors = [ms.Tensor(a) for a in (x, t, context, token_ids, pixels)]
    return {
        "unet": model.unet(*tensors[:3]).asnumpy(),
        "text": model.cond_stage_model(tensors[3]).asnumpy(),
        "encode": Encode(model.first_stage_model)(tensors[4]).asnumpy(),
        "decode": Decode(model.first_stage_model)(tensors[0]).asnumpy(),
    }


def reference_outputs(networks, x, t, context, token_ids, pixels):
    unet, vae, text_encoder = networks
    x, t, context, token_ids, pixels = (torch.from_numpy(a) for a in (x, t, context, token_ids, pixels))
    with torch.no_grad():
        return {
            "unet": unet(x, t.long(), context).sample,
            "text": text_encoder(token_ids.long())[0],
            "encode": vae.encode(pixels).latent_dist.parameters,
            "decode": vae.decode(x).sample,
        }
