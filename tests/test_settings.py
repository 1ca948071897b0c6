"""Strict settings: faults at any depth of sections, lists and dictionaries are one line with the nearest key."""

from typing import Literal

import pytest
from pydantic import Field

from looplm.settings import Fraction, Section


class Leaf(Section):
    share: Fraction = 0.5
    kind: Literal["one", "two"] = "one"


class Tree(Section):
    leaf: Leaf | None = None
    branches: list[Leaf] = Field(default_factory=list)
    named: dict[str, Leaf] = Field(default_factory=dict)
    required: int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"required": 1, "leaf": {"shar": 1}}, "unknown key 'leaf.shar'; did you mean 'share'?"),
        ({"required": 1, "branches": [{}, {"knid": 1}]}, "unknown key 'branches.1.knid'; did you mean 'kind'?"),
        ({"required": 1, "named": {"a": {"xyz": 1}}}, "unknown key 'named.a.xyz'; known keys: share, kind"),
        ({"requird": 1}, "unknown key 'requird'; did you mean 'required'?"),
        ({}, "required is missing"),
        ({"required": 1, "named": {"a": {"share": 2}}}, "named.a.share is 2: Input should be less than or equal to 1"),
        (
            {"required": 1, "branches": [{"kind": "three"}]},
            "branches.0.kind is 'three': Input should be 'one' or 'two'",
        ),
        ([], "a mapping is needed, with the keys leaf, branches, named, required"),
    ],
)
def test_faults_in_one_line(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        Tree.validated(values, "t.yaml")
    assert str(caught.value) == f"t.yaml: {message}"


def test_sections_are_frozen_and_explained():
    tree = Tree.validated({"required": 2, "leaf": {"share": 1}}, "t")
    assert tree.leaf == Leaf(share=1) and tree.branches == []
    with pytest.raises(ValueError, match="frozen"):
        tree.required = 3
