"""docker-bake.hcl builds every target of the Dockerfile, under the name that the deployments use."""

from __future__ import annotations

from tests.images.bake import groups, targets, variables
from tests.images.dockerfile import build_arguments, images


def test_the_bake_file_builds_every_image_once() -> None:
    built = [target.target for group in targets().values() for target in group]
    assert sorted(built) == [image.target for image in images()]


def test_those_for_a_gpu_are_built_on_demand() -> None:
    assert groups() == {"default": ["cpu"]}
    assert {target.target.endswith("-gpu") for target in targets()["gpu"]} == {True}
    assert {target.target.endswith("-gpu") for target in targets()["cpu"]} == {False}


def test_an_image_is_called_after_its_target() -> None:
    for target in targets()["cpu"] + targets()["gpu"]:
        assert target.name == target.target
        assert target.tags == ("${REGISTRY}inferq-" + target.target + ":${TAG}",)


def test_build_arguments_exist_in_the_dockerfile_and_come_from_variables() -> None:
    given = {
        name: value
        for group in targets().values()
        for each in group
        for name, value in each.arguments.items()
    }
    assert given == {"PADDLE_INDEX": "PADDLE_INDEX"}
    assert given.keys() <= build_arguments().keys()
    assert variables() == {"REGISTRY": "", "TAG": "latest", "PADDLE_INDEX": ""}
