"""The blocks of docs/rights.md, which the tests carry out."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parents[2] / "docs" / "rights.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PERMISSIONS = ["rabbitmqctl", "set_permissions", "-p", "inferq"]
_ACL = ["redis-cli", "ACL", "SETUSER"]
_NONE = ("^$", "^$", "^$")
"""The patterns of a user that does not use RabbitMQ."""


@dataclass(frozen=True)
class Rights:
    """What the page gives one user: patterns to configure, write and read; words of its ACL; its policy."""

    user: str
    permissions: tuple[str, str, str]
    acl: tuple[str, ...]
    policy: dict[str, Any] | None

    def commands(self) -> set[str]:
        """The Redis commands that the user may call."""
        return {word[1:] for word in self.acl if word.startswith("+")}

    def statements(self) -> set[tuple[str, str]]:
        """Each action of the policy with each of its resources."""
        return {
            (action, resource)
            for statement in (self.policy or {"Statement": []})["Statement"]
            for action in listed(statement["Action"])
            for resource in listed(statement["Resource"])
        }


def read_page(*, task_type: str) -> dict[str, Rights]:
    """The rights of each user. `task_type` replaces the page's example of a type."""
    text = _PAGE.read_text("utf-8").replace(r"inference\.ocr\.", rf"inference\.{task_type}\.")
    found = {}
    for section in text.split("\n## ")[1:]:
        permissions = _NONE
        user, acl, policy = "", (), None
        for kind, content in _BLOCK.findall(section):
            if kind == "json":
                policy = json.loads(content)
                continue
            words = shlex.split(content.replace("\\\n", " "))
            if words[:4] == _PERMISSIONS:
                user, *patterns = words[4:]
                permissions = tuple(patterns)
            else:
                assert words[:3] == _ACL, content
                user = user or words[3]
                assert words[3] == user
                acl = tuple(words[4:])
        if user:
            assert user not in found
            found[user] = Rights(user, permissions, acl, policy)
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
