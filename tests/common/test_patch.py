"""How patches are held: made by the first object, taken back after the last, whatever others do in between."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable

import pytest

from memcompile.common.patch import Patch, Replaced


class Owner:
    pass


@pytest.fixture
def module() -> types.ModuleType:
    module = types.ModuleType("module")
    module.function = lambda x: x + 1
    return module


def tenfold(original: Callable[[int], int], x: int) -> int:
    return 10 * original(x)


def test_it_is_in_force_while_an_owner_lives(module):
    original = module.function
    patch = Patch(Replaced(module, "function", tenfold))
    assert module.function is original
    one, other = Owner(), Owner()
    patch.hold(one)
    patch.hold(one)
    patch.hold(other)
    assert module.function(1) == 20
    del one
    assert module.function(1) == 20
    del other
    assert module.function is original


def test_an_owner_in_a_circle_is_let_go_by_the_collector(module):
    original, owner = module.function, Owner()
    owner.itself = owner
    Patch(Replaced(module, "function", tenfold)).hold(owner)
    del owner
    gc.collect()
    assert module.function is original


def test_it_can_be_held_again(module):
    original = module.function
    patch = Patch(Replaced(module, "function", tenfold))
    for _ in range(3):
        owner = Owner()
        patch.hold(owner)
        assert module.function(1) == 20
        del owner
        assert module.function is original


@pytest.mark.parametrize("copies_attributes", [True, False])
def test_a_wrapper_of_another_library_stays(module, copies_attributes):
    """It has the replacement inside, which does as the original does, until it is needed again."""
    patch = Patch(Replaced(module, "function", tenfold))
    owner = Owner()
    patch.hold(owner)
    ours = module.function

    def theirs(x: int) -> int:
        return ours(x) + 3

    wrapper = functools.wraps(ours)(theirs) if copies_attributes else theirs
    module.function = wrapper
    assert module.function(1) == 23
    del owner
    assert module.function is wrapper and module.function(1) == 5
    again = Owner()
    patch.hold(again)
    assert module.function is wrapper and module.function(1) == 23


def test_a_wrapper_of_another_library_that_goes(module):
    original = module.function
    patch = Patch(Replaced(module, "function", tenfold))
    owner = Owner()
    patch.hold(owner)
    module.function = lambda x: 0
    del owner
    module.function = original
    owner = Owner()
    patch.hold(owner)
    assert module.function(1) == 20
    del owner
    assert module.function is original


def test_methods_of_classes():
    class Thing:
        def number(self) -> int:
            """How many."""
            return 1

    original, owner = Thing.number, Owner()
    Patch(Replaced(Thing, "number", lambda f, self: f(self) + 1)).hold(owner)
    assert Thing().number() == 2 and Thing.number.__doc__ == "How many."
    del owner
    assert vars(Thing)["number"] is original


def test_changes_are_taken_back_in_the_other_order():
    done: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def install(self) -> None:
            done.append(f"+{self.name}")

        def remove(self) -> None:
            done.append(f"-{self.name}")

    owner = Owner()
    Patch(Noted("a"), Noted("b")).hold(owner)
    del owner
    assert done == ["+a", "+b", "-b", "-a"]


def test_one_that_cannot_be_installed_says_so_each_time():
    class Fails:
        def install(self) -> None:
            raise RuntimeError("this PyTorch has no such function")

        def remove(self) -> None:
            raise AssertionError("it is not installed")

    patch = Patch(Fails())
    for _ in range(2):
        owner = Owner()
        with pytest.raises(RuntimeError, match="no such function"):
            patch.hold(owner)
        del owner
