"""Publishes and clears tables: the log's entry decides, then the table's path follows. Blocking."""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from libs.connectors.parquet.files import StagedFile
from libs.connectors.parquet.folders import write_version
from libs.connectors.parquet.log import Log, LogState, refuse_fenced, sync_folder
from libs.connectors.parquet.merging import PresentFile, schema_of
from libs.connectors.parquet.names import table_path
from libs.connectors.parquet.staging import STAGING, Staging
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    RunContext,
    StreamName,
    StreamPlan,
    Written,
)
from libs.connectors.states import StreamState

_COUNTS = ("rows", "inserted", "updated", "deleted", "unchanged")


class Publisher:
    """The directory under one run's epoch."""

    def __init__(self, root: Path, context: RunContext) -> None:
        self._root = root
        self._context = context
        self._log = Log(root)
        self._staging = Staging(root, context, self._log)
        self._tables = self._staging.tables

    def take_epoch(self) -> None:
        """Record the epoch in the log, then finish or remove what killed writers left."""
        (self._root / STAGING).mkdir(parents=True, exist_ok=True)
        self._append({"kind": "epoch"})
        self._staging.take()
        self._staging.sweep()

    def release(self) -> None:
        """Give up the staging folder."""
        self._staging.release()

    def stage(self) -> Path:
        """A new folder for a version of a table; its name is the version's."""
        folder = self._staging.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def committed(self, plan: StreamPlan) -> Written | None:
        path = self._path(plan)
        entry = self._log.state.current.get(path)
        if entry is None or (entry["job_id"], entry["run_id"]) != (self._context.job_id, self._context.run_id):
            return None
        if not _is_of(entry, plan.stream):
            return None
        try:
            self._tables.reconcile(path)
        except FileNotFoundError:
            # The folder has been removed since.
            return None
        if not all((self._root / path / file["name"]).exists() for file in entry.get("files", ())):
            return None
        # Entries of earlier versions have no counts: they replaced all rows.
        counts = entry.get("counts") or {"rows": entry["rows"], "inserted": entry["rows"]}
        return Written(
            **counts,
            verified=entry.get("verified"),
            verification=entry.get("verification"),
            values_changed=entry.get("values_changed") or {},
        )

    def refuse_unwritable(self, plan: StreamPlan) -> None:
        """Raises ``Fenced``, ``TargetShared``, or ``ConnectorRefused`` if others wrote to the table's path."""
        path = self._path(plan)
        self._admit(path)(self._log.state)
        self._tables.refuse_foreign(path)

    def state(self, plan: StreamPlan) -> StreamState | None:
        """What the job's last commit of the stream into its target recorded."""
        entry = self._log.refresh().current.get(self._path(plan))
        if entry is None or entry["job_id"] != self._context.job_id or not _is_of(entry, plan.stream):
            return None
        text = entry.get("state")
        return None if text is None else StreamState.read(text)

    def present(self, plan: StreamPlan) -> list[PresentFile] | None:
        """The files of the target's current version, None if there is no target."""
        path = self._path(plan)
        entry = self._log.refresh().current.get(path)
        if entry is None:
            return None
        try:
            self._tables.reconcile(path)
        except FileNotFoundError:
            return None
        files = [
            PresentFile(file["name"], self._root / path / file["name"], file["rows"], file["size_bytes"])
            for file in entry.get("files", ())
        ]
        missing = [file.name for file in files if not file.path.exists()]
        if missing or not files:
            raise ConnectorRefused(
                f"{self._root / path} no longer has the file {missing[0] if missing else 'list'} that DataSync wrote: "
                "clear the stream's destination to load it again",
                code="target_differs",
            )
        return files

    def present_schema(self, plan: StreamPlan) -> pa.Schema | None:
        """The columns of the target's current version, None if there is none or its files are gone."""
        try:
            files = self.present(plan)
        except ConnectorRefused:
            return None
        return None if files is None else schema_of(files[0].path)

    def publish(
        self,
        plan: StreamPlan,
        staged: Path,
        files: Sequence[StagedFile],
        written: Written,
        state: StreamState | None = None,
        replacing: Sequence[PresentFile] | None = None,
    ) -> None:
        """Add the log's entry, which publishes the version; then bring the table's path up to date.

        If the process is killed in between, the next run of any job brings it up to date.

        Args:
            replacing: the files that the version was made from; None if it was made from none.
        """
        path = self._path(plan)
        self._admit(path)(self._log.state)
        version = staged.name
        write_version(staged, path, version)
        sync_folder(staged.parent)
        entry = _entry("publish", plan, path) | {
            "folder": str(staged.relative_to(self._root)),
            "version": version,
            "rows": sum(file.rows for file in files),
            "counts": {name: getattr(written, name) for name in _COUNTS},
            "state": None if state is None else state.model_dump_json(),
            "files": [{"name": file.name, "rows": file.rows, "size_bytes": file.size_bytes} for file in files],
            "verified": written.verified,
            "verification": written.verification,
            "values_changed": dict(written.values_changed),
        }
        try:
            self._append(entry, None if replacing is None else [file.name for file in replacing])
        except BaseException:
            # The entry may have been added all the same.
            current = self._log.refresh().current.get(path)
            if current is None or current.get("version") != version:
                shutil.rmtree(staged, ignore_errors=True)
            raise
        self._tables.reconcile(path)

    def clear(self, plan: StreamPlan) -> None:
        path = self._path(plan)
        self._admit(path)(self._log.state)
        cleared = self._log.state.current.get(path)
        if cleared is None:
            return
        # A sweep finds in this folder what remains to be removed, so it is written before the log's entry.
        clearing = self.stage()
        write_version(clearing, path, "", cleared)
        sync_folder(clearing.parent)
        self._append(_entry("clear", plan, path))
        self._tables.reconcile(path, cleared)

    def _path(self, plan: StreamPlan) -> str:
        return table_path(plan.target, self._log.refresh().current)

    def _append(self, entry: dict[str, Any], made_from: Sequence[str] | None = None) -> LogState:
        context = self._context
        writer = {
            "job_id": context.job_id,
            "project_id": context.project_id,
            "epoch": context.epoch,
            "run_id": context.run_id,
        }
        return self._log.append(entry | writer, self._admit(entry.get("table"), made_from))

    def _admit(self, path: str | None, made_from: Sequence[str] | None = None) -> Callable[[LogState], None]:
        """A check of the log's state that raises ``Fenced``, and ``TargetShared`` if the table is another job's.

        Args:
            made_from: the files that the table must still have.
        """
        context = self._context
        refuse = refuse_fenced(context)

        def admitted(state: LogState) -> None:
            refuse(state)
            entry = state.current.get(path) if path is not None else None
            if entry is not None:
                # Entries of earlier versions do not record the project.
                context.require_ownership(entry["table"], entry["job_id"], entry.get("project_id"))
            if made_from is not None:
                files = [] if entry is None else [file["name"] for file in entry.get("files", ())]
                if files != list(made_from):
                    raise ConnectorUnavailable(f"{path} was changed while its next version was made")

        return admitted


def _entry(kind: str, plan: StreamPlan, path: str) -> dict[str, Any]:
    return {
        "kind": kind,
        # Read by earlier versions, which do not know ``stream_parts``.
        "stream": str(plan.stream),
        "stream_parts": [plan.stream.namespace, plan.stream.name],
        "table": path,
    }


def _is_of(entry: Mapping[str, Any], stream: StreamName) -> bool:
    """Entries of earlier versions record the joined name only, which two streams of a job may share."""
    parts = entry.get("stream_parts")
    return bool(entry["stream"] == str(stream) if parts is None else parts == [stream.namespace, stream.name])
