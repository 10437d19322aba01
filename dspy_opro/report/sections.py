"""The page's sections: each a function from the result to markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from dspy_opro.result import OPROResult, counted

from .drawing import draw_effort, draw_scores
from .figures import Cause, causes, effort_figure, score_figure, word_diff
from .markup import Html, Node, tag
from .words import REASONS, duration, number, signed


def head(result: OPROResult, title: str) -> Html:
    """What came out, in one line and five figures."""
    trials, curve = result.trajectory.trials, result.curve
    meaning = REASONS.get(result.stop_reason)
    name = tag("code", result.stop_reason)
    reason: Node = ["Ended by ", name, "."] if meaning is None else [f"Ended because {meaning} (", name, ")."]
    if curve:
        gain = curve[-1] - curve[0]
        result_line = tag(
            "p",
            tag("span", number(curve[0]), class_="from"),
            tag("span", "→", class_="arrow"),
            tag("strong", number(curve[-1])),
            tag("span", signed(gain), class_="gain" if gain > 0 else "gain none"),
            tag("span", f"mean score on {result.deciding_data}", class_="what"),
            class_="outcome",
        )
    else:
        result_line = tag("p", "The run ended before the student itself was scored.", class_="what")
    pruned = sum(t.state == "pruned" for t in trials)
    rounds, candidates = max(0, len(curve) - 1), max(0, len(trials) - 1)
    tiles = [
        (f"{rounds}", "round" if rounds == 1 else "rounds"),
        (f"{candidates:,}", f"candidate{'s' * (candidates != 1)}, {pruned:,} dropped early"),
        (f"{result.usage.metric_calls:,}", "examples scored"),
        (f"{result.usage.tokens:,}", "tokens"),
        (duration(result.seconds), "wall time"),
    ]
    return tag(
        "header",
        tag("p", "OPRO report", class_="kicker"),
        tag("h1", title),
        tag("p", result.config["description"], class_="what") if result.config.get("description") else None,
        result_line,
        tag("ul", [tag("li", tag("b", value), tag("span", text)) for value, text in tiles], class_="tiles"),
        tag("p", reason, class_="reason"),
    )


def scores(result: OPROResult) -> Html:
    """Best score by round with every trial."""
    on_valset = result.selected_on == "valset"
    note = (
        "The line is the best score on the valset, points are candidates by their reward on the trainset."
        if on_valset
        else "The line is the best score so far, points are candidates by their reward. There was no valset: the "
        "trainset also chose the result, so the score on unseen data may be lower."
    )
    note += (
        " The reward of a candidate that was dropped early is an estimate from the examples it saw, and may lie "
        "outside the metric's range."
    )
    legend = tag(
        "p",
        _key("curve", "best so far"),
        _key("best", "returned"),
        _key("complete", "scored in full"),
        _key("pruned", "dropped early"),
        class_="legend",
    )
    figure = score_figure(result)
    return section("Scores", tag("p", note), legend, _both_widths(figure, draw_scores, 320, 260))


def _key(kind: str, text: str) -> Html:
    return tag("span", tag("i", class_=kind), text)


def _both_widths(figure: Any, draw: Callable[[Any, int, int], Html], high: int, low: int) -> Html:
    """A figure for wide screens and one for phones: scaled down, its letters could not be read."""
    return tag(
        "figure",
        tag("div", draw(figure, 880, high), class_="wide"),
        tag("div", draw(figure, 360, low), class_="narrow"),
    )


def instructions(result: OPROResult) -> Html:
    """Every predictor's text before and after."""
    before, after = result.baseline.candidate.instructions, result.instructions
    return section(
        "Instructions",
        tag("p", "Words that went are struck through, words that came are marked."),
        [_before_after(name, before[name], after[name], len(before) > 1) for name in before],
    )


def _before_after(name: str, before: str, after: str, is_named: bool) -> Html:
    title = tag("h3", tag("code", name)) if is_named else None
    if before == after:
        card = tag("div", tag("h4", "Unchanged"), tag("p", after, class_="text"), class_="card")
        return tag("div", title, tag("div", card, class_="pair single"))
    runs = word_diff(before, after)
    old = [tag("del", w.before) if w.change == "removed" else w.before for w in runs]
    new = [tag("ins", w.after) if w.change == "added" else w.after for w in runs]
    return tag(
        "div",
        title,
        tag(
            "div",
            tag("div", tag("h4", "Before"), tag("p", old, class_="text"), class_="card"),
            tag("div", tag("h4", "After"), tag("p", new, class_="text"), class_="card after"),
            class_="pair",
        ),
    )


def spending(result: OPROResult) -> Html:
    """Calls, tokens, dollars, time; and the examples by round."""
    usage = result.usage
    rows = [
        (_calls("Calls of the program", result, "task_model"), f"{usage.scorer_calls:,}"),
        (_calls("Calls of the optimizer LM", result, "prompt_model"), f"{usage.proposer_calls:,}"),
        ("Answered from the cache", f"{usage.cached_calls:,}"),
        ("Prompt tokens", f"{usage.prompt_tokens:,}"),
        ("Completion tokens", f"{usage.completion_tokens:,}"),
        ("Cost, as far as prices are known", f"${usage.cost:,.4f}"),
        ("Examples scored", f"{usage.metric_calls:,}"),
        ("Wall time of this call", duration(result.seconds)),
    ]
    table = tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows], class_="facts")
    if not result.trajectory.trials:
        return section("Spending", table)
    figure = effort_figure(result)
    share = figure.num_scored / figure.num_full
    legend = tag(
        "p", _key("bar complete", "on candidates scored in full"), _key("bar pruned", "on candidates dropped early"),
        class_="legend",
    )  # fmt: skip
    note = (
        f"Train examples by round: {figure.num_scored:,} instead of {figure.num_full:,} ({share:.0%}) that scoring "
        "every candidate in full would have taken."
    )
    return section("Spending", table, tag("p", note), legend, _both_widths(figure, draw_effort, 180, 170))


def _calls(what: str, result: OPROResult, role: str) -> str:
    """A label with the LM's name, where the run was given one."""
    name = result.config.get(role)
    return f"{what} ({name})" if name else what


def failures(result: OPROResult) -> Html | None:
    """Failed examples by cause, and proposals that were not used."""
    parts: list[Node] = []
    if result.num_failures:
        note = f"{counted(result.num_failures, 'example')} failed and counted as the failure score."
        if len(result.failures) < result.num_failures:
            note += f" These are the first {len(result.failures):,}."
        parts.append(
            (tag("p", note), tag("ul", [_cause(c) for c in causes(result.failures)], class_="causes"))
        )
    if result.problems:
        common = Counter(result.problems).most_common(20)
        items = [tag("li", tag("b", f"{count} ×"), tag("span", text)) for text, count in common]
        parts.append((tag("h3", "Proposals that were not used"), tag("ul", items, class_="causes")))
    return section("Failures", parts) if parts else None


def _cause(cause: Cause) -> Html:
    places = []
    for split, examples in cause.examples.items():
        shown = ", ".join(map(str, examples[:12])) + (" …" if len(examples) > 12 else "")
        places.append(f"{split}set[{shown}]")
    where = f"{' and '.join(places)}, {counted(cause.num_candidates, 'candidate')}"
    return tag("li", tag("b", f"{cause.count} ×"), tag("span", cause.error, tag("small", where)))


def settings(result: OPROResult) -> Html:
    """Every setting that has a value, folded."""
    given = {key: value for key, value in result.config.items() if value is not None}
    items = [tag("div", tag("dt", key), tag("dd", str(value))) for key, value in given.items()]
    study = tag("p", "Optuna study ", tag("code", result.study_name)) if result.study_name else None
    return section(
        "Settings", study, tag("details", tag("summary", "All settings"), tag("dl", items, class_="facts"))
    )


def section(title: str, *content: Node) -> Html:
    return tag("section", tag("h2", title), *content)
