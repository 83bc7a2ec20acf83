"""What the doors of LocalSGD and DiLoCo compare between groups, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.reference import OUTER
from torch import nn
from unit.test_local_sgd import alone, diloco

from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.quantization import Int8


@pytest.mark.parametrize(
    ("given", "name"), [(True, "int8"), ("int4", "int4"), (Int8(64), "int8/64")]
)
def test_groups_compare_how_they_quantise(given: Any, name: str) -> None:
    group = alone()
    diloco(group, should_quantize=given)
    assert group.manager.described["codec"] == [name]
    plain = alone()
    diloco(plain, should_quantize=False)
    assert "codec" not in plain.manager.described


@pytest.mark.parametrize(
    ("other", "setting"),
    [
        ({"sync_every": 8}, "sync_every"),
        ({"fragment_sync_delay": 1}, "fragment_sync_delay"),
        ({"deterministic": True}, "deterministic"),
        ({"use_bucketization": True, "bucket_cap_mb": 2}, "bucket bytes"),
        ({"lr": 0.5}, "outer optimizer"),
    ],
)
def test_groups_compare_what_would_part_them(other: dict[str, Any], setting: str) -> None:
    """An old failing that must not come back: groups of another schedule averaged with each other,
    and with another kind of average waited for each other until the timeout, every time."""
    described = []
    for given in {}, other:
        group = alone()
        options = {"sync_every": 4, "lr": 0.7, **given}
        outer = OUTER(group.trained, lr=options.pop("lr"))
        DiLoCo(group.manager, [group.model], group.inner, outer, **options)
        described.append(group.manager.described)
    assert [key for key in described[0] if described[0][key] != described[1][key]] == [setting]


class TestRefusals:
    """Each says what would fit, before anything runs."""

    @pytest.mark.parametrize(
        ("every", "options", "says"),
        [
            (1, {}, "less than the 2 fragments.*use 2 or more"),
            (4, {"fragment_sync_delay": 5}, "4 inner steps apart: use 0 to 4"),
            (4, {"fragment_sync_delay": -1}, "use 0 to 4"),
            (4, {"fragment_update_alpha": 1.5}, "it must be a number, at least 0 and at most 1"),
            (4, {"fragment_update_alpha": -0.1}, "it must be a number, at least 0 and at most 1"),
            (4, {"fragment_update_alpha": "half"}, "it must be a number, at least 0 and at most 1"),
            (4.5, {}, "sync_every=4.5: it must be an integer"),
            (True, {}, "sync_every=True: it must be an integer"),
            (4, {"fragment_sync_delay": 1.5}, "fragment_sync_delay=1.5: it must be an integer"),
            (4, {"bucket_cap_mb": 0.5}, "bucket_cap_mb=0.5: it must be an integer"),
            (4, {"inner_state": "kept"}, "it must be one of stands, restored"),
            (4, {"bucket_cap_mb": 0}, "must be an integer, at least 1"),
            (4, {"fragments": 2}, "are the fragments already: leave fragments"),
            (4, {"fragment_pattern": "strided"}, "or pass .model. to have it cut"),
            (4, {"error_feedback": True}, "has no codec, so nothing is lost"),
            (4, {"should_quantize": "int5"}, "codec='int5': it must be one of fp32, bf16"),
        ],
    )
    def test_schedules_and_options(self, every: Any, options: dict[str, Any], says: str) -> None:
        group = alone()
        fragments = [group.model.first, group.model.second]
        with pytest.raises(ValueError, match=says):
            DiLoCo(group.manager, fragments, group.inner, OUTER(group.trained), every, **options)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"fragments": 9}, "8 parameters cannot be 9 fragments: use 1 to 8"),
            ({"fragments": 0}, "no fragment to synchronise"),
            ({"fragments": 2.0}, "fragments=2.0: it must be an integer"),
            ({"fragment_pattern": "stripes"}, "it must be one of sequential, strided"),
        ],
    )
    def test_cuts_of_one_module(self, options: dict[str, Any], says: str) -> None:
        group = alone()
        with pytest.raises(ValueError, match=says):
            DiLoCo(group.manager, [group.model], group.inner, OUTER(group.trained), 12, **options)

    def test_parameters_without_values(self) -> None:
        group = alone()
        for module in nn.LazyLinear(2), nn.Linear(3, 2, device="meta"):
            with pytest.raises(ValueError, match="parameter weight has no values yet"):
                LocalSGD(group.manager, module, group.inner, 3)

    def test_steps_that_are_no_whole_number(self) -> None:
        group = alone()
        with pytest.raises(ValueError, match=r"sync_every=2.5: it must be an integer"):
            LocalSGD(group.manager, group.model, group.inner, 2.5)  # type: ignore[arg-type]

    def test_another_number_of_outer_optimizers(self) -> None:
        group = alone()
        with pytest.raises(AssertionError, match="1 outer optimizers for 2 fragments"):
            DiLoCo(
                group.manager,
                [group.model.first, group.model.second],
                group.inner,
                [OUTER(group.trained)],
                4,
            )

    def test_a_bare_module(self) -> None:
        group = alone()
        with pytest.raises(ValueError, match="pass \\[model\\]"):
            DiLoCo(group.manager, group.model, group.inner, OUTER(group.trained), 4)

    def test_an_outer_optimizer_that_misses_a_parameter(self) -> None:
        group = alone()
        with pytest.raises(ValueError, match="not in its outer optimizer"):
            DiLoCo(group.manager, [group.model], group.inner, OUTER(group.trained[:2]), 4)

    def test_a_fragment_of_its_own_nothing(self) -> None:
        group = alone()
        tied = [group.model, group.model.first]
        with pytest.raises(ValueError, match="fragment 1 has no parameter of its own"):
            DiLoCo(group.manager, tied, group.inner, OUTER(group.trained), 4)

    def test_nothing_to_train(self) -> None:
        group = alone()
        frozen = nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter"):
            LocalSGD(group.manager, frozen, group.inner, 2)

    def test_a_complex_parameter(self) -> None:
        group = alone()
        model = nn.ParameterList([torch.zeros(2, dtype=torch.complex64)])
        with pytest.raises(ValueError, match="cannot be averaged"):
            LocalSGD(group.manager, model, group.inner, 2)

    def test_sync_every_0(self) -> None:
        group = alone()
        with pytest.raises(ValueError, match="sync_every=0"):
            LocalSGD(group.manager, group.model, group.inner, 0)

    def test_an_unknown_keyword(self) -> None:
        with pytest.raises(TypeError):
            diloco(alone(), bucket_cap=3)

    def test_parameters_that_no_fragment_holds_are_named(self) -> None:
        group = alone()
        outer = OUTER(group.model.first.parameters())
        with pytest.warns(UserWarning, match="3 parameters of the inner optimizer are in no fra"):
            DiLoCo(group.manager, [group.model.first], group.inner, outer, 4)
