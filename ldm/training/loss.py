"""DreamBooth's loss, instance and prior-preservation term (Ruiz et al. 2022, arXiv 2208.12242, eq. 1)."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.networks.text_encoder import TextEncoder
from ldm.networks.unet import UNetModel
from ldm.schedule import NoiseSchedule, add_noise, velocity
from ldm.training.sums import sum_of_all

SMALL = 65536  # values whose mean has the same bits in every update, see ldm/training/sums.py


class DreamBoothLoss(nn.Cell):
    """Both terms in one UNet pass over the joined batch: instance samples first, then as many class samples.

    Args:
        unet: the denoising network.
        text_encoder: trained along, then `text` is token ids; None: `text` is the context, encoded
            beforehand.
        schedule: noise levels and what the UNet predicts.
        prior_loss_weight: weight of the class term; None: there are no class samples.
        is_weighed: whether a weight of each sample, or of each place in it, comes with the batch.

    Inputs:
        latents: (B, 4, h, w) float32, scaled. text: (B, 77) int32 or (B, 77, context_dim) float32.
        t: (B,) int32 step indices. noise: like latents. Nothing is drawn here.
        weight: (B, 1, 1, 1) or (B, 1, h, w) float32, of the squared error, with `is_weighed`.

    Returns:
        The loss, and its instance and class term (0 without one), float32 scalars.
    """

    def __init__(
        self,
        unet: UNetModel,
        text_encoder: TextEncoder | None,
        schedule: NoiseSchedule,
        prior_loss_weight: float | None,
        is_weighed: bool = False,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.trains_text = text_encoder is not None
        if self.trains_text:
            self.text_encoder = text_encoder
        self.is_weighed = is_weighed
        self.has_prior = prior_loss_weight is not None
        self.prior_loss_weight = prior_loss_weight
        self.total = sum_of_all()
        self.is_v = schedule.prediction_type == "v_prediction"
        self.sqrt_alpha = Tensor(schedule.sqrt_alpha.astype(np.float32))
        self.sqrt_one_minus_alpha = Tensor(schedule.sqrt_one_minus_alpha.astype(np.float32))

    def mean(self, error):
        return error.mean() if error.size <= SMALL else self.total(error) / error.size

    def construct(self, latents, text, t, noise, *weight):
        signal = ops.gather(self.sqrt_alpha, t, 0).reshape(-1, 1, 1, 1)
        level = ops.gather(self.sqrt_one_minus_alpha, t, 0).reshape(-1, 1, 1, 1)
        x_t = add_noise(latents, noise, signal, level)
        target = velocity(latents, noise, signal, level) if self.is_v else noise
        context = self.text_encoder(text) if self.trains_text else text
        error = ops.square(self.unet(x_t, t, context).astype(ms.float32) - target)
        if self.is_weighed:
            error = error * weight[0]
        if not self.has_prior:
            loss = self.mean(error)
            return loss, loss, ops.zeros_like(loss)
        half = latents.shape[0] // 2
        instance_loss, class_loss = self.mean(error[:half]), self.mean(error[half:])
        return instance_loss + self.prior_loss_weight * class_loss, instance_loss, class_loss
