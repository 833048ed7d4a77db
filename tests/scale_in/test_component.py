"""The component scale-in-guard: what its account may do, by the expressions of its admission policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cel
import pytest

from tests.k8s.manifests import Manifest, of_kind, render
from tests.scale_in.conftest import Site
from tests.scale_in.kubernetes_api import Object
from tests.waiting import eventually

COMPONENT = "components/scale-in-guard"
COST = "controller.kubernetes.io/pod-deletion-cost"
GUARD = "system:serviceaccount:inferq:scale-in-guard"


def policy() -> Manifest:
    (found,) = of_kind(render(COMPONENT), "ValidatingAdmissionPolicy").values()
    return found


def refusal(old: Object, new: Object, user: str = GUARD) -> str | None:
    """Why the policy refuses a change; None if it does not."""
    spec = policy()["spec"]
    known: dict[str, Any] = {"object": new, "oldObject": old, "request": {"userInfo": {"username": user}}}
    if not all(cel.evaluate(each["expression"], known) for each in spec["matchConditions"]):
        return None
    known["variables"] = {}
    for each in spec["variables"]:
        known["variables"][each["name"]] = cel.evaluate(each["expression"], known)
    for each in spec["validations"]:
        try:
            holds = cel.evaluate(each["expression"], known)
        except (ValueError, RuntimeError, TypeError, KeyError):
            holds = False  # failurePolicy: Fail
        if not holds:
            return str(each["message"])
    return None


def pod(**metadata: Any) -> Object:
    labels = {"app.kubernetes.io/name": "inferq", "app.kubernetes.io/component": "worker"}
    return {
        "metadata": {"name": "w", "labels": labels, **metadata},
        "spec": {"containers": [{"name": "worker", "image": "inferq-ocr"}]},
    }


def marked(old: Object, cost: str | None = "100") -> Object:
    new = copy.deepcopy(old)
    new["metadata"].setdefault("annotations", {})[COST] = cost
    return new


def test_the_policy_lets_the_guard_set_the_cost() -> None:
    for old in (pod(), pod(annotations={"a": "b"}), pod(annotations={COST: "-5"}, finalizers=["f"])):
        for cost in ("0", "100", "-1073741824"):
            assert refusal(old, marked(old, cost)) is None


def _image(new: Object) -> None:
    new["spec"]["containers"][0]["image"] = "evil"


def _seconds(new: Object) -> None:
    new["spec"]["activeDeadlineSeconds"] = 1


def _label(new: Object) -> None:
    new["metadata"]["labels"]["inferq.dev/type"] = "ocr"


def _no_labels(new: Object) -> None:
    del new["metadata"]["labels"]


def _owner(new: Object) -> None:
    new["metadata"]["ownerReferences"] = [{"kind": "ReplicaSet"}]


def _finalizer(new: Object) -> None:
    new["metadata"]["finalizers"] = ["f"]


def _other_annotation(new: Object) -> None:
    new["metadata"]["annotations"]["b"] = "c"


def _changed_annotation(new: Object) -> None:
    new["metadata"]["annotations"]["a"] = "c"


def _removed_annotation(new: Object) -> None:
    del new["metadata"]["annotations"]["a"]


def _no_number(new: Object) -> None:
    new["metadata"]["annotations"][COST] = "much"


def _no_cost(new: Object) -> None:
    del new["metadata"]["annotations"][COST]


@pytest.mark.parametrize(
    "change",
    [
        _image, _seconds, _label, _no_labels, _owner, _finalizer, _other_annotation, _changed_annotation,
        _removed_annotation, _no_number, _no_cost,
    ],
)  # fmt: skip
def test_the_policy_refuses_the_guard_everything_else(change: Callable[[Object], None]) -> None:
    old = pod(annotations={"a": "b"})
    new = marked(old)
    change(new)
    assert refusal(old, new)
    assert refusal(old, new, user="system:serviceaccount:inferq:deployer") is None, "others are not concerned"


def test_the_policy_refuses_the_guard_pods_that_are_no_workers() -> None:
    for labels in ({}, {"app.kubernetes.io/name": "other", "app.kubernetes.io/component": "worker"}):
        old = pod(labels=labels)
        assert refusal(old, marked(old)) == "the scale-in guard may only update pods of workers"


def test_the_guard_works_under_its_policy(site: Site) -> None:
    site.api.admit = refusal
    site.api.add_pod("a", annotations={"x": "y"})
    site.api.add_pod("b")
    site.say("a", busy=True)
    site.say("b", consumer_priority=-(2**30))
    site.guard()
    eventually(lambda: site.costs("a", "b") == ["100", str(-(2**30))])
    assert not site.api.patches(422)


def test_the_account_may_patch_pods_and_keep_its_lease_and_no_more() -> None:
    (role,) = of_kind(render(COMPONENT), "Role").values()
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {
            "apiGroups": ["coordination.k8s.io"], "resources": ["leases"],
            "resourceNames": ["scale-in-guard"], "verbs": ["get", "update"],
        },
    ]  # fmt: skip


def test_only_the_guard_has_a_token_and_all_workers_get_tasks_in_the_order_of_their_start() -> None:
    deployments = of_kind(render(COMPONENT), "Deployment")
    with_token = {
        name for name, each in deployments.items()
        if each["spec"]["template"]["spec"]["automountServiceAccountToken"]
    }  # fmt: skip
    assert with_token == {"scale-in-guard"}
    ordered = {
        name for name, each in deployments.items()
        if {"name": "INFERQ_OLDEST_FIRST", "value": "true"}
        in each["spec"]["template"]["spec"]["containers"][0]["env"]
    }  # fmt: skip
    assert ordered == {name for name in deployments if name.startswith("worker-")}
    assert len(ordered) > 1


def test_the_rights_are_those_of_the_account_in_its_namespace() -> None:
    (binding,) = of_kind(render("overlays/production"), "RoleBinding").values()
    subject = {"kind": "ServiceAccount", "name": "scale-in-guard", "namespace": "inferq"}
    assert binding["subjects"] == [subject]
    assert "system:serviceaccount:{namespace}:{name}".format(**subject) == GUARD
