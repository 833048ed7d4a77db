"""The connection to the API server, and what its errors mean."""

from __future__ import annotations

import os
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import Any

import urllib3
from kubernetes.client import ApiClient, ApiException, Configuration
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

from inferq.schemas import InstallationError

REQUEST_SECONDS = (3.0, 5.0)
"""How long the API server may take to accept a connection, and to answer."""

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

API_ERRORS = (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What a request may raise; ValueError for an answer that is not JSON, such as that of a proxy."""


def connect() -> ApiClient:
    """A client with the service account of this pod; outside a cluster, with the kubeconfig of this user.

    Raises InstallationError.
    """
    configuration: Any = Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)
        else:
            load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
    except (ConfigException, OSError) as error:
        raise InstallationError(
            f"the Kubernetes API cannot be found: {error}; run the guard in a pod with a service account token, "
            "or set KUBECONFIG",
            code="bad_settings",
        ) from error
    # One more try on a new connection, since a kept one may have died. All requests may be repeated.
    configuration.retries = urllib3.Retry(1, allowed_methods=None, respect_retry_after_header=False)
    configuration.keep_alive = True
    return ApiClient(configuration)


def own_namespace() -> str:
    """The namespace of this pod. Raises InstallationError outside a pod."""
    try:
        return _NAMESPACE_FILE.read_text("utf-8").strip()
    except OSError as error:
        raise InstallationError(
            f"the namespace of the workers is unknown: {error}; set INFERQ_SCALE_IN_NAMESPACE",
            code="bad_settings",
        ) from error


def retry_after(error: Exception) -> float | None:
    """Seconds that the API server asks to wait; None if it does not."""
    headers = getattr(error, "headers", None)
    if isinstance(headers, (dict, urllib3.HTTPHeaderDict, Message)):
        with suppress(TypeError, ValueError):
            return max(0.0, float(str(headers.get("Retry-After"))))
    return None


def reason_of(error: Exception) -> str:
    """An error in a few words: an ApiException's own text has the headers and the body of the answer."""
    if isinstance(error, ApiException):
        return f"{error.status} {error.reason}"
    return f"{type(error).__name__}: {error}"
