"""A recipe: groups of checked settings, presets with versions, and the older flat names."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dfcil import RECIPES, Recipe, SettingError
from edge_dfcil.model import file as storage
from edge_dfcil.recipe import GROUPS, PRESETS, SETTINGS, Remember, Schedule, dotted, find_recipe, read_recipe

EDGE, PAPER = RECIPES["edge"], RECIPES["paper"]
FOLDER = Path(__file__).parent / "golden"
# The settings of schema 1 by their flat names, which older files and scripts contain.
FLAT = json.loads((FOLDER / "recipe_schema1.json").read_text())


class TestChecks:
    @pytest.mark.parametrize(
        ("wrong", "allowed"),
        [
            ({"schedule.epochs": 0}, "at least 1"),
            ({"schedule.epochs": True}, "a whole number"),
            ({"schedule.epochs": 2.5}, "a whole number"),
            ({"schedule.first_epochs": [9]}, "a whole number or None"),
            ({"schedule.min_steps": -1}, "at least 0"),
            ({"schedule.shape": "cosine"}, "'step' or 'one_cycle'"),
            ({"schedule.milestones": (0.4, "x")}, "a number"),
            ({"schedule.milestones": (0.4, 1.5)}, "at most 1"),
            ({"schedule.learning_rate": 0.0}, "above 0"),
            ({"schedule.learning_rate": math.inf}, "finite"),
            ({"schedule.momentum": math.nan}, "finite"),
            ({"schedule.momentum": 1.0}, "below 1"),
            ({"schedule.clip_gradient": -1}, "above 0 or None"),
            ({"schedule.freeze": 1.0}, "below 1"),
            ({"augmentation.mirrored_answers": 1}, "True or False"),
            ({"augmentation.crop_padding": "wide"}, "a whole number"),
            ({"generator.width": 0}, "at least 1"),
            ({"inversion.statistics": -0.1}, "at least 0"),
            ({"pixels.learning_rate": -1.0}, "above 0"),
            ({"remember.distil_on": "all"}, "'both', 'real' or 'synthetic'"),
            ({"remember.pool": None}, "a whole number"),
            ({"remember.min_images": 0}, "at least 1"),
            ({"refine.align_head": "much"}, "a number"),
        ],
    )
    def test_a_setting_that_cannot_be_is_named_with_its_value_and_what_is_allowed(
        self, wrong: dict[str, Any], allowed: str
    ) -> None:
        ((name, value),) = wrong.items()
        with pytest.raises(SettingError) as refused:
            EDGE.changed(wrong)
        said = str(refused.value)
        assert f"recipe.{name}" in said and allowed in said
        assert repr(value) in said or isinstance(value, tuple)

    def test_a_group_made_directly_is_checked_as_well(self) -> None:
        with pytest.raises(SettingError, match=r"recipe\.schedule\.epochs is 0.*recipe\.schedule\.momentum is 'x'"):
            Schedule(epochs=0, momentum="x")  # type: ignore[arg-type]
        with pytest.raises(SettingError, match=r"recipe\.schedule has no setting 'epoch'; did you mean 'epochs'"):
            Schedule(epoch=3)  # type: ignore[call-arg]
        with pytest.raises(SettingError, match=r"recipe\.schedule\.epochs"):
            replace(EDGE.schedule, epochs="3")  # type: ignore[arg-type]
        with pytest.raises(SettingError, match=r"recipe\.refine"):
            Recipe(refine=3)  # type: ignore[arg-type]

    def test_settings_that_do_not_go_together_are_refused(self) -> None:
        with pytest.raises(SettingError, match=r"recipe\.remember\.pool"):
            Remember(dreams="pixels")
        with pytest.raises(SettingError, match="set both"):
            EDGE.changed({"augmentation.mirrored_answers": True, "augmentation.flip": False})

    def test_numbers_of_numpy_become_pythons(self) -> None:
        recipe = EDGE.changed({"schedule.epochs": np.int64(3), "schedule.learning_rate": np.float32(0.5)})
        assert json.loads(json.dumps(recipe.to_dict()))["schedule"]["epochs"] == 3
        assert type(recipe.schedule.learning_rate) is float

    def test_a_recipe_does_not_change_and_is_hashed_copied_and_pickled(self) -> None:
        with pytest.raises(AttributeError):
            EDGE.schedule.epochs = 3  # type: ignore[misc]
        assert {EDGE: 1}[pickle.loads(pickle.dumps(EDGE))] == 1
        assert copy.deepcopy(EDGE) == EDGE != PAPER


class TestChanged:
    def test_takes_dotted_old_and_grouped_names(self) -> None:
        expected = replace(EDGE, schedule=replace(EDGE.schedule, epochs=3, shape="step"), remember=Remember(pool=64))
        assert EDGE.changed({"schedule.epochs": 3, "schedule.shape": "step", "remember.pool": 64}) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert EDGE.changed({"epochs": 3, "schedule": "step", "pool": 64}) == expected
        assert EDGE.changed({"schedule": {"epochs": 3, "shape": "step"}, "remember": {"pool": 64}}) == expected
        assert EDGE.schedule.epochs == 8, "the recipe itself is unchanged"

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("schedule.epochs", "3", 3),
            ("schedule.epochs", "1e3", 1000),
            ("schedule.first_epochs", "none", None),
            ("schedule.milestones", "0.4,0.6", (0.4, 0.6)),
            ("schedule.milestones", "0.5", (0.5,)),
            ("schedule.weight_decay", "1e-3", 1e-3),
            ("schedule.clip_gradient", "None", None),
            ("schedule.shape", "step", "step"),
            ("augmentation.flip", "False", False),
            ("remember.mu", "0.2", 0.2),
            ("remember.distil_on", "real", "real"),
        ],
    )
    def test_a_text_stands_for_what_it_says(
        self, name: str, text: str, value: int | tuple[Any, ...] | float | str | bool | None
    ) -> None:
        group, _, field = name.partition(".")
        assert getattr(getattr(EDGE.changed({name: text}), group), field) == value

    @pytest.mark.parametrize(("name", "text"), [("schedule.epochs", "2.5"), ("schedule.momentum", "nan"), ("pool", "many")])
    def test_a_text_that_says_nothing_of_the_kind_is_refused(self, name: str, text: str) -> None:
        with pytest.raises(SettingError, match="recipe"):
            EDGE.changed({name: text})

    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(SettingError, match=r"schedule\.epoch'; did you mean 'schedule\.epochs'"):
            EDGE.changed({"schedule.epoch": 3})

    @given(st.sampled_from(sorted(SETTINGS)), st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.booleans()))
    def test_whatever_is_given_is_taken_or_refused_by_name(self, name: Any, value: Any) -> None:
        try:
            recipe = EDGE.changed({name: value})
        except SettingError:
            return
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe

    def test_differences_are_those_from_the_preset(self) -> None:
        assert EDGE.differences() == {}
        assert EDGE.changed({"generator.width": 32}).differences() == {"generator.width": 32}
        assert len(Recipe(preset="own").differences()) == len(SETTINGS)


class TestPresets:
    def test_a_released_preset_never_changes(self) -> None:
        """A file may omit settings of its preset, and names the preset's version: to change a preset, add a version."""
        assert json.loads((FOLDER / "presets.json").read_text()) == {
            f"{name} {version}": recipe.to_dict() for (name, version), recipe in PRESETS.items()
        }

    def test_names(self) -> None:
        assert find_recipe("edge") is EDGE and find_recipe(PAPER) is PAPER
        assert {name: recipe.preset for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}
        for wrong in ("slow", 3, ["edge"]):
            with pytest.raises(SettingError, match="edge"):
                find_recipe(wrong)  # type: ignore[arg-type]

    def test_the_defaults_are_the_papers(self) -> None:
        assert Recipe() == PAPER == Recipe(**{name: group() for name, group in GROUPS.items()})


class TestFiles:
    def test_round_trip_through_json(self) -> None:
        recipe = EDGE.changed({"schedule.milestones": (0.5,), "remember.mu": 0.2})
        values = json.loads(json.dumps(recipe.to_dict()))
        assert (values["preset"], values["version"], values["schedule"]["milestones"]) == ("edge", 1, [0.5])
        assert Recipe.from_dict(values) == recipe
        own = replace(recipe, preset="own", version=7)
        assert Recipe.from_dict(own.to_dict()) == own

    def test_what_is_left_out_is_the_named_presets(self) -> None:
        found = Recipe.from_dict({"preset": "edge", "version": 1, "schedule": {"epochs": 3}})
        assert found == EDGE.changed({"schedule.epochs": 3})
        for preset, version in (("edge", 99), ("own", 1), (["edge"], 1), ("own", None)):
            with pytest.raises(SettingError, match="upgrade edge-dfcil"):
                Recipe.from_dict({"preset": preset, "version": version, "schedule": {"epochs": 3}})

    @pytest.mark.parametrize("name", [3, None, ("schedule", "epochs")])
    def test_a_name_that_is_no_text_is_refused(self, name: Any) -> None:
        for read in (EDGE.changed, Recipe.from_dict):
            with pytest.raises(SettingError, match=r"no setting .*schedule\.epochs"):
                read({name: 3})

    @pytest.mark.parametrize(
        "values", [{"warp": 9}, {"schedule": {"warp": 9}}, {"schedule.warp": 9}, {"preset": "edge", "warp": 9}]
    )
    def test_an_unknown_name_is_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(SettingError, match=r"warp.*upgrade edge-dfcil"):
            Recipe.from_dict(values)

    @pytest.mark.parametrize("preset", ["edge", "paper"])
    def test_a_flat_file_that_lacks_a_setting_takes_it_from_the_preset_it_agrees_with(self, preset: str) -> None:
        """Schema 1. Earlier, the paper's values were used instead, such as a competition of 10 instead of 1."""
        values = {**FLAT[preset], "epochs": 5, "width": 32}
        for name in ("competition", "mirrored_answers", "pixel_steps"):
            del values[name]
        assert Recipe.from_dict(values) == PRESETS[preset, 1].changed({"schedule.epochs": 5, "generator.width": 32})
        assert Recipe.from_dict({}) == PAPER

    def test_a_flat_file_may_hold_what_was_once_accepted(self) -> None:
        values = {**FLAT["edge"], "align_head": False, "first_epochs": 0, "epochs": True}
        assert Recipe.from_dict(values) == EDGE.changed(
            {"refine.align_head": 0, "schedule.first_epochs": None, "schedule.epochs": 1}
        )

    @pytest.mark.parametrize("path", sorted((FOLDER / "schema1").glob("*.safetensors")), ids=lambda path: path.stem)
    def test_model_files_of_schema_1_keep_every_setting(self, path: Any) -> None:
        stored = storage.read(path)[1]["recipe"]
        recipe = Recipe.from_dict(stored)
        assert recipe.preset == "edge"
        known = dotted({name: values for name, values in recipe.to_dict().items() if name in GROUPS})
        assert {name: known[name] for name in dotted(stored)} == dotted(stored)

    def test_a_json_file_changes_edge_unless_it_names_a_preset(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        path.write_text('{"schedule": {"epochs": 3}}')
        assert read_recipe(path) == EDGE.changed({"schedule.epochs": 3})
        path.write_text('{"preset": "paper", "generator.width": 8}')
        assert read_recipe(path) == PAPER.changed({"generator.width": 8})

    @pytest.mark.parametrize("content", [b"{", b"[3]", b"\xff\xfe", b'{"schedule": {"epochs": 0}}', None])
    def test_a_json_file_that_holds_no_recipe_is_refused(self, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "recipe.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SettingError, match="recipe"):
            read_recipe(path)


class TestFlatNames:
    """They work for one release, with a warning that gives the new name and points to the caller's code."""

    def test_replace_takes_them(self) -> None:
        changes = {"epochs": 1, "schedule": "step", "dreams": "pixels", "pool": 3, "generator_steps": 7, "flip": False}
        quick = EDGE.changed({"schedule.min_steps": 12})
        with pytest.warns(DeprecationWarning, match=r"schedule\.epochs.*generator\.steps") as caught:
            found = replace(quick, **changes)  # type: ignore[arg-type]
        assert [one.filename for one in caught] == [__file__]
        assert found == quick.changed(changes)
        assert found.schedule.min_steps == 12, "the rest of the group is kept"
        with pytest.warns(DeprecationWarning, match=r"schedule\.shape"):
            assert replace(quick, schedule="step") == quick.changed({"schedule.shape": "step"})  # type: ignore[arg-type]

    def test_the_constructor_takes_them_beside_groups(self) -> None:
        with pytest.warns(DeprecationWarning, match=r"remember\.pool") as caught:
            found = Recipe(schedule=Schedule(epochs=3), pool=5)
        assert [one.filename for one in caught] == [__file__]
        assert found == PAPER.changed({"schedule.epochs": 3, "remember.pool": 5})
        with pytest.raises(SettingError, match="warp"):
            Recipe(warp=9)
        with (
            pytest.raises(SettingError, match=r"recipe\.schedule\.epochs is '3'"),
            pytest.warns(DeprecationWarning, match="epochs"),
        ):
            Recipe(epochs="3")

    @pytest.mark.parametrize("preset", ["edge", "paper"])
    def test_all_of_them_can_be_read(self, preset: str) -> None:
        for name, value in FLAT[preset].items():
            if name != "schedule":  # is a group now
                with pytest.warns(DeprecationWarning, match=r"recipe\.\w+ is in a group now; read '\w+\.\w+'"):
                    found = getattr(RECIPES[preset], name)
                assert found == (tuple(value) if isinstance(value, list) else value)
        with pytest.raises(AttributeError, match="warp"):
            _ = RECIPES[preset].warp  # type: ignore[attr-defined]

    def test_none_of_them_is_lost(self) -> None:
        assert Recipe.from_dict(FLAT["edge"]) == EDGE and Recipe.from_dict(FLAT["paper"]) == PAPER
        newer = {
            "remember.class_statistics",
            "remember.min_images",
            "remember.images_per_direction",
            "remember.min_directions",
            "refine.head",
            "schedule.freeze_batchnorm",
            "refine.calibrate",
            "refine.false_rejections",
            "refine.held_out",
            "schedule.mixed_precision",
            "schedule.adapt",
            "schedule.later_learning_rate",
            "augmentation.rotations",
        }
        assert set(SETTINGS) - set(dotted(FLAT["edge"])) == newer

    def test_nothing_else_is_a_field(self) -> None:
        assert [field.name for field in fields(Recipe)] == ["preset", "version", *GROUPS]
