"""Multimodal rotary positions (M-RoPE) of Qwen2.5-VL, as the reference implementation and vLLM place them.

transformers lets the text after a video continue from the larger of its height and width, ignoring the
temporal extent. On a volume of many slices a trainer would then score other positions than the engine sampled
with, silently. Here the text continues from the largest position + 1, for trainer and HF engine alike.
"""

from __future__ import annotations

import torch


def mrope_positions(
    token_ids: list[int] | tuple[int, ...],
    grid_thw: tuple[int, int, int] | None,
    second_per_grid_t: float,
    *,
    video_token_id: int,
    merge_size: int,
    tokens_per_second: float,
) -> torch.Tensor:
    """Positions of a sequence that holds at most one video.

    Args:
        token_ids: the sequence, one `video_token_id` per visual token.
        grid_thw: patch grid of the video before spatial merging; None for plain text.
        second_per_grid_t: seconds between two grid frames.
    Returns:
        LongTensor [3, L]: temporal, height and width position of each token (Qwen2-VL, arXiv 2409.12191, §2.1).
    Raises:
        ValueError: the number of video tokens is not the number the grid makes, or they are not contiguous.
    """
    ids = torch.tensor(token_ids, dtype=torch.long)
    video = (ids == video_token_id).nonzero().flatten()
    if grid_thw is None:
        if len(video):
            raise ValueError(f"{len(video)} video tokens but no grid_thw")
        return torch.arange(len(ids)).expand(3, -1).clone()
    frames, rows, columns = grid_thw[0], grid_thw[1] // merge_size, grid_thw[2] // merge_size
    expected = frames * rows * columns
    if len(video) != expected or int(video[-1] - video[0]) != expected - 1:
        raise ValueError(
            f"grid {grid_thw} needs {expected} contiguous video tokens, the prompt has {len(video)}"
        )
    start, end = int(video[0]), int(video[-1]) + 1
    before = torch.arange(start).expand(3, -1)
    # float64, then truncation, as the reference: 2 s per frame x 2 tokens/s = a step of 4
    times = (torch.arange(frames, dtype=torch.float64) * (second_per_grid_t * tokens_per_second)).long()
    visual = torch.stack(torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij"))
    visual = visual.reshape(3, -1) + start
    after = torch.arange(len(ids) - end).expand(3, -1) + int(visual.max()) + 1
    return torch.cat([before, visual, after], dim=1)
