"""The paper's figures: complete, and consistent with each other."""

import pytest

from vitask_plugin.data.instructions import DRAWN, label_sets
from vitask_plugin.report import paper


def test_every_medmnist_task_has_figures_of_every_model() -> None:
    main = paper.published()["main"]
    assert set(main["tasks"]) == set(label_sets()) - {DRAWN.task}
    for pairs in main["tasks"].values():
        assert len(pairs) == len(main["models"]) and all(len(pair) == 2 for pair in pairs)


def test_the_published_means_are_the_means_of_the_figures() -> None:
    """A wrong digit in a column would show, from 0.012 on; the paper rounds to three digits."""
    main = paper.published()["main"]
    for model, mean in enumerate(main["mean"]):
        for metric in (0, 1):
            values = [pairs[model][metric] for pairs in main["tasks"].values()]
            assert sum(values) / len(values) == pytest.approx(mean[metric], abs=0.00105)


def test_the_ablation_ends_where_the_main_table_does() -> None:
    main, ablation = paper.published()["main"], paper.published()["ablation"]
    columns = {(row["rda"], row["crt"]): row["macro_f1"] for row in ablation["rows"]}
    for terms, model in (((False, False), "InternVL-2B vanilla"), ((True, True), "VITask w/o EP")):
        place = main["models"].index(model)
        assert columns[terms] == [main["tasks"][task][place][1] for task in ablation["tasks"]]
    assert len(columns) == 4


def test_every_figure_is_a_share() -> None:
    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, float) else []

    found = numbers(paper.published())
    assert len(found) == 120 + 10 + 20 + 4 + 24
    assert all(0 < number < 1 for number in found)
