"""DreamBooth for Stable Diffusion 2 on MindSpore."""

from ldm.installation import require_installation

require_installation()

from ldm.device import prepare_environment  # noqa: E402

prepare_environment()
