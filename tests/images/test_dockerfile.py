"""The Dockerfile has a target for each part that runs in a container, all with the same precautions."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

import pytest

from tests.images.dockerfile import ROOT, Image, build_arguments, images, stages

IMAGES = {image.target: image for image in images()}
GPU = {name for name in IMAGES if name.endswith("-gpu")}
PARTS = {"gateway", "callbacks"}

each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


def test_every_task_type_and_each_other_part_has_a_target() -> None:
    engines = entry_points(group="inferq.engines")
    own = {engine.name for engine in engines if engine.value.startswith("inferq.consumers.")}
    assert {"ocr", "echo"} <= own
    assert IMAGES.keys() - GPU == own | PARTS
    assert {name.removesuffix("-gpu") for name in GPU} == {"ocr", "ner", "facefusion", "acestep"}


@each_image
def test_a_target_starts_what_it_is_named_after(image: Image) -> None:
    name = image.target.removesuffix("-gpu")
    started = (name,) if name in PARTS else ("worker", name)
    assert (*image.entry_point, *image.arguments) == ("inferq", *started)


@each_image
def test_a_target_copies_one_environment_whose_packages_are_constrained(image: Image) -> None:
    copies = [arguments for word, arguments in image.history if word == "COPY"]
    assert [copy for copy in copies if "/opt/inferq" in copy] == [
        f"--from=build-{image.target} /opt/inferq /opt/inferq"
    ]
    assert {copy.split()[0] for copy in copies} - {f"--from=build-{image.target}"} <= {
        "--from=fonts",
        "--from=facefusion-python",
        "--from=build-facefusion-app",
    }
    assert image.installs
    for install in image.installs:
        assert re.search(r"^-c constraints(-engines)?\.txt ", " ".join(install))


def test_every_stage_starts_from_another_or_from_an_image_that_is_pinned_by_digest() -> None:
    known = stages()
    outside = {stage.parent for stage in known.values()} - known.keys()
    assert outside == {"${PYTHON_IMAGE}", "${FACEFUSION_PYTHON_IMAGE}"}
    given = build_arguments()
    for reference in outside:
        image = given[reference.strip("${}")]
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", image)


@each_image
def test_an_image_lists_what_it_installs(image: Image) -> None:
    (build,) = image.builds
    assert build.endswith("&& $SBOM")
    sbom = stages()["build"].environment["SBOM"]
    # The tool is outside of the environment that it lists, and the list is inside, so that it is copied.
    assert sbom.split()[0] == "cyclonedx-py"
    assert "--output-file /opt/inferq/sbom.json /opt/inferq/bin/python" in sbom
    (prepared,) = stages()["build"].runs
    assert prepared.index("pip install -c constraints.txt cyclonedx-bom") < prepared.index(
        "-m venv /opt/inferq"
    )
    assert re.search(r"^cyclonedx-bom==", (ROOT / "constraints.txt").read_text("utf-8"), re.M)


@each_image
def test_an_image_runs_unprivileged_without_build_tools(image: Image) -> None:
    assert image.last("USER") == "65532:65532"
    assert image.last("STOPSIGNAL") == "SIGTERM"
    assert image.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    runs = [arguments for word, arguments in image.history if word == "RUN"]
    kinds = ("mkdir ", "apt-get update && apt-get install -y --no-install-recommends ")
    assert [run for run in runs if not run.startswith(kinds)] == []
    assert image.packages <= {"libgomp1", "curl", "ffmpeg"}


@each_image
def test_the_health_check_of_an_image_asks_its_own_port(image: Image) -> None:
    part = "GATEWAY" if image.target == "gateway" else "PROBE"
    port = image.last("EXPOSE")
    assert image.environment[f"INFERQ_{part}_PORT"] == port
    assert image.environment[f"INFERQ_{part}_HOST"] == "0.0.0.0"
    assert f"http://127.0.0.1:{port}/healthz" in image.last("HEALTHCHECK")


@each_image
def test_the_folders_that_an_image_writes_to_are_volumes_of_its_user(image: Image) -> None:
    made = next(arguments for word, arguments in image.history if word == "RUN").split()
    volumes = image.values("VOLUME")
    for volume in volumes:
        assert volume in made[: made.index("&&")]
        assert volume in made[made.index("65532:65532") :]
    settings = ("TMPDIR", "INFERQ_SCRATCH_DIR", "INFERQ_WEIGHTS_CACHE")
    written = {name: image.environment[name] for name in settings if name in image.environment}
    assert set(written.values()) == set(volumes)
    # The jobs use the temporary directory, the workers a setting of their own, too. /tmp may be read-only.
    expected = {"gateway": set(), "callbacks": {"TMPDIR"}}.get(image.target, {"TMPDIR", "INFERQ_SCRATCH_DIR"})
    assert written.keys() - {"INFERQ_WEIGHTS_CACHE"} == expected


@pytest.mark.parametrize("name", sorted(GPU))
def test_a_gpu_image_differs_from_the_one_for_the_cpu_in_engine_and_packages_only(name: str) -> None:
    gpu, cpu = IMAGES[name], IMAGES[name.removesuffix("-gpu")]
    own = dict(gpu.environment.items() - cpu.environment.items())
    assert cpu.environment.items() <= gpu.environment.items()
    assert own.pop("INFERQ_DEVICE") == "cuda"
    assert own.pop(f"INFERQ_{cpu.target.upper()}_BACKEND")
    # The others are the folders where the engine's library keeps its weights, and where FaceFusion is.
    folders = ("/weights", "/opt/facefusion", "$NVIDIA_LIBRARIES/")
    assert [value for value in own.values() if not value.startswith(folders)] == []
    assert gpu.installs != cpu.installs


def test_facefusion_has_a_python_of_its_own_and_keeps_its_weights_in_the_volume() -> None:
    image, app = IMAGES["facefusion-gpu"], stages()["build-facefusion-app"]
    home = image.environment["INFERQ_FACEFUSION_HOME"]
    assert ("COPY", f"--from=build-facefusion-app {home} {home}") in image.history
    python = ("COPY", "--from=facefusion-python /usr/local /opt/python3.12")
    assert python in image.history
    assert python in app.instructions
    assert ("WORKDIR", home) in app.instructions
    (build,) = [run for run in app.runs if "-m venv" in run]
    # inferq finds this environment below FaceFusion's folder; FaceFusion keeps its weights in .assets/models.
    assert build.startswith("/opt/python3.12/bin/python3.12 -m venv .venv ")
    assert "ln -s /weights .assets" in build
    assert "/weights" in image.values("VOLUME")
    # Nothing of it is part of this repository: it is fetched at the commit of a release.
    (source,) = [arguments for word, arguments in app.instructions if word == "ADD"]
    assert source == f"https://github.com/facefusion/facefusion.git#${{FACEFUSION_COMMIT}} {home}"
    assert re.fullmatch("[0-9a-f]{40}", build_arguments()["FACEFUSION_COMMIT"])
    assert image.packages == {"curl", "ffmpeg"}


def test_callbacks_can_be_replaced_by_beat() -> None:
    assert (IMAGES["callbacks"].entry_point, IMAGES["callbacks"].arguments) == (("inferq",), ("callbacks",))


def test_a_build_without_a_target_makes_the_gateway() -> None:
    assert list(stages())[-1] == "gateway"


def test_the_build_context_holds_what_the_build_needs() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*"
    rooms = {"inferq", "schemas", "broker", "storage", "producer", "consumers"}
    pins = {"constraints.txt", "constraints-engines.txt"}
    assert {f"!{needed}" for needed in rooms | pins | {"pyproject.toml", "setup.cfg"}} <= set(ignored)


@pytest.mark.parametrize("name", ["ocr", "ocr-gpu"])
def test_an_image_that_draws_pdfs_has_fonts_for_chinese(name: str) -> None:
    assert ("COPY", "--from=fonts /usr/share/fonts /usr/share/fonts") in IMAGES[name].history
    assert any("fonts-wqy-microhei" in arguments for _, arguments in stages()["fonts"].instructions)
