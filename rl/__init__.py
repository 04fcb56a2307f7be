"""What is learned and how well: data, SFT, GRPO, Ray launch, ReasonKnee-Bench."""
