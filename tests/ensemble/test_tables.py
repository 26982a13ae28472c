"""The table that closes a run and `chorus evaluate`."""

import math

from chorus.ensemble.evaluate import CALIBRATED, UNIFORM, Evaluation
from chorus.ensemble.tables import evaluation_table


def scores(right: float, nll: float, ood: float = math.nan) -> dict[str, float]:
    more = {"cal/ECE": 0.125, "sc/AUROC/max_p": 0.75, "sc/Risk@80Cov/max_p": 0.0625, "ood/AUROC/entropy": ood}
    return {"cls/Acc": right, "token/NLL": nll, **more}


def two_agents_and_their_mixture() -> Evaluation:
    own = {"base": (0.0, 3.0), "agent_0": (0.25, 2.0), "agent_1": (0.5, 1.5), UNIFORM: (0.75, 1.25)}
    plain = {name: scores(*figures) for name, figures in own.items()}
    fitted = {f"{name}/{CALIBRATED}": scores(right, nll / 2, 0.875) for name, (right, nll) in own.items()}
    return Evaluation(num_problems=40, num_calibration=10, num_ood=5, scores={**plain, **fitted})


def test_the_table_has_a_row_for_every_answerer_with_its_scores_before_and_after_calibration():
    table = evaluation_table(two_agents_and_their_mixture())
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    shared = ("12.5%", "0.750", "6.2%", "0.875")
    assert rows == [
        ("base", "0.0%", "3.0000", "1.5000", *shared),
        ("agent 0", "25.0%", "2.0000", "1.0000", *shared),
        ("agent 1", "50.0%", "1.5000", "0.7500", *shared),
        ("mixture", "75.0%", "1.2500", "0.6250", *shared),
    ]
    assert str(table.title) == "40 held-out problems, 10 to calibrate on, 5 out of distribution"


def test_without_a_second_data_set_or_a_calibration_share_their_columns_are_left_out():
    found = two_agents_and_their_mixture()
    found.num_ood = found.num_calibration = 0
    headers = [str(column.header) for column in evaluation_table(found).columns]
    assert "AUROC ood" not in headers
    assert "NLL cal." not in headers


def test_without_problems_the_table_says_so():
    table = evaluation_table(Evaluation())
    assert "nothing scored" in str(table.columns[0].header)
    assert table.row_count == 0
