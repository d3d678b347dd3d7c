"""`docs/deltas.md` shows what was measured of rounded deltas, and claims no more."""

from bench import deltas

PAGE = deltas.PAGE.read_text()


def test_the_tables_show_what_was_measured() -> None:
    assert deltas.filled(PAGE, deltas.kept()) == PAGE, "python -m bench.deltas --kept"


def test_a_changed_number_changes_the_page_and_is_bold_outside_its_interval() -> None:
    record = deltas.kept()
    record["sweep"]["int4"][5] |= {"think_rate": 0.1234}
    record["sweep"]["int4"][5]["within"]["think_rate"] = False
    assert "**0.123**" in deltas.filled(PAGE, record)


def test_int8_lies_within_the_interval_of_the_exact_pair_at_every_λ() -> None:
    rows = deltas.kept()["sweep"]["int8"]
    assert [row["lambda"] for row in rows] == deltas.LAMBDAS
    assert all(all(row["within"].values()) for row in rows)
    assert all(
        low <= row[name] <= high
        for row in rows
        for name, (low, high) in row["exact_intervals"].items()
    )
