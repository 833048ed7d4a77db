"""Where data rests: results in the object store, status in Redis, inputs on their way to a worker.

objects          objects in S3 or a folder, and results, which are written once
status           the status index in Redis, which may be lost
lua              Lua scripts, put together from pieces
batches          a batch's records, source and counts
fetch            fetching inputs by URL
nightly_runs     the runs of a nightly schedule
callbacks        the records of callbacks
workers          the registry of workers
tracks           the attempts of each track, to compare them
figures          the monitor's figures, for the gateway
webhook_secrets  the secrets that callbacks are signed with
json_file        a private JSON file that many processes change
settings         the settings of the object store, Redis, and input fetching
"""

from inferq.storage.batches.index import BatchIndex, IndexLost, LeaseLost, Stall, Step
from inferq.storage.batches.store import (
    BatchConflict,
    BatchSource,
    BatchStore,
    errors_key,
    input_key,
    output_key,
)
from inferq.storage.callbacks import CallbackRecords
from inferq.storage.fetch.fetcher import Fetched, Fetcher, ScratchUnavailable
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.open import open_store
from inferq.storage.objects.results import ResultStore, UnreadableResult, cache_entry_key, folder, upload_key
from inferq.storage.objects.store import BadObjectKey, ObjectInfo, ObjectNotFound, ObjectStore, StoreOutage
from inferq.storage.objects.watch import StoreWatch
from inferq.storage.settings import StorageSettings
from inferq.storage.status.command_group import CommandGroup
from inferq.storage.status.index import Begun, StatusIndex, StatusOutage
from inferq.storage.webhook_secrets import WebhookSecrets, WebhookSettings

__all__ = [
    "BadObjectKey",
    "BatchConflict",
    "BatchIndex",
    "BatchSource",
    "BatchStore",
    "Begun",
    "CallbackRecords",
    "CommandGroup",
    "Fetched",
    "Fetcher",
    "IndexLost",
    "LeaseLost",
    "LocalStore",
    "ObjectInfo",
    "ObjectNotFound",
    "ObjectStore",
    "ResultStore",
    "ScratchUnavailable",
    "Stall",
    "StatusIndex",
    "StatusOutage",
    "Step",
    "StorageSettings",
    "StoreOutage",
    "StoreWatch",
    "UnreadableResult",
    "WebhookSecrets",
    "WebhookSettings",
    "cache_entry_key",
    "errors_key",
    "folder",
    "input_key",
    "open_store",
    "output_key",
    "upload_key",
]

if __name__ != "inferq.storage":
    raise ImportError(f"import inferq.storage instead of {__name__}, which would be a second copy of it")
