"""The mesh of a face: its triangles, how it is warped, how faces that are turned aside are told."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from inferq.consumers.facefusion.blend import OUTLINE, blend
from inferq.consumers.facefusion.landmarks import Face, FaceFinder, _starts, mesh_edges, yaw
from inferq.consumers.facefusion.preview import choose_faces
from inferq.consumers.facefusion.warp import triangulate, warp
from inferq.schemas import InvalidTask
from tests.facefusion.conftest import COLLINS, HOPPER, Pixels, pixels


@cache
def mesh() -> NDArray[np.int32]:
    """The triangles of a face: making them loads mediapipe, too heavy for those that only collect tests."""
    return triangulate(mesh_edges())


def test_the_mesh_is_closed_but_for_its_rim_and_the_mouth() -> None:
    triangles = mesh()
    assert triangles.shape == (880, 3)
    assert set(triangles.ravel()) == set(range(468))
    uses = Counter(
        tuple(sorted(edge)) for triangle in triangles for edge in combinations(triangle.tolist(), 2)
    )
    assert set(uses.values()) == {1, 2}
    rims = {vertex for edge, count in uses.items() if count == 1 for vertex in edge}
    assert {10, 152, 234, 454} < rims  # brow, chin, cheeks
    assert {13, 14, 78, 308} < rims  # lips
    assert not {33, 133, 159, 145} & rims  # an eye
    assert len(rims) == 36 + 20


def square(size: int) -> NDArray[np.float32]:
    return np.array([[0, 0, 0], [size - 1, 0, 0], [size - 1, size - 1, 0], [0, size - 1, 0]], np.float32)


HALVES = np.array([[0, 1, 2], [0, 2, 3]], np.int32)


def test_nothing_moves_where_both_shapes_are_the_same() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    warped, covered = warp(picture, square(64), square(64), HALVES, (64, 64))
    assert covered.all()
    assert np.abs(warped.astype(int) - picture).max() <= 1


def test_a_shape_is_mirrored_turned_and_shrunk() -> None:
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[:100, :100], picture[:100, 100:] = (255, 0, 0), (0, 255, 0)
    onto = square(40)[[1, 0, 3, 2]] + np.array([10, 20, 0], np.float32)
    warped, covered = warp(picture, square(200), onto, HALVES, (60, 70))
    assert covered.sum() == pytest.approx(1600, abs=90)
    assert tuple(warped[30, 40]) == (255, 0, 0)
    assert tuple(warped[30, 20]) == (0, 255, 0)
    assert tuple(warped[50, 20]) == (0, 0, 0)


def test_fine_detail_does_not_alias_where_a_face_shrinks() -> None:
    picture = np.zeros((400, 400, 3), np.uint8)
    picture[::2] = 255
    warped, _ = warp(picture, square(400), square(40), HALVES, (40, 40))
    assert np.abs(warped[2:-2, 2:-2].astype(int) - 127).max() < 16


def test_of_two_folds_the_nearer_is_seen() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40], picture[:, 40:] = 50, 200
    left, right = square(40), square(40) + np.array([40, 0, 0], np.float32)
    source = np.concatenate([left, right])
    folded = np.concatenate([left, left + np.array([0, 0, -9], np.float32)])
    triangles = np.concatenate([HALVES, HALVES + 4]).astype(np.int32)
    assert (warp(picture, source, folded, triangles, (40, 40))[0][4:-4, 4:-4] >= 198).all()
    folded[4:, 2] = 9
    assert (warp(picture, source, folded, triangles, (40, 40))[0][4:-4, 4:-4] <= 52).all()


@given(
    st.lists(st.tuples(*[st.floats(-50, 150, width=32)] * 3), min_size=4, max_size=4),
    st.lists(st.tuples(*[st.floats(-50, 150, width=32)] * 3), min_size=4, max_size=4),
)
def test_any_shape_is_warped_onto_any_other(
    source: list[tuple[float, float, float]], target: list[tuple[float, float, float]]
) -> None:
    picture = np.full((90, 70, 3), 77, np.uint8)
    warped, covered = warp(
        picture, np.array(source, np.float32), np.array(target, np.float32), HALVES, (50, 60)
    )
    assert warped.shape == (60, 50, 3)
    assert (warped[covered] == 77).all()


@pytest.mark.parametrize("shade", [0, 40, 128, 255])
@pytest.mark.parametrize("ground", [0, 128, 255])
def test_a_plain_face_takes_the_colour_of_what_it_covers(shade: int, ground: int) -> None:
    points = np.random.default_rng(0).uniform(20, 80, (468, 3)).astype(np.float32)
    angles = np.linspace(0, 2 * np.pi, len(OUTLINE), endpoint=False)
    points[list(OUTLINE), 0], points[list(OUTLINE), 1] = (
        50 + 40 * np.cos(angles),
        50 + 40 * np.sin(angles),
    )
    face, onto = np.full((100, 100, 3), shade, np.uint8), np.full((100, 100, 3), ground, np.uint8)
    patch, fade = blend(face, onto, points, np.ones((100, 100), np.bool_), 80)
    assert np.abs(patch.astype(int) - ground).max() <= 3
    assert fade[50, 50] == 1
    assert fade[0].max() == fade[:, 0].max() == 0


def test_nothing_is_seen_of_what_the_face_does_not_cover() -> None:
    points = np.full((468, 3), 50, np.float32)
    points[list(OUTLINE), :2] = [[0, 0], [99, 0], [99, 99], [0, 99]] * 9
    covered = np.ones((100, 100), np.bool_)
    covered[40:60, 40:60] = False
    picture = np.zeros((100, 100, 3), np.uint8)
    _, fade = blend(picture, picture, points, covered, 80)
    assert (fade[40:60, 40:60] == 0).all()


def turned_aside(portrait: Pixels, face: Face, degrees: float) -> Pixels:
    """The face alone, as wide as 220 pixels, turned about the vertical axis, before a plain head."""
    middle, angle = face.points.mean(axis=0), np.radians(degrees)
    turn = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]], np.float32
    )
    points = ((face.points - middle) * (220 / np.ptp(face.points[:, 0]))) @ turn.T
    points = (points + np.array([200, 200, 0])).astype(np.float32)
    head, covered = warp(portrait, face.points, points, mesh(), (400, 400))
    picture = np.full((400, 400, 3), (120, 110, 105), np.uint8)
    rows, columns = np.mgrid[:400, :400]
    picture[((columns - 200) / 125) ** 2 + ((rows - 190) / 170) ** 2 < 1] = (90, 70, 60)
    picture[covered] = head[covered]
    return picture


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder()


@pytest.mark.parametrize("path", [COLLINS, HOPPER], ids=["Collins", "Hopper"])
def test_a_face_half_aside_is_found_and_a_profile_is_none(finder: FaceFinder, path: object) -> None:
    portrait = pixels(path)  # type: ignore[arg-type]
    (face,) = finder.find(portrait)
    for degrees in (-40, -20, 20, 40):
        (found,) = finder.find(turned_aside(portrait, face, degrees))
        assert 0.4 * abs(degrees) < abs(yaw(found.points)) < abs(degrees)
        assert yaw(found.points) * degrees < 0
    for degrees in (-75, -60, 60, 75):
        assert finder.find(turned_aside(portrait, face, degrees)) == []


@given(st.integers(1, 5000), st.sampled_from([256, 512]))
def test_every_pixel_is_searched_and_no_face_falls_between_two_windows(side: int, window: int) -> None:
    starts = _starts(side, window)
    assert starts[0] == 0
    assert max(starts) == max(0, side - window)
    assert all(0 < after - before <= window // 2 for before, after in pairwise(starts))


@pytest.mark.parametrize(
    ("face", "count", "chosen"), [("largest", 3, (0,)), ("all", 3, (0, 1, 2)), (2, 3, (2,))]
)
def test_faces_are_chosen_by_number(face: object, count: int, chosen: tuple[int, ...]) -> None:
    assert choose_faces(face, count) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(("face", "count", "said"), [("all", 0, "no face was found"), (1, 1, "1 face,")])
def test_a_face_that_is_not_there_cannot_be_chosen(face: object, count: int, said: str) -> None:
    with pytest.raises(InvalidTask, match=f"target_url: .*{said}") as caught:
        choose_faces(face, count)  # type: ignore[arg-type]
    assert caught.value.code == "no_face_found"
