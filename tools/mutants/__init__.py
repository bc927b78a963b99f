"""Do the tests see it? Small faults (mutants), each put into a copy of the tree, must make their tests fail.

``python -m tools.mutants`` tries all of them, one after another. A mutant that survives is a hole in the
tests: add the right value as a test, and name that test in the mutant's record.
"""
