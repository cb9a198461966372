"""Names of the experiments of a sweep: what tells them apart is in them, and no two have the same one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexp.results.labels import experiment_name, settings_label, settings_labels, varying_settings

NAMES = ["seed", "backend.bits", "path", "model.path", "a.model.path", "components.vae.bits", "backend@components.vae"]


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        ([["seed=0"], ["seed=1"]], ["seed=0", "seed=1"]),
        ([["backend=a", "offload=leaf"], ["backend=b", "offload=none"]], ["", ""]),  # in the label already
        ([["seed=0", "x=1"], ["seed=0", "+x=2"], ["seed=0"]], ["x=1", "x=2", ""]),
        ([["backend.q.size=8"], ["backend.q.size=16"]], ["size=8", "size=16"]),
        ([["a.path=x=y"], ["a.path=z"]], ["path=x=y", "path=z"]),
        ([["seed=0"]], [""]),  # nothing varies
        ([["seed=0", "seed=1"], ["seed=2"]], ["seed=1", "seed=2"]),  # the last one of a name wins
        # as much of a name as tells it from the others, and from the groups
        (
            [["a.dtype=1", "c.b.dtype=2", "dtype=3"], ["a.dtype=4", "c.b.dtype=5", "dtype=6"]],
            ["a.dtype=1, b.dtype=2, dtype=3", "a.dtype=4, b.dtype=5, dtype=6"],
        ),
        ([["components.vae.backend=x"], ["components.vae.backend=y"]], ["vae.backend=x", "vae.backend=y"]),
    ],
)
def test_settings_label_has_what_varies_and_the_label_lacks(overrides: list[list[str]], labels: list[str]) -> None:
    assert settings_labels(overrides) == labels


@pytest.mark.parametrize(
    ("recipes", "labels", "expected"),
    [
        (["@/a/r1.yaml", "@/a/r2.yaml"], ["m · mixed r1", "m · mixed r2"], ["", ""]),
        (["@/a/r1.yaml", "@/a/r2.yaml"], ["m · mixed own", "m · mixed r2"], ["recipe=@r1.yaml", "recipe=@r2.yaml"]),
        (["@/a/r.yaml", "@/b/r.yaml"], ["m · mixed r", "m · mixed r"], ["recipe=@/a/r.yaml", "recipe=@/b/r.yaml"]),
        (["@r.yaml", "@/b/r.yaml"], ["m · mixed r", "m · mixed r"], ["recipe=@r.yaml", "recipe=@/b/r.yaml"]),
    ],
)
def test_paths_are_as_short_as_they_differ(recipes: list[str], labels: list[str], expected: list[str]) -> None:
    assert settings_labels([[f"backend.recipe={recipe}"] for recipe in recipes], labels) == expected


@pytest.mark.parametrize("values", [["a cat and/or a dog", "or a dog"], ["[a/x,b/y]", "[c/x,d/z]"], ["{m: a/b}", "b"]])
def test_values_that_are_no_paths_stay_whole(values: list[str]) -> None:
    assert settings_labels([[f"task.prompt={value}"] for value in values]) == [f"prompt={value}" for value in values]


def test_settings_label_of_one_experiment_names_what_varies_in_its_sweep() -> None:
    label = settings_label(["backend=a", "task.num_images=4", "+seed=3"], ["backend", "seed", "offload.to"])
    assert label == "seed=3"
    assert experiment_name("digits · none", label) == "digits · none · seed=3"
    assert experiment_name("digits · none", "") == "digits · none"


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2), min_size=1), min_size=2, unique_by=str))
def test_experiments_with_other_settings_have_other_labels(settings: list[dict[str, int]]) -> None:
    overrides = [[f"{name}={values[name]}" for name in NAMES if name in values] for values in settings]
    expected = len({tuple(each) for each in overrides})
    assert len(set(settings_labels(overrides))) == expected
    assert {*varying_settings(overrides)} <= {*NAMES}
