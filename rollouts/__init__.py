"""What the model is shown and what it says: volumes, prompts, cached features, engines."""

from rollouts import torchvision_shim

# Before any module of this package can import transformers: see the module for why.
torchvision_shim.install()
