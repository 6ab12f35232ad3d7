"""Recipes: what is accepted, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llm_fp4.errors import RecipeError
from llm_fp4.recipe import PRESETS, SUMMARIES, Bits, Override, Recipe, dump_recipe, load_recipe, matches


def test_every_named_recipe_loads_and_round_trips(tmp_path: Path) -> None:
    assert set(PRESETS) == set(SUMMARIES)
    for name in PRESETS:
        recipe = load_recipe(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_recipe(recipe))
        assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: fpq\nrounds: 3\n", "unknown key 'rounds'"),
        ("search: {rounds: 0}\n", "search.rounds"),
        ("bits: {weight: 2}\n", "2 bits is not possible"),
        ("weights: {formats: [e9m9]}\n", "e9m9"),
        ("method: magic\n", "method"),
        ("- fpq\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_what_the_schema_refuses(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["4/4", "4/4/99", "2/4/4", "a/b/c", "", "4/4/4/4"])
def test_impossible_bits(text: str) -> None:
    with pytest.raises(RecipeError):
        Bits.parse(text)


def test_bits_and_head() -> None:
    recipe = Recipe(bits=Bits.parse("16/4/8", lm_head=8))
    assert recipe.embedding_formats() == ()
    assert {f.bits for f in recipe.rule("model.layers.0.x").weight_formats} == {4}
    assert {f.bits for f in recipe.rule("lm_head", head=True).weight_formats} == {8}
    assert {f.bits for f in recipe.rule("lm_head", head=True).input_formats} == {8}


def test_patterns_match_names_globs_and_expressions() -> None:
    name = "model.layers.3.mlp.down_proj"
    assert matches(name, name)
    assert matches("down_proj", name)
    assert matches("mlp.*", name)
    assert matches(r"re:.*\.\d+\.mlp\..*", name)
    assert not matches("proj", name)
    assert not matches("re:down_proj", name)


def test_targets_ignore_and_overrides() -> None:
    recipe = Recipe(
        ignore=["lm_head"],
        overrides=[Override(targets=["down_proj"], activation_bits=8, input_granularity="per_token", weight_formats=["e1m2"])],
    )
    assert not recipe.selects("lm_head")
    rule = recipe.rule("a.down_proj")
    assert {f.bits for f in rule.input_formats} == {8}
    assert [f.name for f in rule.weight_formats] == ["e1m2"]
    assert rule.granularity == "per_token"
    assert recipe.rule("a.up_proj").granularity == "per_tensor"


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'down_porj' in ignore matches no module; the model has a\.down_proj"):
        Recipe(ignore=["down_porj"]).check_patterns(["a.down_proj"])


def test_formats_of_another_width_are_refused() -> None:
    recipe = Recipe.model_validate({"weights": {"formats": ["e4m3"]}})
    with pytest.raises(RecipeError, match="none of the formats e4m3 has the 4 bits"):
        recipe.rule("x")


def test_methods_without_search_take_one_format() -> None:
    assert [f.name for f in load_recipe("minmax-fp").rule("x").weight_formats] == ["e2m1"]
    assert [f.name for f in load_recipe("minmax-int").rule("x").input_formats] == ["e1m2"]
    assert [f.name for f in load_recipe("smoothquant").rule("x").weight_formats] == ["e1m2"]
    assert not load_recipe("fpq-baseline").rule("x").shift


def test_a_shift_range_is_a_word_or_a_small_number() -> None:
    assert Recipe.model_validate({"inputs": {"shift_range": 5}}).rule("q").shift_range == 5
    override = {"targets": ["down"], "shift_range": "search"}
    assert Recipe.model_validate({"overrides": [override]}).rule("down").shift_range == "search"
    for wrong in (16, -1, "wide"):
        with pytest.raises(ValidationError):
            Recipe.model_validate({"inputs": {"shift_range": wrong}})


def test_a_range_of_gamma_begins_with_its_smaller_end() -> None:
    assert Recipe.model_validate({"search": {"gamma": [0.5, 1.5]}}).search.gamma == (0.5, 1.5)
    with pytest.raises(ValidationError, match=r"gamma from 1\.2 to 0\.1 is no range"):
        Recipe.model_validate({"search": {"gamma": [1.2, 0.1]}})


def test_operands_with_other_unsigned_formats_are_of_another_site() -> None:
    wide = Override(targets=["up"], input_formats=["e2m1", "ue2m2"])
    wish = Recipe.model_validate({"inputs": {"formats": ["e2m1"]}, "overrides": [wide]})
    gate, up = wish.rule("gate"), wish.rule("up")
    assert gate.input_formats == up.input_formats
    assert [f.name for f in up.unsigned_formats] == ["ue2m2"]
    assert gate.unsigned_formats == ()
    assert gate.site != up.site
