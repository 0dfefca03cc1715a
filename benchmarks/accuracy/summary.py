"""From answers to the rows of a report: accuracy, what it is compared with, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from accuracy.answering import Conversation, Reply, Task, asked_questions
from accuracy.questions import Item, Question
from accuracy.scoring import Guesser, facts_right, is_right, paired_difference, passes, prior, wilson
from accuracy.workfile import Result

from sparsevila import Sparsity
from sparsevila.engine.switches import switched_on

LEAK = 0.05  # by which blind accuracy may pass the prior before a type is marked


@dataclass(frozen=True)
class Answered:
    """One question with its reply and what that is worth."""

    item: Item
    question: Question
    reply: Reply
    right: float  # 0 or 1
    facts: float | None  # of a list

    @property
    def key(self) -> tuple[str, str, int]:
        return self.item.key, self.question.text, self.question.turn

    @property
    def type(self) -> str:
        return f"{self.question.kind} {self.question.type}"


def summarise(
    items: Sequence[Item], tasks: Sequence[Task], results: Iterable[Result], guesser: Guesser
) -> dict[str, Any]:
    """Everything a report says of the answers. Raises ValueError if a task lacks some of its samples."""
    talks = _by_task(items, tasks, results)
    answered = {task.key: list(_answered(items, task, talks[task.key])) for task in tasks}
    priors = _priors(items, guesser)
    return {
        "rows": [row for task in tasks for row in _accuracy_rows(task, answered[task.key], priors)],
        "paired": _paired_rows(tasks, answered),
        "costs": [row for task in tasks for row in _cost_rows(task, answered[task.key])],
        "encoding": _encoding_rows(answered),
        "agreement": [row for task in tasks for row in _agreement_rows(task, answered[task.key])],
        "overlap": [row for task in tasks for row in _overlap_rows(task, talks[task.key], answered[task.key])],
        "clips": _clip_rows(items, tasks, talks),
        "checks": [_check_row(task, answered[task.key]) for task in tasks],
    }


def _by_task(
    items: Sequence[Item], tasks: Sequence[Task], results: Iterable[Result]
) -> dict[str, list[tuple[Item, Conversation]]]:
    chunks: defaultdict[str, dict[int, tuple[Conversation, ...]]] = defaultdict(dict)
    for result in results:
        chunks[result.task][result.chunk] = result.conversations
    found = {}
    for task in tasks:
        in_order = [talk for _, part in sorted(chunks[task.key].items()) for talk in part]
        if len(in_order) != len(items):
            raise ValueError(f"{task.key}: expected {len(items)} conversations, got {len(in_order)}")
        found[task.key] = list(zip(items, in_order, strict=True))
    return found


def answered_by_task(
    items: Sequence[Item], tasks: Sequence[Task], results: Iterable[Result]
) -> dict[str, list[Answered]]:
    """Every question of every task with what its answer is worth, by `Task.key`. Raises ValueError as `summarise`."""
    talks = _by_task(items, tasks, results)
    return {task.key: list(_answered(items, task, talks[task.key])) for task in tasks}


def _answered(items: Sequence[Item], task: Task, talks: Sequence[tuple[Item, Conversation]]) -> Iterator[Answered]:
    for item, talk in talks:
        for question, reply in zip(asked_questions(item, task.protocol), talk.replies, strict=True):
            facts = facts_right(reply.text, question.answer) if question.is_long else None
            yield Answered(item, question, reply, float(is_right(reply.text, question.answer)), facts)


def _priors(items: Sequence[Item], guesser: Guesser) -> dict[str, float]:
    asked: defaultdict[str, list[tuple[Item, Question]]] = defaultdict(list)
    for item in items:
        for question in item.questions:
            asked[f"{question.kind} {question.type}"].append((item, question))
    return {type: prior(pairs, guesser) for type, pairs in asked.items()}


# Groups of questions: (what they share, its value)

Group = tuple[str, str]


def _groups_of(one: Answered) -> list[Group]:
    return [
        ("all", "all"),
        ("kind", one.question.kind),
        ("layout", one.item.layout.name),
        ("length", "long" if one.question.is_long else "short"),
        ("part", "alone" if one.question.turn < 0 else "dialogue"),
        ("type", one.type),
    ]


def _grouped(answered: Iterable[Answered], keep: Callable[[Group], bool]) -> dict[Group, list[Answered]]:
    groups: defaultdict[Group, list[Answered]] = defaultdict(list)
    for one in answered:
        for group in filter(keep, _groups_of(one)):
            groups[group].append(one)
    return dict(sorted(groups.items()))


def _task_fields(task: Task) -> dict[str, str]:
    return {"setting": task.setting.name, "protocol": task.protocol, "picture": task.picture}


def _accuracy_rows(task: Task, answered: Sequence[Answered], priors: dict[str, float]) -> Iterator[dict[str, Any]]:
    for (by, name), group in _grouped(answered, lambda _: True).items():
        right = sum(int(one.right) for one in group)
        low, high = wilson(right, len(group))
        lists = [one.facts for one in group if one.facts is not None]
        types = _grouped(group, lambda g: g[0] == "type").values()
        guessed = fmean(priors[one.type] for one in group)
        yield {
            **_task_fields(task),
            "by": by,
            "group": name,
            "n": len(group),
            "right": right,
            "accuracy": right / len(group),
            "low": low,
            "high": high,
            "macro": fmean(fmean(one.right for one in own) for own in types),
            "prior": guessed,
            "beats_prior_blind": None if task.picture == "own" else passes(right, len(group), guessed + LEAK),
            "lists": len(lists),
            "facts": fmean(lists) if lists else None,
            "cut": sum(one.reply.was_cut for one in group),
        }


# Comparisons on the same questions


def _paired_rows(tasks: Sequence[Task], answered: dict[str, list[Answered]]) -> list[dict[str, Any]]:
    """Each setting against dense and against dice of the same counts; a history against questions alone.

    The last also without the picture: what earlier turns' text gives away.
    """
    rows = []
    for task in tasks:
        for other in tasks:
            if task.picture == other.picture and _is_pair(task, other):
                fields = {**_task_fields(task), "against": other.setting.name, "against_protocol": other.protocol}
                rows += [fields | row for row in _differences(answered[task.key], answered[other.key])]
    return rows


def _is_pair(task: Task, other: Task) -> bool:
    if task.setting == other.setting:
        return other.protocol == "single" and task.protocol != "single"
    if task.protocol != other.protocol or task.picture != "own":
        return False
    is_dice = other.setting.sparsity.method == "random" and task.setting.sparsity.method not in ("random", "dense")
    ours, theirs = task.setting.sparsity, other.setting.sparsity
    same_counts = (ours.prefill, ours.decode, ours.scope) == (theirs.prefill, theirs.decode, theirs.scope)
    is_plain = bool(switched_on(ours)) and theirs == Sparsity(ours.prefill, ours.decode, ours.method)
    return other.setting.name == "dense" or (is_dice and same_counts) or is_plain


def _differences(ours: Sequence[Answered], theirs: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    known = {one.key: one for one in theirs}
    both = [one for one in ours if one.key in known]
    for (by, name), group in _grouped(both, lambda g: g[0] != "part").items():
        pairs = [(one, known[one.key]) for one in group]
        samples = [one.item.key for one in group]
        yield {
            "by": by,
            "group": name,
            "n": len(group),
            **asdict(paired_difference(samples, [a.right for a, _ in pairs], [b.right for _, b in pairs])),
            "only_ours": sum(a.right > b.right for a, b in pairs),
            "only_theirs": sum(a.right < b.right for a, b in pairs),
            "facts": _facts_difference(pairs),
        }


def _facts_difference(pairs: Sequence[tuple[Answered, Answered]]) -> dict[str, float] | None:
    lists = [(a.item.key, a.facts, b.facts) for a, b in pairs if a.facts is not None and b.facts is not None]
    if not lists:
        return None
    samples, ours, theirs = zip(*lists, strict=True)
    return asdict(paired_difference(samples, ours, theirs))


# What it costs


def _cost_rows(task: Task, answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    for (by, name), group in _grouped(answered, lambda g: g[0] in ("all", "layout")).items():
        replies = [one.reply for one in group]
        first = [reply for reply in replies if reply.cached_tokens == 0]  # these prefilled the picture, too
        later = [reply for reply in replies if reply.cached_tokens > 0]
        steps = sum(reply.output_tokens - reply.was_cut for reply in replies)
        yield {
            **_task_fields(task),
            "by": by,
            "group": name,
            "n": len(replies),
            "visual_total": fmean(reply.visual_total for reply in replies),
            "visual_kept": fmean(reply.visual_kept for reply in replies),
            "visual_active": fmean(reply.visual_active for reply in replies),
            "layer_tokens": fmean(reply.layer_tokens for reply in replies),
            "kv_read_bytes": fmean(reply.kv_read_bytes for reply in replies),
            "output_tokens": fmean(reply.output_tokens for reply in replies),
            "first_prefill_s": _mean(reply.prefill_s for reply in first),
            "later_prefill_s": _mean(reply.prefill_s for reply in later),
            "retrieval_s": fmean(reply.retrieval_s for reply in replies),
            "decode_s": fmean(reply.decode_s for reply in replies),
            "step_s": sum(reply.decode_s for reply in replies) / steps if steps else None,
            "first_ttft_s": _mean(reply.ttft_s for reply in first),
            "later_ttft_s": _mean(reply.ttft_s for reply in later),
        }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _encoding_rows(answered: dict[str, list[Answered]]) -> list[dict[str, Any]]:
    """Time of the encoder per picture: the settings share it, so it stands in the first answer of any of them."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for one in (one for group in answered.values() for one in group if one.reply.encode_s > 0):
        times[one.item.layout.name].append(one.reply.encode_s)
    return [{"layout": name, "n": len(found), "encode_s": fmean(found)} for name, found in sorted(times.items())]


# Diagnostics


def _agreement_rows(task: Task, answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    compared = [one for one in answered if one.reply.kl]
    for (by, name), group in _grouped(compared, lambda g: g[0] in ("all", "kind", "length")).items():
        kl = [value for one in group for value in one.reply.kl]
        top1 = [value for one in group for value in one.reply.top1]
        yield {
            **_task_fields(task),
            "by": by,
            "group": name,
            "questions": len(group),
            "steps": len(kl),
            "kl": fmean(kl),
            "top1": fmean(top1),
            "all_top1": fmean(all(one.reply.top1) for one in group),
        }


def _overlap_rows(
    task: Task, talks: Sequence[tuple[Item, Conversation]], answered: Sequence[Answered]
) -> Iterator[dict[str, Any]]:
    jaccard = [talk.jaccard for _, talk in talks if talk.jaccard is not None]
    sinks = [talk.sinks for _, talk in talks if talk.sinks is not None]
    if jaccard:
        read = fmean(one.reply.visual_active / one.reply.visual_kept for one in answered)
        yield {
            **_task_fields(task),
            "sessions": len(jaccard),
            "jaccard": [fmean(layer) for layer in zip(*jaccard, strict=True)],
            "sinks": [fmean(layer) for layer in zip(*sinks, strict=True)],
            "jaccard_by_chance": read / (2 - read),  # of two random sets of this size, about
        }


def _clip_rows(
    items: Sequence[Item], tasks: Sequence[Task], talks: dict[str, list[tuple[Item, Conversation]]]
) -> list[dict[str, Any]]:
    """What the files cost the pictures, per layout."""
    quality: defaultdict[str, list[float]] = defaultdict(list)
    clips: defaultdict[str, int] = defaultdict(int)
    for task in [task for task in tasks if task.picture == "own"][:1]:
        for item, talk in talks[task.key]:
            if talk.psnr:
                clips[item.layout.name] += 1
                quality[item.layout.name] += talk.psnr
    return [
        {"layout": name, "clips": clips[name], "frames": len(found), "psnr_mean": fmean(found), "psnr_min": min(found)}
        for name, found in sorted(quality.items())
    ]


def _check_row(task: Task, answered: Sequence[Answered]) -> dict[str, Any]:
    """Questions that a fresh session answered with the same tokens; later questions for which media were redone."""
    again = [one.reply.same_when_fresh for one in answered if one.reply.same_when_fresh is not None]
    shares_session = task.picture != "none" and not (task.protocol == "single" and task.setting.needs_question)
    later = [one.reply for one in answered if one.question.turn > 0 and shares_session]
    redone = sum(reply.encode_s > 0 or reply.cached_tokens < reply.visual_kept for reply in later)
    return {
        **_task_fields(task),
        "asked_again": len(again),
        "same_when_fresh": sum(again),
        "later_questions": len(later),
        "media_prefilled_again": redone,
    }
