"""What is learned and how well: data, SFT, GRPO, Ray launch, ReasonKnee-Bench."""

import rollouts  # noqa: F401  (before anything imports torchvision, see rollouts.torchvision_shim)
