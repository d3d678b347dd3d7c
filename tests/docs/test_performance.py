"""`docs/performance.md` shows the launches that the code makes, and keeps the measured times."""

from bench import step_budget

PAGE = step_budget.PAGE.read_text()
ROW = "| 32 | hot λ | 1.0 | 1.0 | 1.0 | 1–2 | 2–3 | 2–3 |"


def test_the_tables_count_what_the_code_launches() -> None:
    assert step_budget.filled(PAGE) == PAGE, "python -m bench.step_budget --write"


def test_a_measured_time_stays_in_its_row_when_the_launches_are_counted_again() -> None:
    old = f"{ROW} 4.2 |\n"
    assert step_budget.with_measured(f"{ROW.replace('1.0', '1.5')}  |\n", old).endswith("| 4.2 |\n")
    other = ROW.replace("| 32 |", "| 128 |")
    assert step_budget.with_measured(f"{other}  |\n", old) == f"{other}  |\n"
