"""The reward functions of the package, one small file each. Importing this registers them."""

from rewards.functions.answer_matches_reasoning import answer_matches_reasoning
from rewards.functions.box_giou import box_giou
from rewards.functions.box_iou import box_iou
from rewards.functions.box_iou_threshold import box_iou_threshold
from rewards.functions.box_size_validity import box_size_validity
from rewards.functions.difficulty_calibrated_accuracy import difficulty_calibrated_accuracy
from rewards.functions.length_calibrated_accuracy import length_calibrated_accuracy
from rewards.functions.moaks_accuracy import moaks_accuracy
from rewards.functions.output_format import output_format
from rewards.functions.repetition import repetition
from rewards.functions.rule_violations import rule_violations
from rewards.functions.soft_overlong import soft_overlong

__all__ = [
    "answer_matches_reasoning",
    "box_giou",
    "box_iou",
    "box_iou_threshold",
    "box_size_validity",
    "difficulty_calibrated_accuracy",
    "length_calibrated_accuracy",
    "moaks_accuracy",
    "output_format",
    "repetition",
    "rule_violations",
    "soft_overlong",
]
