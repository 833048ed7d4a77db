"""moto's S3 with users and policies, as a process: `python -m tests.rights.moto_iam LOG`.

It writes its port to its output. Each request for an object is a line of JSON in LOG: access key, action, resource,
allowed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.iam.access_control import S3IAMRequest
from moto.server import ThreadedMotoServer


def main() -> None:
    log = Path(sys.argv[1]).open("a", buffering=1)  # noqa: SIM115 - as long as the process
    check = S3IAMRequest.check_action_permitted

    def check_and_record(request: S3IAMRequest, resource: str) -> None:
        allowed = False
        try:
            check(request, resource)
            allowed = True
        finally:
            facts = [request._access_key._access_key_id, request._action, resource, allowed]
            log.write(json.dumps(facts) + "\n")

    S3IAMRequest.check_action_permitted = check_and_record
    # Users are made without rights; requests for objects need them from the first.
    ActionAuthenticatorMixin._authenticate_and_authorize_normal_action = lambda *_arguments: None
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    sys.stdout.write(f"{server.get_host_and_port()[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
