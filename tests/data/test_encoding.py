"""Encodings: what tables that differ become, and what is refused; nothing is taken for another."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import Federation, data, schedules
from atoll.algorithms import FedAvg
from atoll.data.encoding.columns import Categories, Classes, Numbers
from atoll.data.encoding.summary import ColumnSummary, pooled
from atoll.errors import DataError
from atoll.learners import NumpyLearner

arrow = pytest.importorskip("pyarrow")

COLUMNS = {
    "age": [61.0, 54.0, 47.0, 70.0, 66.0, 58.0],
    "chol": [240.0, 250.0, 231.0, 222.0, 260.0, 205.0],
    "sex": ["female", "male", "male", "female", "male", "female"],
    "café": ["oui", "non", "non", "oui", "oui", "oui"],
    "ill": ["yes", "no", "no", "yes", "yes", "no"],
}
#: What the columns are, by hand: age, chol, sex=female, sex=male, café=non, café=oui.
INPUTS = np.float32(
    [
        [61, 240, 1, 0, 0, 1],
        [54, 250, 0, 1, 1, 0],
        [47, 231, 0, 1, 1, 0],
        [70, 222, 1, 0, 0, 1],
        [66, 260, 0, 1, 0, 1],
        [58, 205, 1, 0, 0, 1],
    ]
)
TARGETS = [1, 0, 0, 1, 1, 0]


def encoding(**more):
    told = data.summarize(
        arrow.table(COLUMNS), label="ill", least=1, site="north", units={"chol": "mg/dl"}
    )
    return data.agree([told], **more)


def read(columns, own=None, **more):
    return data.from_table(arrow.table(columns), encoding=own or encoding(), name="south", **more)


def changed(**columns):
    return {**COLUMNS, **columns}


def renamed(**names):
    return {names.get(name, name): values for name, values in COLUMNS.items()}


def test_a_table_becomes_what_its_encoding_says():
    found = read(COLUMNS)
    assert found.x.dtype == np.float32
    np.testing.assert_array_equal(found.x, INPUTS)
    assert found.y.tolist() == TARGETS
    assert found.class_names == ("no", "yes")
    assert found.columns == ("age", "chol", "sex=female", "sex=male", "café=non", "café=oui")


#: Ways in which two sites' tables differ that have one meaning.
RECONCILED = {
    "order of columns": dict(reversed(COLUMNS.items())),
    "an extra column": changed(shoe=[40, 41, 42, 43, 44, 45]),
    "an id": changed(id=[f"p{i}" for i in range(6)]),
    "whole numbers": changed(age=[61, 54, 47, 70, 66, 58]),
    "narrow numbers": changed(age=np.float32(COLUMNS["age"])),
    "numbers as text": changed(age=["61", "54.0", "47", "70", "6.6e1", "58"]),
    "categories that are typed": changed(
        sex=arrow.array(COLUMNS["sex"]).dictionary_encode(),
    ),
    "blanks": changed(sex=[f" {text} " for text in COLUMNS["sex"]]),
    "unicode's forms": {unicodedata.normalize("NFD", k): v for k, v in COLUMNS.items()}
    | {"café": COLUMNS["café"]},
    "a unit in a name": renamed(chol="chol [mg/dl]"),
}


@pytest.mark.parametrize("way", RECONCILED)
def test_tables_that_differ_in_form_only_are_the_same(way):
    found = read(RECONCILED[way])
    np.testing.assert_array_equal(found.x, INPUTS)
    assert found.y.tolist() == TARGETS


def test_what_is_decided_is_applied():
    agreed = data.agree(
        [
            data.summarize(arrow.table(COLUMNS), label="ill", least=1, site="north"),
            data.summarize(
                arrow.table(renamed(age="Age", ill="outcome") | {
                    "sex": ["F", "M", "M", "F", "M", "F"], "café": [True, False] * 3,
                    "outcome": [1, 0, 0, 1, 1, 0],
                }), label="outcome", least=1, site="south",
            ),
        ],
        columns={"Age": "age", "outcome": "ill"},
        values={"sex": {"F": "female", "M": "male"}, "ill": {"1": "yes", "0": "no"},
                "café": {"true": "oui", "false": "non"}},
    )  # fmt: skip
    mine = {
        "Age": COLUMNS["age"], "chol": COLUMNS["chol"], "sex": ["F", "M", "M", "F", "male", "F"],
        "café": [text == "oui" for text in COLUMNS["café"]], "outcome": [1, 0, 0, 1, 1, 0],
    }  # fmt: skip
    np.testing.assert_array_equal(read(mine, agreed).x, INPUTS)
    assert read(mine, agreed).y.tolist() == TARGETS
    np.testing.assert_array_equal(read(COLUMNS, agreed).x, INPUTS)


#: Ways that may have two meanings, and what is said of them.
REFUSED = {
    "a column less": (
        {name: values for name, values in COLUMNS.items() if name != "chol"},
        "there is no column 'chol'",
    ),
    "another name": (renamed(age="Age"), "there is no column 'age'; close names are 'Age'"),
    "a column twice": (
        changed(**{"chol [mg/dl]": COLUMNS["chol"]}) | {"chol": COLUMNS["chol"]},
        "",
    ),
    "another vocabulary": (changed(sex=["F", "M"] * 3), "holds 'F', 'M' .* does not know"),
    "another spelling": (changed(sex=["Female", *COLUMNS["sex"][1:]]), "is it 'female'"),
    "a value nobody told": (changed(sex=["other", *COLUMNS["sex"][1:]]), "holds 'other'"),
    "another unit": (renamed(chol="chol [mmol/l]"), "'mmol/l', but in 'mg/dl' in the encoding"),
    "a unit of what has none": (renamed(sex="sex (code)"), "has unit 'code', but is categories"),
    "a code for no value": (changed(age=["?", "54", "47", "70", "66", "58"]), "holds '\\?'"),
    "thousands separators": (
        changed(chol=["1,240", "250", "231", "222", "260", "205"]),
        "without separators",
    ),
    "a gap": (changed(age=[None, *COLUMNS["age"][1:]]), "has 1 missing value of 6"),
    "an empty text": (changed(sex=["", *COLUMNS["sex"][1:]]), "has 1 missing value of 6"),
    "numbers for categories": (changed(sex=[0, 1, 1, 0, 1, 0]), "holds '0', '1'"),
    "fractions for categories": (changed(sex=[0.5, 1, 1, 0, 1, 0]), "holds fractions"),
    "texts for numbers": (changed(age=["old", *["54"] * 5]), "is to be numbers, but holds 'old'"),
    "dates for numbers": (
        changed(age=arrow.array(range(6), arrow.date32())),
        "has type date32.*no encoding",
    ),
    "dates for categories": (
        changed(sex=arrow.array(range(6), arrow.timestamp("s"))),
        "has type timestamp.*but categories are text",
    ),
    "lists for numbers": (changed(age=[[1.0, 2.0]] * 6), "has 2 numbers per row, but 1 in the"),
    "other classes": (changed(ill=["ill", "well"] * 3), "holds 'ill', 'well'.*does not know"),
    "numbers for classes": (changed(ill=TARGETS), "label column 'ill' holds '.', '.'"),
    "a label without a value": (changed(ill=[None, *COLUMNS["ill"][1:]]), "1 missing value"),
    "too large": (changed(age=[1e39, *COLUMNS["age"][1:]]), "too large for float32"),
    "no rows": ({name: values[:0] for name, values in COLUMNS.items()}, "there are no examples"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_tables_that_differ_in_meaning_are_refused(way):
    columns, sentence = REFUSED[way]
    if not sentence:
        twice = renamed(chol="chol [mg/dl]") | {"chol (mg/dl)": COLUMNS["chol"]}
        columns, sentence = twice, "are both 'chol'; take one out"
    with pytest.raises(DataError, match=f"(?s)south: .*{sentence}"):
        read(columns)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    rows = [",".join(map(str, row)) for row in zip(*COLUMNS.values(), strict=True)]
    text = "\n".join([",".join(COLUMNS), *rows])
    path = tmp_path / "south.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="south.*save it as UTF-8"):
        data.from_table(path, encoding=encoding())
    path.write_bytes(text.encode().replace(b"non", "n\xf6n".encode("latin-1")))
    with pytest.raises(DataError, match="café.*no UTF-8.*save it as UTF-8"):
        data.from_table(path, encoding=encoding())
    path.write_bytes(text.encode())
    np.testing.assert_array_equal(data.from_table(path, encoding=encoding()).x, INPUTS)


ORDERS = st.permutations(list(COLUMNS))
FORMS = st.sampled_from(["as it is", "blanks", "typed"])


@given(
    order=ORDERS,
    rows=st.permutations(range(6)),
    forms=st.lists(FORMS, min_size=3, max_size=3),
    extra=st.booleans(),
    odd=st.sampled_from([None, "sex", "café", "ill"]),
    data_=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_any_mixture_is_the_same_or_refused(order, rows, forms, extra, odd, data_):
    """However forms mix, a row's inputs are its own; one value that means another is refused."""
    columns = {name: [COLUMNS[name][row] for row in rows] for name in order}
    for name, form in zip(("sex", "café", "ill"), forms, strict=True):
        if form == "blanks":
            columns[name] = [f"\t{text} " for text in columns[name]]
        if form == "typed":
            columns[name] = arrow.array(columns[name]).dictionary_encode()
    if extra:
        columns["more"] = list(range(6))
    if odd is None:
        found = read(columns)
        np.testing.assert_array_equal(found.x, INPUTS[list(rows)])
        assert found.y.tolist() == [TARGETS[row] for row in rows]
        return
    known = {*COLUMNS[odd]}
    other = data_.draw(st.text(max_size=6).filter(lambda text: text.strip() not in known))
    values = [COLUMNS[odd][row] for row in rows]
    values[data_.draw(st.integers(0, 5))] = other
    with pytest.raises(DataError, match=f"column '{odd}'"):
        read({**columns, odd: values})


# What sites tell, and agreeing.


def site(name, rows=20, **columns):
    given = {"age": np.linspace(40, 80, rows), "sex": ["f", "m"] * (rows // 2),
             "ill": ["no", "yes"] * (rows // 2), **columns}  # fmt: skip
    return data.summarize(
        arrow.table({k: v for k, v in given.items() if v is not None}), label="ill", site=name
    )


#: Disagreements, as two sites' columns, and what is said of them with what decides them.
DISAGREEMENTS = {
    "a column of one": ({"bmi": np.arange(20.0)}, {}, "bmi", {"leave_out": ["bmi"]}),
    "names": ({}, {"age": None, "Age": np.linspace(40, 80, 20)}, "'Age'",
              {"columns": {"Age": "age"}}),
    "spelling": ({}, {"sex": ["F", "m"] * 10}, "'F' and 'f'", {"values": {"sex": {"F": "f"}}}),
    "vocabularies": ({}, {"sex": ["1", "2"] * 10}, "at north only, and",
                     {"values": {"sex": {"1": "f", "2": "m"}}}),
    "all different": ({}, {"sex": ["1", "2"] * 10}, "at north only, and", {"alike": ["sex"]}),
    "kinds": ({}, {"sex": np.arange(20) + 0.5}, "numbers at south and categories at north",
              {"leave_out": ["sex"]}),
    "whole numbers for words": ({}, {"sex": [0, 1] * 10}, "at north only, and",
                                {"values": {"sex": {"0": "f", "1": "m"}}}),
    "units": ({"age": None, "age [years]": np.linspace(40, 80, 20)},
              {"age": None, "age [days]": np.linspace(40, 80, 20) * 365.25}, "other units",
              {"units": {"age": {"days": 1 / 365.25}}}),
    "sizes": ({}, {"age": np.linspace(480, 960, 20)}, "of another size", {"alike": ["age"]}),
    "labels": ({}, {"ill": ["No", "yes"] * 10}, "'No' and 'no'",
               {"values": {"ill": {"No": "no"}}}),
    "widths": ({"age": [[1.0, 2.0]] * 20}, {"age": [[1.0, 2.0, 3.0]] * 20}, "2 and 3 numbers",
               {"leave_out": ["age"]}),
}  # fmt: skip


@pytest.mark.parametrize("way", DISAGREEMENTS)
def test_sites_that_differ_are_asked_and_a_decision_settles_it(way):
    north, south, sentence, decision = DISAGREEMENTS[way]
    told = [site("north", **north), site("south", **south)]
    with pytest.raises(DataError, match=f"(?s)do not agree yet:.*{sentence}") as error:
        data.agree(told)
    if way != "widths" and way != "kinds":
        assert str(error.value).count("\n") == 1, "one fault, said once"
    data.agree(told, **decision)


def test_all_faults_are_said_at_once():
    south = site("south", sex=["F", "M"] * 10, ill=["No", "yes"] * 10, bmi=np.arange(20.0))
    with pytest.raises(DataError) as error:
        data.agree([site("north"), south])
    for word in ("'bmi'", "'sex'", "'ill'"):
        assert word in str(error.value)


@pytest.mark.parametrize("decision", [
    {"values": {"six": {"a": "b"}}}, {"units": {"six": {"kg": 2.0}}}, {"alike": ["six"]},
    {"leave_out": ["six"]}, {"columns": {"Six": "six"}},
])  # fmt: skip
def test_a_decision_about_nothing_is_refused(decision):
    with pytest.raises(DataError, match="names 'six', which no site has"):
        data.agree([site("north"), site("south")], **decision)


@given(parts=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), min_size=1,
                      max_size=5))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pooled_moments_are_those_of_all_rows_together(parts):
    told = [
        ColumnSummary(kind="numbers", counts=(len(p),), missing=(0,), mean=(float(np.mean(p)),),
                      deviation=(float(np.std(p)),)) for p in parts
    ]  # fmt: skip
    mean, deviation = pooled(told, [1.0] * len(parts))
    everything = np.concatenate(parts)
    np.testing.assert_allclose(mean[0], everything.mean(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(deviation[0], everything.std(), rtol=1e-6, atol=1e-6)


def test_scaled_inputs_are_what_scikit_learn_makes_of_all_rows_together():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(0)
    parts = [rng.normal(50, 9, n) for n in (30, 70, 110)]
    tables = [arrow.table({"a": part, "y": [0, 1] * (len(part) // 2)}) for part in parts]
    agreed = data.agree(
        [data.summarize(t, label="y", site=str(i)) for i, t in enumerate(tables)], scale=True
    )
    wanted = preprocessing.StandardScaler().fit(np.concatenate(parts)[:, None])
    for part, table in zip(parts, tables, strict=True):
        found = data.from_table(table, encoding=agreed).x
        np.testing.assert_allclose(found, wanted.transform(part[:, None]), rtol=1e-5, atol=1e-6)


def test_units_are_converted_and_must_be_said():
    years = np.linspace(40, 80, 20)
    north = site("north", age=None, **{"age [years]": years})
    south = site("south", age=None, **{"age [days]": years * 365.25})
    agreed = data.agree([north, south], units={"age": {"days": 1 / 365.25}})
    columns = {"sex": ["f", "m"] * 10, "ill": ["no", "yes"] * 10}
    for name, values in (("age [years]", years), ("age (days)", years * 365.25)):
        found = data.from_table(arrow.table({name: values, **columns}), encoding=agreed)
        np.testing.assert_allclose(found.x[:, agreed.names.index("age")], years, rtol=1e-6)
    bare = arrow.table({"age": years * 365.25, **columns})
    with pytest.raises(DataError, match="may be in 'years' or 'days': say which"):
        data.from_table(bare, encoding=agreed)
    found = data.from_table(bare, encoding=agreed, units={"age": "days"})
    np.testing.assert_allclose(found.x[:, agreed.names.index("age")], years, rtol=1e-6)


def test_gaps_are_filled_with_the_mean_of_all_sites_and_flagged():
    north = site("north", age=[10.0, None] * 10, sex=["f", None] * 10)
    south = site("south", age=[40.0] * 20)
    agreed = data.agree([north, south], missing="indicator", alike=["age"])
    assert agreed.names == ("age", "age missing", "sex=f", "sex=m", "sex missing")
    found = data.from_table(
        arrow.table({"age": [None, 5.0], "sex": [None, "m"], "ill": ["no", "yes"]}), encoding=agreed
    )
    # 10 values of 10 and 20 of 40.
    assert found.x.tolist() == [[30, 1, 0, 0, 1], [5, 0, 0, 1, 0]]


def test_rare_values_are_not_told_and_no_row_is():
    names = [f"secret{i}" for i in range(3)] + ["f"] * 9 + ["m"] * 8
    told = site("north", sex=names)
    text = json.dumps(told.json())
    assert "secret" not in text
    assert told.columns["sex"].rare == 3
    with pytest.raises(DataError, match="too few rows hold to be told"):
        data.agree([told])
    known = data.agree([told], values={"sex": {"secret0": "f"}})
    other = arrow.table({"age": [1.0], "sex": ["secret1"], "ill": ["no"]})
    with pytest.raises(DataError, match="holds 'secret1'.*does not know"):
        data.from_table(other, encoding=known)
    lenient = data.agree([told], unknown="zeros")
    found = data.from_table(
        arrow.table({"age": [1.0], "sex": ["secret0"], "ill": ["no"]}), encoding=lenient
    )
    assert found.x.tolist() == [[1, 0, 0]]


def test_what_means_no_value_is_said_once():
    marks = ["?" if i % 5 == 0 else str(40 + i) for i in range(60)]
    base = {"sex": ["f", "m"] * 30, "ill": ["no", "yes"] * 30}
    with pytest.raises(DataError, match="is text, but .* are numbers"):
        site("north", rows=60, age=marks)
    told = data.summarize(
        arrow.table({"age": marks, **base}), label="ill", site="north", no_value={"age": ["?", -9]}
    )
    assert told.columns["age"].kind == "numbers"
    assert told.columns["age"].missing == (12,)
    agreed = data.agree([told], missing="indicator")
    south = arrow.table({"age": [-9, 50], "sex": ["f", "m"], "ill": ["no", "yes"]})
    there = np.mean([40 + i for i in range(60) if i % 5])
    np.testing.assert_allclose(
        data.from_table(south, encoding=agreed).x[:, :2], [[there, 1], [50, 0]], rtol=1e-6
    )


def test_labels_that_are_amounts():
    told = [
        data.summarize(
            arrow.table({"a": np.arange(20.0), "y": np.arange(20) % 4 + shift}), label="y",
            site=str(shift),
        ) for shift in (0, 1)
    ]  # fmt: skip
    table = arrow.table({"a": [1.0, 2.0], "y": [4, 2]})
    with pytest.raises(DataError, match="label 'y' holds '0' at 0 only, and '4' at 1"):
        data.agree(told)
    classed = data.agree(told, alike=["y"])
    assert classed.classes == ("0", "1", "2", "3", "4")
    assert data.from_table(table, encoding=classed).y.tolist() == [4, 2]
    amounts = data.from_table(table, encoding=data.agree(told, task="regression", alike=["y"]))
    assert amounts.task.name == "regression"
    assert amounts.y.dtype == np.float32


#: What once was averaged in silence; found by those who tried to.
ONCE_SILENT = {
    "codes shifted by one": ({"ill": [0, 1] * 10}, {"ill": [1, 2] * 10}, "'0' at north only"),
    "codes of an input": ({"sex": [0, 1] * 10}, {"sex": [1, 2] * 10}, "'0' at north only"),
    "one word of two": ({"ill": ["well", "sick"] * 10}, {"ill": ["well", "ill"] * 10}, "'sick'"),
    "inches": ({"age": np.linspace(150, 190, 20)}, {"age": np.linspace(59, 75, 20)}, "size"),
    "pounds": ({"age": np.linspace(50, 110, 20)}, {"age": np.linspace(110, 242, 20)}, "size"),
    "fahrenheit": ({"age": np.linspace(36, 38, 20)}, {"age": np.linspace(97, 101, 20)}, "size"),
    "skewed, ten times": ({"age": np.exp(np.linspace(-1, 2, 20))},
                          {"age": 10 * np.exp(np.linspace(-1, 2, 20))}, "size"),
    "zeros before": ({"sex": ["01", "02"] * 10}, {"sex": ["1", "02"] * 10}, "'01' and '1'"),
    "a fraction that is none": ({"sex": ["1.0", "x"] * 10}, {"sex": ["1", "x"] * 10}, "'1' and"),
}  # fmt: skip


@pytest.mark.parametrize("way", ONCE_SILENT)
def test_what_once_was_averaged_in_silence_is_asked(way):
    north, south, sentence = ONCE_SILENT[way]
    with pytest.raises(DataError, match=f"(?s)do not agree yet:.*{sentence}"):
        data.agree([site("north", **north), site("south", **south)])


@pytest.mark.parametrize(("a", "b"), [("A+", "A-"), ("+1", "-1"), ("<5", ">5"), ("10", "1.0e2")])
def test_signs_tell_values_apart(a, b):
    same = {"sex": [a, b] * 10}
    assert data.agree([site("north", **same), site("south", **same)]).columns["sex"].values


def test_codes_for_no_value_are_not_taken_from_those_who_mean_them():
    ages = [*range(40, 58), 9, 9]
    one = data.summarize(
        arrow.table({"age": ages, "ill": ["no", "yes"] * 10}), label="ill", site="north",
        no_value={"age": ["9"]},
    )  # fmt: skip
    other = data.summarize(
        arrow.table({"age": [*range(1, 21)], "ill": ["no", "yes"] * 10}), label="ill", site="south",
        no_value={"age": []},
    )  # fmt: skip
    with pytest.raises(DataError, match="'9' means no value in column 'age' at north"):
        data.agree([one, other], alike=["age"])
    table = arrow.table({"age": ages, "ill": ["no", "yes"] * 10})
    for wrong, sentence in (("NA", "takes texts"), ({"Age": ["9"]}, "'Age', which is no column")):
        with pytest.raises(DataError, match=sentence):
            data.summarize(table, label="ill", no_value=wrong)
    narrow = arrow.table({"age": np.float32([-9.9] * 5 + [5] * 15), "ill": ["no", "yes"] * 10})
    told = data.summarize(narrow, label="ill", no_value=["-9.9"])
    assert told.columns["age"].mean == (5.0,)
    text = arrow.table({"age": ["-9.0", "x"] * 10, "ill": ["no", "yes"] * 10})
    assert data.summarize(text, label="ill", no_value=["-9"]).columns["age"].missing == (10,)


def test_numbers_that_stand_apart_are_asked_about():
    table = arrow.table({"bmi": [*np.linspace(18, 44, 38), -9, -9], "ill": ["no", "yes"] * 20})
    with pytest.raises(DataError, match="holds -9 in 2 rows, far from all others"):
        data.summarize(table, label="ill")
    assert data.summarize(table, label="ill", no_value={"bmi": [-9]}).columns["bmi"].missing == (2,)
    assert data.summarize(table, label="ill", no_value={"bmi": []}).columns["bmi"].missing == (0,)


def test_marks_among_words_are_asked_about(tmp_path):
    path = tmp_path / "north.csv"
    path.write_text(
        "country,x,y\n" + "".join(f"{c},{i}.5,{i % 2}\n" for i, c in enumerate(["NA", "DE"] * 10))
    )
    with pytest.raises(DataError, match="holds 'NA' .* if that means no value"):
        data.summarize(path, label="y")
    namibia = data.agree([data.summarize(path, label="y", no_value={"country": []})])
    assert namibia.columns["country"].values == ("DE", "NA")
    assert data.from_table(path, encoding=namibia).x[:, 0].tolist() == [0, 1] * 10
    nothing = data.summarize(path, label="y", no_value={"country": ["NA"]})
    assert nothing.columns["country"].missing == (10,)


def test_codes_with_zeros_before_them_stay_as_they_are_written(tmp_path):
    for name, codes in (("north", ["01", "02", "10"]), ("south", ["01", "02", "10", "V1"])):
        rows = "".join(f"{code},{i % 2}\n" for i, code in enumerate(codes * 15))
        (tmp_path / f"{name}.csv").write_text("icd,ill\n" + rows)
    told = [data.summarize(tmp_path / f"{n}.csv", label="ill") for n in ("north", "south")]
    agreed = data.agree(told)
    assert agreed.columns["icd"].values == ("01", "02", "10", "V1")
    for name in ("north", "south"):
        found = data.from_table(tmp_path / f"{name}.csv", encoding=agreed)
        assert found.x[:3].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_a_mean_of_few_is_not_told():
    few = {"cd4": [None] * 18 + [183.0, 180.0], "ill": ["no", "yes"] * 10}
    with pytest.raises(DataError, match="holds 2 values; a mean of fewer than 5"):
        data.summarize(arrow.table(few), label="ill")
    with pytest.raises(DataError, match="3 rows are too few"):
        data.summarize(arrow.table({"a": [1.0, 2, 3], "ill": [0, 1, 0]}), label="ill")
    stages = {"stage": [0] * 19 + [3], "ill": ["no", "yes"] * 10}
    told = data.summarize(arrow.table(stages), label="ill").columns["stage"]
    assert (told.rare, told.mean, told.deviation) == (1, (0.0,), (0.0,))


def test_what_is_told_of_rare_numbers_is_kept_and_comes_back(tmp_path):
    """A file that `summarize` wrote is one that `agree` reads."""
    stages = {"stage": [0] * 17 + [3, 3, None], "ill": ["no", "yes"] * 10}
    told = data.summarize(arrow.table(stages), label="ill", site="north")
    assert (told.columns["stage"].counts, told.columns["stage"].missing) == ((19,), (1,))
    assert data.Summary.load(told.save(tmp_path / "north.json")) == told


def test_a_label_that_is_counted_in_something_is_an_amount():
    tables = [
        arrow.table({"a": np.arange(20.0), "dose [mg]": [5, 10, 15, top] * 5}) for top in (20, 25)
    ]
    told = [data.summarize(table, label="dose [mg]", site=str(i)) for i, table in enumerate(tables)]
    agreed = data.agree(told)
    assert agreed.label.kind == "amounts"
    assert data.from_table(tables[1], encoding=agreed).y[:4].tolist() == [5, 10, 15, 25]


def test_thousands_of_columns_take_no_time():
    import time

    wide = arrow.table({**{f"g{i}": np.arange(20.0) for i in range(2000)}, "ill": [0, 1] * 10})
    began = time.process_time()
    agreed = data.agree([data.summarize(wide, label="ill", site=name) for name in "ab"])
    assert agreed.apply(wide).shape == (20, 2000)
    # It was a minute when each column looked at all others.
    assert time.process_time() - began < 15


# The file.


def test_it_is_kept_as_json_and_comes_back(tmp_path: Path):
    own = encoding(scale=True, missing="indicator", unknown="zeros")
    path = own.save(tmp_path / "encoding.json")
    assert data.Encoding.load(path) == own
    assert data.Encoding.load(path).digest == own.digest
    told = site("north")
    assert data.Summary.load(told.save(tmp_path / "north.json")) == told


NUMBERS = st.integers(-9, 9) | st.floats(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(at=st.lists(st.integers(0, 9), max_size=3), value=PLAIN, summary=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_other_json_is_refused_in_a_sentence(tmp_path_factory, at, value, summary):
    folder = tmp_path_factory.mktemp("json")
    kind, own = (data.Summary, site("north")) if summary else (data.Encoding, encoding())
    plain = own.json()
    place = plain
    for step in at[:-1]:
        inner = [each for each in place.values() if isinstance(each, dict)]
        if inner:
            place = inner[step % len(inner)]
    keys = list(place)
    place[keys[(at or [0])[-1] % len(keys)]] = value
    path = folder / "odd.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    said = ""
    try:
        found = kind.load(path)
    except DataError as error:
        said = str(error)
    if said:
        assert str(path) in said
        return
    assert kind.load(found.save(folder / "again.json")) == found


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "atoll.encoding"}', "[" * 99999])
def test_a_file_that_is_no_encoding_is_refused(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    for kind in (data.Encoding, data.Summary):
        with pytest.raises(DataError, match="odd.json"):
            kind.load(path)


def test_encodings_that_make_no_sense_are_refused():
    label = Classes(values=("a", "b"))
    for columns, target in (({}, "y"), ({"y": Numbers()}, "y"),
                            ({"a": Numbers(called=("b",)), "b": Numbers()}, "y")):  # fmt: skip
        with pytest.raises(DataError):
            data.Encoding(columns, label, target)
    for wrong in (
        lambda: Numbers(centre=(1.0,)), lambda: Numbers(centre=(1.0,), spread=(0.0,)),
        lambda: Numbers(flagged=(0,)), lambda: Numbers(units={"kg": 1.0}), lambda: Numbers(
            unit="g", units={"kg": -1.0}), lambda: Categories(values=()),
        lambda: Categories(values=("a", "a")), lambda: Categories(values=("a",), same={"b": "c"}),
    ):  # fmt: skip
        with pytest.raises(DataError):
            wrong()


def test_a_table_by_itself_has_an_encoding_that_encodes_it_again():
    table = arrow.table({
        "a": [1.0, None, 3.0], "b": ["u", None, "v"], "p": [[1, 2], [3, 4], [5, 6]],
        "y": ["no", "yes", "no"],
    })  # fmt: skip
    alone = data.from_table(table, label="y", missing="indicator")
    again = data.from_table(table, encoding=alone.encoding)
    np.testing.assert_array_equal(alone.x, again.x)
    assert alone.y.tolist() == again.y.tolist()
    for label, values in (
        ("whole", [0, 2, 1]),
        ("flag", [True, False, True]),
        ("real", [0.5, 1, 2]),
    ):
        own = arrow.table({"a": [1.0, 2.0, 3.0], label: values})
        alone = data.from_table(own, label=label)
        again = data.from_table(own, encoding=alone.encoding)
        assert alone.y.tolist() == again.y.tolist(), label
        assert alone.task == again.task, label


# In a federation.


def plan(own):
    return Federation(
        learner=NumpyLearner(layers=[6, 2], lr=0.1, batch_size=2), algorithm=FedAvg(),
        schedule=schedules.Synchronous(rounds=1), encoding=own,
    )  # fmt: skip


def test_a_federation_takes_only_what_is_encoded_as_agreed():
    own = encoding()
    clients = read(COLUMNS, own).iid(clients=2, test=0.0)
    assert len(plan(own).simulate(clients).history) == 1
    bare = data.from_arrays(INPUTS, TARGETS).iid(clients=2, test=0.0)
    with pytest.raises(DataError, match="is not encoded as the federation's encoding says"):
        plan(own).simulate(bare)
    other = read(COLUMNS, encoding(scale=True)).iid(clients=2, test=0.0)
    with pytest.raises(
        DataError, match=r"of column 'age' centre is \[59.3.*\] at south and not said"
    ):
        plan(own).simulate(other)
    assert plan(own).describe() != plan(encoding(scale=True)).describe()


def test_tables_with_other_labels_mean_something_else():
    table = arrow.table({**COLUMNS, "dead": COLUMNS["ill"]})
    columns = ["age", "chol"]
    ill, dead = (
        data.from_table(table, label=label, features=columns).iid(clients=1)
        for label in ("ill", "dead")
    )
    assert ill.meaning.digest != dead.meaning.digest
    assert ill.meaning.difference(dead.meaning, "north", "south") == (
        "the label is 'ill' at north and 'dead' at south"
    )
