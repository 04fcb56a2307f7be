"""`reasonknee rewards …`: browse the questions, start a reward of one's own, attack it, score, explain, replay."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.cli_options import DEFAULT_CONFIG, Overrides

if TYPE_CHECKING:
    from rewards import RewardSuite
    from rewards.lines import Line

app = typer.Typer(no_args_is_help=True, help="Write, test, attack and apply rewards.")
ConfigFile = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="Recipe whose rewards section is used.")
]
_SHOWN_PROBLEMS = 20


@app.command()
def questions(
    question_id: Annotated[int, typer.Option("--id", metavar="N", help="One question in full, 1 to 69.")] = 0,
) -> None:
    """The 69 questions: region, attributes, grades; with --id one of them as it is asked."""
    from rewards import QUESTIONS
    from rollouts.prompts import question_text

    console = Console(highlight=False)
    if question_id:
        if question_id not in QUESTIONS:
            raise typer.BadParameter(f"questions are numbered 1 to 69, got {question_id}")
        question = QUESTIONS[question_id]
        where = f"{question.category}; table 2: {question.table2_column}; table 3: {question.table3_column or '-'}"
        console.print(f"{question_id}  {question.entity}\nregion: {question.region}\n{where}", markup=False)
        table = Table("attribute", "scale", "grades", "in the public template")
        for a in question.attributes:
            table.add_row(a.name, a.scale, f"{a.grades[0]}-{a.grades[-1]}", " > ".join(a.path))
        console.print(table)
        console.print(question_text(question), markup=False)
        return
    table = Table("id", "category", "finding", "attributes (grades)")
    for question in QUESTIONS.values():
        attributes = ", ".join(f"{a.name} ({a.grades[0]}-{a.grades[-1]})" for a in question.attributes)
        table.add_row(str(question.question_id), question.category, question.entity, attributes)
    console.print(table)


@app.command()
def new(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.py", help="Where the reward goes; its test goes beside it.")
    ],
) -> None:
    """Write a reward and its unit test that pass as they stand, to start your own from."""
    from rl.rewards_new import write_reward

    reward_file, test_file = write_reward(file)
    Console(highlight=False, soft_wrap=True).print(
        f"wrote {reward_file} and {test_file}\n"
        f"try them:    pytest {test_file}\n"
        f"train on it: rewards.components entry {{name: {reward_file}:{reward_file.stem}, weight: 0.5}}",
        markup=False,
    )


@app.command()
def redteam(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Attack the recipe's rewards with every exploit; exit 1 when one beats honest answers. Priors apart."""
    from rewards.redteam import HONEST_BAR, red_team
    from rewards.redteam.report import MIXES

    report = red_team(_suite(config, overrides))
    console = Console(highlight=False)
    honest = Table(
        "accuracy", "IoU", "mean reward", title="honest answers, balanced grades", title_justify="left"
    )
    for (accuracy, overlap), earned in report.honest.items():
        bar = "  <- the bar" if (accuracy, overlap) == HONEST_BAR else ""
        honest.add_row(f"{accuracy:.2f}", f"{overlap:.2f}", f"{earned.mean:.3f}{bar}")
    console.print(honest)
    exploits = Table(
        "exploit", "family", "mean reward", "slowest", title="exploits, worst first", title_justify="left"
    )
    for finding in report.findings:
        style = "red" if finding.problem else None
        slowest = f"{1000 * finding.earned.slowest_seconds:.1f} ms"
        exploits.add_row(
            finding.exploit.name, finding.exploit.family, f"{finding.earned.mean:.3f}", slowest, style=style
        )
    console.print(exploits)
    priors = Table(
        "prior",
        *(f"{mix} grades" for mix in MIXES),
        title="what not looking earns: shown, not judged",
        title_justify="left",
    )
    for name, by_mix in report.priors.items():
        priors.add_row(name, *(f"{by_mix[mix].mean:.3f}" for mix in MIXES))
    console.print(priors)
    if report.problems:
        console.print(f"{len(report.problems)} problems, worst first:", style="red")
        for problem in report.problems[:_SHOWN_PROBLEMS]:
            console.print(f"  {problem}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"none of {len(report.findings)} exploits beats an honest answer")


@app.command()
def score(
    source: Annotated[
        Path, typer.Option("--in", metavar="X.jsonl", help="Completions, one object per line.")
    ],
    target: Annotated[Path, typer.Option("--out", metavar="Y.jsonl", help="The same with what they earned.")],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Score completions line by line: question_id, completion, truth {grades, bbox}. Exit 1 when a line is bad."""
    from rewards.lines import score_lines, scored_record
    from rl.errors import staged, writing

    if source.resolve() == target.resolve():
        raise typer.BadParameter("--in and --out are the same file")
    suite = _suite(config, overrides)
    console, scored, total, bad = Console(highlight=False, soft_wrap=True), 0, 0.0, 0
    with (
        _lines_of(source) as lines,
        writing(target),
        staged(target) as staging,
        staging.open("w", encoding="utf-8") as out,
    ):
        for line in score_lines(suite, lines):
            if line.row is None:
                bad += 1
                console.print(f"{source}, line {line.number}: {line.problem}", style="red", markup=False)
                continue
            scored, total = scored + 1, total + line.row.total
            out.write(json.dumps(scored_record(line)) + "\n")
    mean = f", mean reward {total / scored:.4f}" if scored else ""
    console.print(f"{scored} completions scored{mean}; {bad} bad lines; {target}", markup=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def explain(
    source: Annotated[Path, typer.Option("--in", metavar="X.jsonl", help="Completions, as for `score`.")],
    number: Annotated[int, typer.Option("--line", metavar="N", min=1, help="Which line, from 1.")] = 1,
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """One completion in full: what was read, what each component paid and why."""
    from rewards.lines import read_line

    suite = _suite(config, overrides)
    with _lines_of(source) as lines:
        text = next(itertools.islice(lines, number - 1, None), None)
    if text is None:
        raise typer.BadParameter(f"{source} has fewer than {number} lines")
    line = read_line(number, text)
    if line.example is None:
        raise typer.BadParameter(f"{source}, line {number}: {line.problem}")
    _explain(suite, line)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a GRPO run.")],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Every completion, scored twice.")
    ] = None,
) -> None:
    """A run's saved completions under another recipe's rewards: what would GRPO have learned?"""
    import polars as pl

    from rl.config_check import load_valid
    from rl.parquet import write_parquet
    from rl.replay import replay as run_again

    result = run_again(run, load_valid(config, overrides or [], needs_model=False))
    console = Console(highlight=False)
    table = Table("step", "reward as trained", "replayed", title="mean reward", title_justify="left")
    for step, trained, again in result.by_step().iter_rows():
        table.add_row(str(step), f"{trained:.4f}", f"{again:.4f}")
    console.print(table)
    groups = result.groups()
    told, again = groups["told_by_reward"], groups["told_by_replayed"]
    both = groups.filter(pl.col("told_by_reward") & pl.col("told_by_replayed"))
    changed = both.filter(pl.col("best_by_reward") != pl.col("best_by_replayed"))
    console.print(
        f"{len(groups)} groups: {told.sum()} had something to learn from, {again.sum()} would have "
        f"({(again & ~told).sum()} gained, {(told & ~again).sum()} lost)"
    )
    if len(both):
        agreement = float(both["agreement"].to_numpy().mean())
        console.print(
            f"of {len(both)} with both, the best completion is another in {len(changed)}; "
            f"mean rank correlation {agreement:.3f}"
        )
    if out is not None:
        write_parquet(out, result.table)
        console.print(f"every completion: {out}", markup=False, soft_wrap=True)


def _lines_of(file: Path) -> TextIO:
    # a mark at the beginning is skipped, and a line that is not UTF-8 is a bad line, not the end
    return file.open(encoding="utf-8-sig", errors="surrogateescape")


def _explain(suite: RewardSuite, line: Line) -> None:
    example, completion = line.example, line.record["completion"]
    assert example is not None
    row = suite.score(example, completion)
    answer, truth = row.answer, example.truth
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"question {example.question.question_id}: {example.question.entity}", markup=False)
    console.print(f"completion: {completion[:1000]!r}", markup=False)
    read = Table("part", "true", "read", "problem")
    for a in example.question.attributes:
        given = answer.grades.get(a.name)
        read.add_row(
            a.name, str(truth.grades.get(a.name, "not graded")), "-" if given is None else str(given), ""
        )
    boxes = ["-" if box is None else str(box.to_text()) for box in (truth.bbox, answer.bbox)]
    read.add_row("bbox (slice, x, y)", *boxes, _words(answer.bbox_problem.value))
    read.add_row("grades", "", "", _words(answer.grades_problem.value))
    read.add_row("format", "", "as declared" if answer.strict else "", _words(answer.format_problem.value))
    console.print(read)
    paid = Table("component", "score", "weight", "pays", "")
    for name, score in row.components.items():
        why = row.closed_gates.get(name) or row.errors.get(name, "")
        if score is None:
            paid.add_row(name, "-", "-", "-", Text(why or "does not apply"))
        else:
            weight = row.weights[name]
            paid.add_row(name, f"{score:.4f}", f"{weight:.4f}", f"{weight * score:+.4f}", Text(why))
    paid.add_row("total", "", "", f"{row.total:+.4f}", "", style="bold")
    console.print(paid)


def _words(problem: str) -> str:
    return "" if problem == "none" else problem.replace("_", " ")


def _suite(path: Path, overrides: list[str] | None) -> RewardSuite:
    from rewards import RewardSuite
    from rl.choices import reasoning_of
    from rl.config_check import load_valid

    loaded = load_valid(path, overrides or [], needs_model=False)
    return RewardSuite.from_config(loaded.rewards, reasoning=reasoning_of(loaded))
