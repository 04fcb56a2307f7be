"""Verifiable rewards for MOAKS grading and 3D boxes. numpy only: importing it needs no torch."""

from rewards.boxes import (
    Box3D,
    boxes_array,
    center_distance_mm,
    giou,
    giou_array,
    giou_matrix,
    iou,
    iou_array,
    iou_matrix,
)
from rewards.functions import (
    answer_matches_reasoning,
    box_giou,
    box_iou,
    box_iou_threshold,
    box_size_validity,
    moaks_accuracy,
    output_format,
    repetition,
    rule_violations,
    soft_overlong,
)
from rewards.matching import match_question
from rewards.ontology import BENCHMARK_QUESTION_IDS, QUESTIONS, Attribute, Question
from rewards.reading import format_answer, read_answer, read_truth
from rewards.records import example_from_dict, example_to_dict
from rewards.registry import RewardSpec, find_reward, group_reward, registered, reward
from rewards.suite import Component, RewardError, RewardRow, RewardSuite
from rewards.types import Answer, Example, Problem, ReaderMode, Reasoning, Side, Truth, VolumeRef

__all__ = [
    "BENCHMARK_QUESTION_IDS",
    "QUESTIONS",
    "Answer",
    "Attribute",
    "Box3D",
    "Component",
    "Example",
    "Problem",
    "Question",
    "ReaderMode",
    "Reasoning",
    "RewardError",
    "RewardRow",
    "RewardSpec",
    "RewardSuite",
    "Side",
    "Truth",
    "VolumeRef",
    "answer_matches_reasoning",
    "box_giou",
    "box_iou",
    "box_iou_threshold",
    "box_size_validity",
    "boxes_array",
    "center_distance_mm",
    "example_from_dict",
    "example_to_dict",
    "find_reward",
    "format_answer",
    "giou",
    "giou_array",
    "giou_matrix",
    "group_reward",
    "iou",
    "iou_array",
    "iou_matrix",
    "match_question",
    "moaks_accuracy",
    "output_format",
    "read_answer",
    "read_truth",
    "registered",
    "repetition",
    "reward",
    "rule_violations",
    "soft_overlong",
]
