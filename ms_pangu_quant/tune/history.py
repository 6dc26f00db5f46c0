"""history.jsonl: a line for each finished step, with all that the search decides by. A resumed search is the same search,
whose questions are answered from here as far as there are answers; so it asks nothing twice and ends as an undisturbed one.

Holds no times: the same search writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import DataError, OutputError
from ms_pangu_quant.evaluation.samples import Journal, Record, line, read_records

FILE = "history.jsonl"


class History:
    """records: those of all steps, the oldest first."""

    def __init__(self, folder: Path, search: Mapping[str, Any]) -> None:
        """search  what the answers depend on; the first line. Raises OutputError where the file is another search's."""
        self._path = folder / FILE
        self.records: list[Record] = []
        self._by_key: dict[str, Record] = {}
        with Journal(self._path) as journal:  # without a line that was cut short
            begun = json.loads(line({"step": "search", **search}))
            try:
                records = [record for _, record in read_records(self._path)]
            except DataError as error:
                raise OutputError(f"{error}; remove {folder} to search again") from None
            if not records:
                journal.append(begun)
                records = [begun]
        changed = sorted(key for key in {*records[0], *begun} if records[0].get(key) != begun.get(key))
        if changed:
            raise OutputError(f"{self._path}: was begun with another {', '.join(changed)}; choose another --output")
        for record in records[1:]:
            self._keep(record)

    def known(self, step: str, **key: Any) -> Record | None:
        return self._by_key.get(_key(step, key))

    def ask(self, step: str, answer: Callable[[], Mapping[str, Any]], **key: Any) -> Record:
        """What is recorded of this step, or else answer()'s, which then is; as JSON has it."""
        found = self.known(step, **key)
        if found is None:
            found = json.loads(line({"step": step, "of": key, **answer()}))
            with Journal(self._path) as journal:
                journal.append(found)
            self._keep(found)
        return found

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._by_key[_key(record["step"], record.get("of", {}))] = record


def _key(step: str, of: Mapping[str, Any]) -> str:
    return json.dumps([step, dict(of)], sort_keys=True)
