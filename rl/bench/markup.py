"""Tables as text: Markdown for GitHub, LaTeX for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from rl.bench.views import TableView


def markdown(view: TableView) -> str:
    """A GitHub table. Pipes and line breaks in names are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    rule = "|---|" + "---:|" * (len(view.columns) - 1)
    return "\n".join(
        [
            f"## {view.title}",
            "",
            view.note,
            "",
            line(view.columns),
            rule,
            *(line(r.cells) for r in view.rows),
            "",
        ]
    )


def latex(view: TableView) -> str:
    """A booktabs table; the note becomes its caption."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_tex(c) for c in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_tex(view.title)}. {_tex(view.note)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(view.columns) - 1)}}}",
            r"\toprule",
            line(view.columns),
            r"\midrule",
            *(line(r.cells) for r in view.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≥": r"$\geq$",
    "−": "$-$",
}
_TEX |= {c: "\\" + c for c in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text.replace("\n", " "))
