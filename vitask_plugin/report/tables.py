"""The paper's tables with our rows beside its own, and every metric of every run."""

from collections.abc import Sequence

from markupsafe import Markup

from vitask_plugin.data.instructions import label_sets
from vitask_plugin.evaluation.intervals import interval_of_mean
from vitask_plugin.evaluation.metric_list import TITLES, is_shown, written
from vitask_plugin.report import paper
from vitask_plugin.report.page import MISSING, Cell, Section, Table
from vitask_plugin.report.results import TEST, TaskResult, is_ours, split_of, split_task
from vitask_plugin.report.runs import Run, Training
from vitask_plugin.report.seeds import mean

IN_WORDS = (
    "Accuracy / macro-F1 of the answers in words, below them 95% bootstrap intervals, of several seeds their standard "
    "deviation; an answer that names no label is wrong. Accuracy is the share of images whose answer is right."
)
VARIANTS = {
    "": "Answers in words",
    "incomplete": "Answers, no label set in the prompt",
    "score": "Likelihood of labels",
}


def metric_cell(result: TaskResult | None, *metrics: str) -> Cell:
    """Metrics of one task and below them their 95% intervals; of several seeds their standard deviations."""
    if result is None:
        return Cell(MISSING)
    values = [result.metrics.get(name) for name in metrics]
    if any(value is None for value in values):
        return Cell(MISSING)
    if result.over_seeds:
        return Cell(" / ".join(map(written, metrics, values)), _spread(result, metrics))
    ends = [result.intervals.get(name) for name in metrics]
    intervals = " / ".join(f"{low:.2f}\u2013{high:.2f}" for low, high in ends) if all(ends) else ""
    return Cell(" / ".join(written(name, value) for name, value in zip(metrics, values, strict=True)), intervals)


def _spread(result: TaskResult, metrics: Sequence[str]) -> str:
    deviations = [result.deviation(name) for name in metrics]
    text = " / ".join(MISSING if value is None else f"{value:.3f}" for value in deviations)
    return f"\u00b1 {text}, {len(result.over_seeds)} seeds"


def data_sets(runs: Sequence[Run]) -> list[str]:
    """Names of our data sets that any run was judged on: one's own, then those of the paper in its order."""
    found = {split_task(task)[0] for run in runs for task in run.tasks if is_ours(task)}
    order = list(paper.published()["main"]["tasks"])

    def place(data_set: str) -> tuple[int, str]:
        name, split = split_of(data_set)
        number = -1 if is_own(data_set) else order.index(name) if name in order else len(order)
        return number, f"{name} {split != TEST} {split}"

    return sorted(found, key=place)


def title(data_set: str) -> str:
    """The data set's name for people: "retina" of "medmnist_retina", "retina (val)" of another split than test; an own
    set's is that of its folder."""
    name, split = split_of(data_set)
    short = name.removeprefix("vitask_" if is_own(data_set) else "medmnist_")
    if short != name and f"medmnist_{short}" in label_sets() and is_own(data_set):
        short = f"own {short}"
    return short + f" ({split})" * (split != TEST)


def is_own(data_set: str) -> bool:
    """Whether these are somebody's own images (`vitask data folder`), and no published or drawn set."""
    return split_of(data_set)[0] not in label_sets()


def overview(runs: Sequence[Run]) -> Section:
    """Which models, with which arguments, on what."""
    rows = []
    for run in runs:
        judged = {split_of(split_task(task)[0]) for task in run.tasks if is_ours(task)}
        sizes = [result.images for result in run.tasks.values() if result.images]
        limited = any(effective < original for effective, original in sizes)
        rows.append(
            [
                run.name,
                run.model,
                ", ".join(f"{key}={value}" for key, value in run.arguments.items()) or MISSING,
                run.training.text if run.training else MISSING,
                MISSING if run.seed is None else str(run.seed),
                str(len({name for name, _ in judged})),
                ", ".join(sorted({split for _, split in judged})) or MISSING,
                "part (--limit)" if limited else "all",
            ]
        )
    columns = ["run", "model", "arguments", "training record", "seed", "data sets", "split", "images"]
    return Section("Runs", [Table(columns, rows, words=4)])


def choosing(runs: Sequence[Run]) -> str | None:
    """A word of caution where metrics of several runs stand side by side on the test split; None elsewhere."""
    tests = [{task for task in run.tasks if is_ours(task) and split_of(task)[1] == TEST} for run in runs]
    if not any(one & other for number, one in enumerate(tests) for other in tests[:number]):
        return None
    return (
        "These runs are compared on test images: choosing among them by these figures is choosing on the test split, "
        "and what was chosen so has no unseen figure left. To choose a model, a weight or a prompt, judge on the val "
        "split (MEDMNIST_SPLIT=val, VITASK_SPLIT=val)."
    )


def main(runs: Sequence[Run]) -> Section | None:
    """Table 1: accuracy and macro-F1 of each known data set, a table per split; None if no run answered in words."""
    sets = [name for name in data_sets(runs) if not is_own(name) and any(name in run.tasks for run in runs)]
    if not sets:
        return None
    tables = by_split(runs, sets)
    published = paper.published()["main"]["tasks"]
    known = [name for name in sets if name in published]
    notes: list[str | Markup] = [IN_WORDS]
    if 1 < len(known) < len(published):
        notes.append("The mean in the paper's columns is computed here from the paper's figures of the sets shown.")
    if "medmnist_chest" in map(_name, sets):
        notes.append(
            "Chest has several labels per image, and all of them have to be right. The paper does not say so, but what "
            "medmnist calls accuracy there, the mean over labels, is about .95 for any model, and the paper's is .53."
        )
    return Section("Main results: the paper's table 1" if known else "Main results", tables, notes)


def by_split(runs: Sequence[Run], sets: Sequence[str]) -> list[Table]:
    """Accuracy and macro-F1 of data sets: a table per split, a row per set, a column per run."""
    splits = {split: [name for name in sets if split_of(name)[1] == split] for _, split in map(split_of, sets)}
    return [_main_table(runs, found, split) for split, found in sorted(splits.items())]


def _main_table(runs: Sequence[Run], sets: Sequence[str], split: str) -> Table:
    """The data sets of one split; the paper's numbers are of test."""
    published = paper.published()["main"]
    models = published["models"] if set(sets) & set(published["tasks"]) else []
    columns: list[str | Cell] = ["data set", *(run.name for run in runs), *map(paper.heading, models)]
    rows = []
    for name in sets:
        theirs = [paper.cell(*pair) for pair in published["tasks"].get(name, [])] or [Cell("")] * len(models)
        rows.append([title(name), *(metric_cell(run.tasks.get(name), *paper.METRICS) for run in runs), *theirs])
    averaged = [name for name in sets if _name(name) in published["tasks"]]
    if len(averaged) > 1:
        rows.append(_mean_row(runs, averaged, models))
    return Table(columns, rows, "" if split == TEST else f"On the {split} split")


def _name(data_set: str) -> str:
    return split_of(data_set)[0]


def _mean_row(runs: Sequence[Run], sets: Sequence[str], models: Sequence[str]) -> list[str | Cell]:
    """Plain means over the sets; where a run lacks one there is none."""
    published = paper.published()["main"]
    row: list[str | Cell] = [f"mean of {len(sets)} sets"]
    for run in runs:
        results = [run.tasks.get(name) for name in sets]
        if any(result is None or result.metrics.get(metric) is None for result in results for metric in paper.METRICS):
            row.append(MISSING)
        else:
            row.append(metric_cell(_mean_over_sets(results), *paper.METRICS))
    if not models:
        return row
    if len(sets) == len(published["tasks"]):
        return [*row, *(paper.cell(*pair) for pair in published["mean"])]
    pairs = zip(*(published["tasks"][name] for name in sets), strict=True)
    return [*row, *(paper.cell(*(sum(c) / len(c) for c in zip(*column, strict=True))) for column in pairs)]


def _mean_over_sets(results: Sequence[TaskResult]) -> TaskResult:
    """Of several seeds: the mean of each one's mean, so that its deviation is over the seeds too."""
    if all(result.over_seeds for result in results):
        return mean([_mean_over_sets(own) for own in zip(*(result.over_seeds for result in results), strict=True)])
    means = {name: sum(result.metrics[name] for result in results) / len(results) for name in paper.METRICS}
    intervals = {
        name: interval_of_mean([result.intervals[name] for result in results])
        for name in paper.METRICS
        if all(name in result.intervals for result in results)
    }
    return TaskResult(means, intervals)


def ablation(runs: Sequence[Run]) -> Section | None:
    """Table 2: what RDA and CRT add; None if no checkpoint keeps a record of its training."""
    published = paper.published()["ablation"]
    trained = [run for run in runs if run.training]
    own = [name for name in data_sets(trained) if any(name in run.tasks for run in trained)]
    if not own:
        return None
    known = published["tasks"] if set(published["tasks"]) & set(own) else []
    sets = [*known, *(name for name in own if name not in known)]
    rows: list[list[str | Cell]] = []
    for run in trained:
        marks = (_rda_mark(run.training), _mark(run.training.crt), _ep_mark(run))
        rows.append([run.name, *marks, *(metric_cell(run.tasks.get(name), "macro_f1") for name in sets)])
    for row in published["rows"] if known else []:
        theirs = dict(zip(published["tasks"], row["macro_f1"], strict=True))
        marks = [Cell(_mark(row[key]), paper=True) for key in ("rda", "crt")]
        cells = [paper.cell(theirs[name]) if name in theirs else Cell("", paper=True) for name in sets]
        rows.append([paper.heading(paper.ablation_name(row)), *marks, Cell(_mark(False), paper=True), *cells])
    notes = [
        "Macro-F1 of the answers in words. RDA, CRT: whether the term was in the training loss, from the record beside "
        "the checkpoint; a run whose checkpoint is not on this machine is left out. EP: exemplars in the prompt at "
        "inference, with their kind in brackets if it is not cls.",
        *["RDA*: RDA that is not detached, the paper's control."]
        * any(run.training.rda and not run.training.detached for run in trained),
        *["In the paper, the same four rows with EP nearly coincide; they are not repeated here."] * bool(known),
    ]
    columns = ["run", "RDA", "CRT", "EP", *map(title, sets)]
    return Section("Ablation: the paper's table 2", [Table(columns, rows)], notes)


def _mark(there: bool) -> str:
    return "yes" if there else "no"


def _rda_mark(training: Training) -> str:
    return "RDA* (not detached)" if training.rda and not training.detached else _mark(training.rda)


def _ep_mark(run: Run) -> str:
    kind = run.training.kind
    return f"yes ({kind})" if run.ep and kind not in ("", "cls") else _mark(run.ep)


def every_metric(runs: Sequence[Run], data_set: str) -> list[Table]:
    """All metrics of one data set with their 95% intervals: a table per variant of its task, a column per run."""
    tables = []
    for variant, heading in VARIANTS.items():
        task = f"{data_set}_{variant}" if variant else data_set
        found = [(run.name, run.tasks[task]) for run in runs if task in run.tasks]
        several = any(result.data and result.data.multi_label for _, result in found)
        names = [name for name in TITLES if is_shown(name, multi_label=several)]
        rows = [
            [TITLES[name], *(metric_cell(result, name) for _, result in found)]
            for name in names
            if any(name in result.metrics for _, result in found)
        ]
        if found:
            tables.append(Table(["", *(name for name, _ in found)], rows, heading))
    return tables


def other_tasks(runs: Sequence[Run]) -> Section | None:
    """What lmms-eval says of its own tasks in the same folders, for instance to see general ability; None without."""
    rows = [
        [run.name, task, name, metric_cell(result, name)]
        for run in runs
        for task, result in run.tasks.items()
        if not is_ours(task)
        for name, value in result.metrics.items()
        if value is not None
    ]
    if not rows:
        return None
    table = Table(["run", "task", "metric", "value"], rows, words=3)
    return Section("Other tasks", [table], ["As lmms-eval reports them."])
