"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault, and the tests that must see it.

    Attributes:
        fault: what is wrong then, in words; no two mutants have the same.
        file: path from the root of the repository.
        old: exact text that stands in the file once.
        new: what stands there instead.
        tests: node ids below ``tests/``; at least one of them must fail.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """Return the file's text with the fault in it.

        Raises:
            ValueError: if the old text does not stand in it exactly once.
        """
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: `{self.old}` stands there {source.count(self.old)} times, not once"
            )
        return source.replace(self.old, self.new)
