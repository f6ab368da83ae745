"""DreamBooth for Stable Diffusion 2 on MindSpore."""

from ldm.runtime import prepare_environment

prepare_environment()
