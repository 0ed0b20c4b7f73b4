"""The parts of the page that show samples: response ranking, incomplete prompts, and each data set by itself."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vitask_plugin.calibration_error import BINS
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Probabilities
from vitask_plugin.report import charts, paper
from vitask_plugin.report.gallery import errors
from vitask_plugin.report.page import MISSING, Block, Cell, Chart, Confusion, Grid, Section, Table
from vitask_plugin.report.ranking import Ranking, response_ranking
from vitask_plugin.report.results import Answer, TaskResult
from vitask_plugin.report.runs import Run
from vitask_plugin.report.tables import VARIANTS, data_sets, every_metric, metric_cell, title

# So many data sets are shown unfolded.
UNFOLDED = 3
Rankings = dict[tuple[str, str], Ranking]

_RANKING_NOTES = (
    "How likely is a response given its own image (a positive pair), and how likely is the same response given a "
    "negative image, one with the same instruction and another label? The tasks that score labels hold log "
    "p(response | image) of every label for every image judged. So no negative image is drawn at random: all of them "
    "are used, each weighted by how often drawing would give it. Every label weighs the same in both densities; only "
    "the image differs.",
    "Overlap: the area that both densities share. 1 = the image makes no difference, 0 = they are apart. Ranked "
    "right: how often a response is more likely given its own image than given a negative one; 0.5 is chance.",
    "Where this differs from the paper's figure: its densities are of the probability of a response token; these are "
    "of the whole response, label and end token, in nats (vitask_llava sums over the tokens; other models of "
    "lmms-eval may give the mean), smoothed with Gaussian kernels (Scott's rule). The paper has no number for the "
    "overlap.",
)


def rankings(runs: Sequence[Run]) -> Rankings:
    """{(data set, run): ranking} for every task that scored labels and logged it."""
    found = {}
    for name in data_sets(runs):
        for run in runs:
            result = run.tasks.get(f"{name}_score")
            ranking = _ranking(result) if result and result.data else None
            if ranking is not None:
                found[name, run.name] = ranking
    return found


def _ranking(result: TaskResult) -> Ranking | None:
    answers = list(result.answers.values())
    likelihoods = np.array([answer.log_likelihoods for answer in answers], dtype=float)
    members = np.zeros(likelihoods.shape, dtype=bool)
    for row, answer in enumerate(answers):
        # Of a multi-label set the last answer is "no finding".
        labels = answer.label if isinstance(answer.label, list) else [answer.label]
        members[row, labels or [-1]] = True
    return response_ranking(likelihoods, members)


def ranking_section(found: Rankings) -> Section | None:
    """The numbers of all rankings, and how they are made; None without any."""
    if not found:
        return None
    rows = [
        [title(name), run, f"{ranking.overlap:.3f}", f"{ranking.ranked:.3f}", str(ranking.images)]
        for (name, run), ranking in found.items()
    ]
    table = Table(["data set", "run", "overlap", "ranked right", "positive pairs"], rows, words=2)
    return Section("Response ranking: the paper's figure 3", [table], _RANKING_NOTES)


def incomplete(runs: Sequence[Run]) -> Section | None:
    """Figure 4: macro-F1 with and without the label set in the prompt; None if no run was judged on both."""
    published = paper.published()["incomplete"]
    pairs = [
        (name, run, run.tasks[name], run.tasks[f"{name}_incomplete"])
        for name in data_sets(runs)
        for run in runs
        if name in run.tasks and f"{name}_incomplete" in run.tasks
    ]
    if not pairs:
        return None
    rows: list[list[str | Cell]] = [
        [title(name), run.name, metric_cell(full, "macro_f1"), metric_cell(bare, "macro_f1"), _change(full, bare)]
        for name, run, full, bare in pairs
    ]
    theirs = list(zip(published["models"], published["complete"], published["incomplete"], strict=True))
    for model, full, bare in theirs:
        names = [paper.heading(title(published["task"])), Cell(model, paper=True)]
        rows.append([*names, paper.cell(full), paper.cell(bare), Cell(f"{bare - full:+.3f}", paper=True)])
    sets = list(dict.fromkeys([*(name for name, *_ in pairs), published["task"]]))
    drawn = []
    for name in sets:
        bars = [(run.name, _bar(full), _bar(bare)) for other, run, full, bare in pairs if other == name]
        if name == published["task"]:
            bars += [(f"{model} (paper)", (full, None), (bare, None)) for model, full, bare in theirs]
        names, first, second = zip(*bars, strict=True)
        svg = charts.paired_bars(names, first, second, ("complete", "incomplete"))
        heading = title(name) + ("" if any(other == name for other, *_ in pairs) else " (the paper's figures alone)")
        drawn.append(Chart(heading, svg))
    notes = [
        "The same question with the label set in the prompt (complete) and without it (incomplete): macro-F1 of the "
        "answers in words, with 95% intervals.",
    ]
    table = Table(["data set", "run", "complete", "incomplete", "change"], rows, words=2)
    return Section("Incomplete instructions: the paper's figure 4", [table, Grid(drawn, 28)], notes)


def _change(full: TaskResult, bare: TaskResult) -> str:
    ends = full.metrics.get("macro_f1"), bare.metrics.get("macro_f1")
    return MISSING if None in ends else f"{ends[1] - ends[0]:+.3f}"


def _bar(result: TaskResult) -> charts.Bar:
    return result.metrics.get("macro_f1") or 0.0, result.intervals.get("macro_f1")


def data_set_sections(runs: Sequence[Run], found: Rankings, images: int) -> list[Section]:
    """One section per data set: every metric, confusions, calibration, ranking, and images that were answered wrong.

    Args:
        images: at most so many wrong ones per data set.
    """
    names = data_sets(runs)
    return [
        Section(title(name), list(_data_set(runs, name, found, images)), folded=len(names) > UNFOLDED) for name in names
    ]


def _data_set(runs: Sequence[Run], name: str, found: Rankings, images: int) -> Iterator[Block]:
    yield Grid(every_metric(runs, name), 25)
    logged = {
        variant: [(run, result) for run in runs if (result := _result(run, name, variant)) and result.data]
        for variant in VARIANTS
    }
    for variant, results in logged.items():
        if results:
            yield _confusions(results, variant, folded=variant != next(v for v in logged if logged[v]))
    if logged["score"]:
        yield _calibration(logged["score"])
    ranked = {run.name: found[name, run.name] for run in runs if (name, run.name) in found}
    if ranked:
        yield _densities(ranked)
    if images and (judged := logged[""] or logged["score"]):
        yield errors(judged, logged["score"], images)


def _densities(ranked: Mapping[str, Ranking]) -> Section:
    ends = min(r.grid[0] for r in ranked.values()), max(r.grid[-1] for r in ranked.values())
    drawn = [
        Chart(
            name,
            charts.densities(ranking.grid, ranking.positive, ranking.negative, ends),
            f"Overlap {ranking.overlap:.3f}, ranked right {ranking.ranked:.3f}",
        )
        for name, ranking in ranked.items()
    ]
    return Section("Response ranking", [Grid(drawn)])


def _result(run: Run, name: str, variant: str) -> TaskResult | None:
    return run.tasks.get(f"{name}_{variant}" if variant else name)


def _confusions(results: Sequence[tuple[Run, TaskResult]], variant: str, *, folded: bool) -> Section:
    data = results[0][1].data
    if data.multi_label:
        notes = [
            "Of each label, found / missed / false: images that have it and were given it, that have it and were "
            "not, and that were given it without having it."
        ]
        blocks: list[Block] = [_presence(results)]
    else:
        notes = ['Row: the label. Column: the answer. "no label": the answer named no label, or several.']
        matrices = [
            Confusion(metrics.confusion(result.outcomes, len(data.choices)), data.choices, run.name)
            for run, result in results
        ]
        blocks = [Grid(matrices, 30)]
    return Section(f"Confusion: {VARIANTS[variant].lower()}", blocks, notes, folded)


def _presence(results: Sequence[tuple[Run, TaskResult]]) -> Table:
    """Of a multi-label task, per label how often it was found, missed and falsely named."""
    rows = []
    for index, choice in enumerate(results[0][1].data.choices):
        cells = []
        for _, result in results:
            pairs = [(index in a.label, index in (a.prediction or [])) for a in result.answers.values()]
            counts = (pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True)))
            cells.append(" / ".join(map(str, counts)))
        rows.append([choice, *cells])
    return Table(["label", *(run.name for run, _ in results)], rows)


def _calibration(results: Sequence[tuple[Run, TaskResult]]) -> Section:
    drawn = []
    for run, result in results:
        bins = metrics.reliability([_probabilities(answer, result) for answer in result.answers.values()])
        confidence, correct, counts = zip(*bins, strict=True)
        ece = metric_cell(result, "ece")
        caption = f"ECE {ece.text}" + (f" ({ece.detail})" if ece.detail else "")
        drawn.append(Chart(run.name, charts.reliability(confidence, correct, counts), caption))
    several = results[0][1].data.multi_label
    what = (
        "each label against how often it is there" if several else "the likeliest label against how often it is right"
    )
    notes = [
        f"The probability of {what}, in {BINS} bins of equal width; on the dashed line a model is right as "
        "often as it says. The larger a point, the more images."
    ]
    return Section("Calibration", [Grid(drawn, 17)], notes)


def _probabilities(answer: Answer, result: TaskResult) -> Probabilities:
    kind = result.data.kind
    if not result.data.multi_label:
        return Probabilities(answer.label, answer.probabilities, kind)
    return Probabilities([int(i in answer.label) for i in range(len(result.data.choices))], answer.probabilities, kind)
