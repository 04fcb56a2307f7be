"""A step's completions: which questions are asked, and when.

Usually the engine answers while the trainer waits. With `grpo.overlap` it answers the next step's questions while this
step's are trained on:

    engine    | step 0 | step 1  | step 2  | step 3        step t + 1 is answered with the weights of the start of
    trainer            | step 0  | step 1  | step 2        step t: one update behind those it trains
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from accelerate import Accelerator

from rl.config import Config
from rl.task import Task
from rollouts.requests import group_seed
from rollouts.types import Engine, Group, Sampling

Answered = list[tuple[int, Group]]
"""Index of the example and its G completions; questions of one volume together."""


class Generation:
    """Draws the questions of a step and has this rank's share of them answered G times each."""

    def __init__(self, config: Config, task: Task, engine: Engine, accelerator: Accelerator) -> None:
        self.seed, self.settings = config.seed, config.grpo
        self.task, self.engine, self.accelerator = task, engine, accelerator
        self.sampler = task.sampler(config.seed, balance=self.settings.balance)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._ahead: Future[Answered] | None = None

    def draw(self, step: int, volumes: int) -> Answered:
        """What was asked ahead, as soon as it is there; else ask now."""
        if self._ahead is None:
            return self._questions(step, volumes)()
        answered = self._ahead.result()
        self._ahead = None
        return answered

    def draw_again(self, step: int, volumes: Sequence[int], again: int) -> Answered:
        """Ask further questions of the same step, about so many volumes for each rank; `again` counts such draws."""
        first = sum(volumes[: self.accelerator.process_index])
        mine = slice(first, first + volumes[self.accelerator.process_index])
        return self._questions(step, sum(volumes), again, mine)()

    def draw_ahead(self, step: int) -> None:
        """Have the questions of the coming step answered while the caller goes on."""
        self._ahead = self._thread.submit(self._questions(step, self.settings.volumes_per_step))

    def wait(self) -> None:
        """Until the engine is idle."""
        if self._ahead is not None:
            self._ahead.result()

    def finish(self) -> None:
        """End the thread that asks ahead."""
        self._thread.shutdown()

    def _questions(
        self, step: int, volumes: int, again: int = 0, mine: slice | None = None
    ) -> Callable[[], Answered]:
        settings = self.settings
        chosen = self.sampler.draw(step, volumes, settings.questions_per_volume, again)
        mine = mine or slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        indices = [i for questions in chosen[mine] for i in questions]
        prompts = [self.task.prompt(i, settings.max_completion_length) for i in indices]
        seeds = [group_seed(self.seed, step, prompt.example_id) for prompt in prompts]
        sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_completion_length)

        def ask() -> Answered:
            groups = (
                self.engine.generate(prompts, settings.num_generations, sampling, seeds) if prompts else []
            )
            return list(zip(indices, groups, strict=True))

        return ask
