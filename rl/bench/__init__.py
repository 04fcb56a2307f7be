"""ReasonKnee-Bench: metrics, baselines, comparison, report."""
