"""Exceptions of measured functions, caught in the tests: class, message, arguments, attributes, notes and causes."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

_TESTS = """
    import threading
    import pytest

    class Mine(Exception):
        def __init__(self, shape, wanted):
            super().__init__(f"{shape}, not {wanted}")
            self.shape = shape

    class Named(Exception):
        def __init__(self, *, code, hint=None):
            super().__init__(f"code {code}")
            self.code, self.hint = code, hint

    class Told(OSError):
        def __init__(self, path):
            super().__init__(2, "is not there", path)

    class Slotted(Exception):
        __slots__ = ("size",)
        def __str__(self):
            return f"of size {self.size}"

    class Several(ExceptionGroup):
        def __new__(cls, errors, code):
            made = super().__new__(cls, f"code {code}", errors)
            made.code = code
            return made
        def derive(self, errors):
            return Several(errors, self.code)

    class Holder:
        def __init__(self):
            self.lock = threading.Lock()
        def __repr__(self):
            return "a holder"

    def caught(membench, kind, raises):
        with pytest.raises(kind) as found:
            membench(raises)
        return found.value

    def test_other_arguments(membench):
        def raises():
            raise Mine((1, 2), (2, 1))
        with pytest.raises(Mine, match=r"^\\(1, 2\\), not \\(2, 1\\)$") as found:
            membench(raises)
        assert type(found.value) is Mine
        assert found.value.args == ("(1, 2), not (2, 1)",)
        assert found.value.shape == (1, 2)

    def test_optional_arguments_are_not_given_twice(membench):
        def raises():
            raise Named(code=3)
        error = caught(membench, Named, raises)
        assert (str(error), error.code, error.hint) == ("code 3", 3, None)

    def test_members_of_pythons_own(membench):
        def raises():
            raise Told("x.bin")
        error = caught(membench, Told, raises)
        assert (error.errno, error.filename) == (2, "x.bin")
        assert caught(membench, ImportError, lambda: __import__("nowhere_at_all")).name == "nowhere_at_all"
        assert caught(membench, UnicodeDecodeError, lambda: b"\\xff".decode()).start == 0
        assert caught(membench, SystemExit, lambda: exit(3)).code == 3

    def test_slots(membench):
        def raises():
            error = Slotted()
            error.size = 7
            raise error
        assert str(caught(membench, Slotted, raises)) == "of size 7"

    def test_a_class_in_the_test(membench):
        class Inner(Exception):
            def __init__(self, a, b):
                super().__init__()
                self.sum = a + b
        def raises():
            raise Inner(1, 2)
        assert caught(membench, Inner, raises).sum == 3

    def test_what_cannot_be_sent_reads_as_it_did(membench):
        def raises():
            error = Mine((Holder(),), ())
            error.holder = Holder()
            error.args = ("first", Holder())
            raise error
        error = caught(membench, Mine, raises)
        assert (repr(error.holder), error.args[0], repr(error.args[1])) == ("a holder", "first", "a holder")

    def test_causes_and_notes(membench):
        def raises():
            try:
                raise Mine(1, 2)
            except Mine as error:
                outer = KeyError("key")
                outer.add_note("a note")
                raise outer from error
        error = caught(membench, KeyError, raises)
        assert type(error.__cause__) is Mine and error.__cause__.shape == 1
        assert error.__context__ is error.__cause__
        assert error.__notes__ == ["a note"] and error.__suppress_context__

    def test_contexts(membench):
        def raises():
            try:
                raise Named(code=1)
            except Named:
                raise ValueError("two")
        error = caught(membench, ValueError, raises)
        assert error.__cause__ is None and error.__context__.code == 1

    def test_groups(membench):
        def raises():
            raise Several([Mine(1, 2), ExceptionGroup("inner", [Named(code=5)])], 9)
        error = caught(membench, Several, raises)
        assert (error.message, error.code) == ("code 9", 9)
        assert error.exceptions[0].shape == 1
        with pytest.RaisesGroup(pytest.RaisesGroup(Named)):
            plain = caught(membench, ExceptionGroup, lambda: (_ for _ in ()).throw(
                ExceptionGroup("outer", [ExceptionGroup("inner", [Named(code=5)])])))
            assert str(plain) == "outer (1 sub-exception)"
            raise plain

    def test_classes_here_stay_as_they_are(membench):
        before = Mine.__init__
        caught(membench, Mine, lambda: (_ for _ in ()).throw(Mine(1, Mine)))
        assert Mine.__init__ is before

    def test_the_traceback_is_told_if_it_is_not_caught(membench):
        def raises():
            raise Mine(1, 2) from ValueError("the first")
        membench(raises)
"""


def test_an_exception_is_caught_as_if_the_test_had_called_the_function(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(_TESTS)
    ran = pytester.runpytest_subprocess("-q", "-p", "no:benchmark")
    ran.assert_outcomes(passed=10, failed=1)
    ran.stdout.fnmatch_lines(["E       *in the measured process:", "E       *raise Mine(1, 2) from ValueError*"])


_CHILDREN = """
    import concurrent.futures, multiprocessing, sys
    import pytest

    OFFSET = 40

    class Point:
        def __init__(self, x):
            self.x = x

    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    def child(point, queue):
        # Nothing of membench is in the child but what passes functions on.
        queue.put(Point(None if "membench.worker" in sys.modules else point.x + OFFSET))

    def add(number):
        return Point(number + OFFSET)

    def fails(number):
        raise ValueError(str(number))

    def local():
        pass

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_process(membench, method):
        def spawns():
            context = multiprocessing.get_context(method)
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(Point(2), queue))
            process.start()
            assert queue.get().x == 42
            process.join()
            assert process.exitcode == 0
        membench(spawns)

    def test_pool(membench):
        def spawns():
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                assert pool.submit(add, 2).result().x == 42
                with pytest.raises(ValueError, match="7"):
                    pool.submit(fails, 7).result()
        membench(spawns)
"""


@pytest.mark.parametrize(("mode", "tests"), [("prepend", "test_process"), ("importlib", "test_pool")])
def test_processes_that_a_function_spawns_find_what_the_test_module_defines(
    pytester: pytest.Pytester, mode: str, tests: str
) -> None:
    pytester.makepyfile(_CHILDREN)
    ran = pytester.runpytest_subprocess("-q", "-p", "no:benchmark", f"--import-mode={mode}", "-k", tests)
    assert ran.ret == 0
