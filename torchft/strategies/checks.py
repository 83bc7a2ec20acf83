"""What is asked of a recipe that somebody else wrote, before it can spoil weights in silence.

At the binding: its settings, and the methods that it must have. At each round: that what it
contributes is a pair, whose tensors have a row for each node, and, in its first round, that
nothing wrote into the weights meanwhile. At each write: that shapes are those of the fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from torchft.arguments import check_choice, check_integer
from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.strategies.inner import Inner
from torchft.strategies.local import Fragment
from torchft.strategies.optim_spec import OptimSpec

if TYPE_CHECKING:
    from torchft.strategies.recipe import Recipe

__all__ = [
    "check_among_groups",
    "check_recipes",
    "check_values",
    "contributed",
    "inner_of",
    "recipes_of",
]

_PERIODS = ("H", "interval", "period")
"""What recipes that somebody else wrote call `sync_every`."""
_PAIR = "contribution returns a pair: a list of tensors [rows, …] and a draft, which may be None"


@runtime_checkable
class _Fingerprinted(Protocol):
    def fingerprint(self) -> list[int]: ...


def recipes_of(recipes: Any) -> list[Recipe]:
    """The recipes of a strategy, as a list.

    Raises:
        SettingsError: it is none, or something in it is no recipe.
    """
    from torchft.strategies.recipe import Recipe  # it imports the checks of a round

    if isinstance(recipes, Recipe):
        name = type(recipes).__name__
        raise SettingsError(f"Strategy takes a list of recipes: write Strategy([{name}(…)])")
    if not isinstance(recipes, Sequence) or isinstance(recipes, str):
        raise SettingsError(f"Strategy takes a list of recipes, not a {type(recipes).__name__}")
    for one in recipes:
        if isinstance(one, type):
            raise SettingsError(f"{one.__name__} is a class: give a recipe, {one.__name__}(…)")
        if not isinstance(one, Recipe):
            raise SettingsError(
                f"Strategy takes a list of recipes, and {one!r} is a {type(one).__name__}: derive "
                "its class from torchft.strategies.Recipe"
            )
    return list(recipes)


def check_among_groups(recipes: Sequence[Recipe]) -> None:
    """Real replica groups can run these recipes.

    Raises:
        SettingsError: one averages within islands, which needs a process group for each.
    """
    from torchft.strategies.recipe import By

    for recipe in recipes:
        if recipe.by is By.ISLANDS:
            raise SettingsError(
                f"{type(recipe).__name__} averages within islands, which real processes cannot "
                "yet: simulate it, or leave island_size out"
            )


def inner_of(inner: Any) -> Inner | None:
    """How each node steps: an `Inner`, or the optimizer alone.

    Raises:
        SettingsError: it is something else.
    """
    if isinstance(inner, OptimSpec):
        return Inner(inner)
    if inner is None or isinstance(inner, Inner):
        return inner
    what = inner.__name__ if isinstance(inner, type) else f"a {type(inner).__name__}"
    raise SettingsError(
        f"Strategy's inner is {what}: give Inner(OptimSpec(torch.optim.AdamW, lr=1e-3))"
    )


def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Their settings are of the types they must be, and they have the methods that they need.

    Raises:
        SettingsError: which one is not so, or there are none.
    """
    if not recipes:
        raise SettingsError(
            "the strategy has no recipe, so its nodes would never talk: give it one, "
            "as in Strategy([AllReduceRecipe()])"
        )
    for recipe in recipes:
        _check_recipe(recipe)


def _check_recipe(recipe: Recipe) -> None:
    from torchft.strategies.recipe import By, Recipe

    name = type(recipe).__name__
    for setting, kind in (("place", Place), ("by", By)):
        check_choice(f"{name}.{setting}", getattr(recipe, setting), kind)
    check_integer(f"{name}.delay", recipe.delay, least=0)
    check_integer(f"{name}.sync_every", recipe.sync_every, least=1)
    _check_period(recipe)
    needed = ["contribution", "apply_locally", *(["islands"] if recipe.by is By.ISLANDS else [])]
    for method in needed:
        if getattr(getattr(recipe, method), "__func__", None) is getattr(Recipe, method):
            raise SettingsError(
                f"{name} has no method {method}: a recipe defines {' and '.join(needed)}, see "
                "torchft.strategies.Recipe"
            )


def _check_period(recipe: Recipe) -> None:
    """Refuse a number of steps that nobody reads: rounds would open after every step."""
    from torchft.strategies.recipe import Recipe

    if type(recipe).due is not Recipe.due or recipe.sync_every != 1:
        return
    name = type(recipe).__name__
    for setting in _PERIODS:
        if isinstance(getattr(recipe, setting, None), int):
            raise SettingsError(
                f"{name} has {setting}={getattr(recipe, setting)}, which decides nothing: rounds "
                f"open every {name}.sync_every steps, or when its method due says so; set that"
            )


def contributed(recipe: Recipe, fragment: Fragment) -> tuple[list[Tensor], Any]:
    """What `recipe` contributes to a round.

    Raises:
        SettingsError: it is no such pair, or weights were written; names the recipe.
    """
    unchanged = _watching(recipe)
    answer: object = recipe.contribution(fragment)
    unchanged()
    name = type(recipe).__name__
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise SettingsError(f"{name}.contribution returned {_shown(answer)}: {_PAIR}")
    sent, draft = answer
    if not isinstance(sent, list | tuple) or not all(isinstance(t, Tensor) for t in sent):
        raise SettingsError(f"{name}.contribution sends {_shown(sent)}: {_PAIR}")
    rows = recipe.local.rows
    for number, tensor in enumerate(sent):
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise SettingsError(
                f"{name}.contribution's tensor {number} has the shape {tuple(tensor.shape)}, and "
                f"{rows} node(s) live here: its first dimension must be rows, {rows}"
            )
    if recipe.error_feedback:
        _check_unsaid(name, sent, draft)
    return list(sent), draft


def _check_unsaid(name: str, sent: Sequence[Tensor], draft: object) -> None:
    shapes = [tensor.shape for tensor in sent]
    if not isinstance(draft, list) or [getattr(one, "shape", None) for one in draft] != shapes:
        raise SettingsError(
            f"{name} has error_feedback=True, so the draft of its contribution must be what each "
            "tensor should say, as ErrorFeedback.draft returns it; leave it out for a recipe that "
            "does not feed back, such as those that send weights"
        )


def _watching(recipe: Recipe) -> Callable[[], None]:
    """Call it after the contribution. Looks at the first round alone, which is where it shows."""
    local = recipe.local
    if recipe.has_contributed or not isinstance(local, _Fingerprinted):
        return lambda: None
    recipe.has_contributed = True
    before = local.fingerprint()

    def unchanged() -> None:
        if local.fingerprint() != before:
            raise SettingsError(
                f"{type(recipe).__name__}.contribution wrote into the weights: it only reads, as "
                "the round may come to nothing; write in apply_locally, or work on a clone"
            )

    return unchanged


def check_values(call: str, sizes: Sequence[int], values: Sequence[Tensor], rows: int = 1) -> None:
    """What is written has one tensor `[1 or rows, size]` for each of `sizes`.

    Raises:
        SettingsError: it has not.
    """
    if len(values) == len(sizes) and all(
        v.dim() == 2 and v.shape[1] == size and v.shape[0] in (1, rows)
        for v, size in zip(values, sizes, strict=True)
    ):
        return
    given = [tuple(getattr(v, "shape", (type(v).__name__,))) for v in values]
    first = "1" if rows == 1 else f"1 or {rows}"
    due = ", ".join(f"[{first}, {size}]" for size in sizes)
    raise SettingsError(
        f"{call} was given tensors of shapes {given}, and this fragment has {due}: "
        "give one tensor for each, as weights(fragment) does"
    )


def _shown(answer: object) -> str:
    if isinstance(answer, Tensor):
        return f"one tensor of shape {tuple(answer.shape)}"
    if isinstance(answer, list | tuple):
        kinds = sorted({type(one).__name__ for one in answer})
        return f"a {type(answer).__name__} of {len(answer)} ({', '.join(kinds)})"
    return "None" if answer is None else f"a {type(answer).__name__}"
