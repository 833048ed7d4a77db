"""Where it rests: objects, results, status, and the inputs that are fetched."""

from storage.addresses import AddressPolicy, AddressRefused, GuardedBackend
from storage.callbacks import CallbackRecords
from storage.fetch import Fetched, Fetcher, ScratchUnavailable
from storage.local import LocalStore
from storage.objects import (
    BadObjectKey,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    StoreOutage,
    open_store,
)
from storage.results import ResultStore, UnreadableResult, cache_entry_key, folder, upload_key
from storage.settings import StorageSettings
from storage.status import Begun, Page, StatusIndex, StatusOutage, Submission
from storage.webhook_secrets import WebhookSecret, WebhookSecrets, WebhookSettings

__all__ = [
    "AddressPolicy",
    "AddressRefused",
    "BadObjectKey",
    "Begun",
    "CallbackRecords",
    "Fetched",
    "Fetcher",
    "GuardedBackend",
    "LocalStore",
    "ObjectInfo",
    "ObjectNotFound",
    "ObjectStore",
    "Page",
    "ResultStore",
    "ScratchUnavailable",
    "StatusIndex",
    "StatusOutage",
    "StorageSettings",
    "StoreOutage",
    "Submission",
    "UnreadableResult",
    "WebhookSecret",
    "WebhookSecrets",
    "WebhookSettings",
    "cache_entry_key",
    "folder",
    "open_store",
    "upload_key",
]
