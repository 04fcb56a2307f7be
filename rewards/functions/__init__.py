"""The reward functions of the package, one small file each. Importing this registers them."""

from rewards.functions.box_giou import box_giou
from rewards.functions.box_iou import box_iou
from rewards.functions.moaks_accuracy import moaks_accuracy
from rewards.functions.output_format import output_format
from rewards.functions.rule_violations import rule_violations
from rewards.functions.soft_overlong import soft_overlong

__all__ = ["box_giou", "box_iou", "moaks_accuracy", "output_format", "rule_violations", "soft_overlong"]
