"""DreamBooth for Stable Diffusion 2 on MindSpore."""

from ldm.device import prepare_environment

prepare_environment()
