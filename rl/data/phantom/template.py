"""The knee template: signed distances of bones and the mask of every region, in knee coordinates.

Knee coordinates are millimetres: `a` grows towards posterior, `s` towards inferior, `l` towards lateral, the origin is
the middle of the joint line. Sizes are exaggerated where six-millimetre slices would hide the real thing: cartilage
is 6.5 mm thick, the notch two to three slices wide, each bone subregion about 23 mm in plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl.config import ConfigError
from rl.data.phantom.anatomy import Knee
from rl.data.phantom.labels import LABELS, OSTEOPHYTE_SITES

CARTILAGE_MM = 6.5
MARGIN_MM = 7.5
"""The joint lies this far behind the middle of the field, which leaves room for the patella."""
NOTCH_MM = 9.0
"""Half width of the intercondylar notch."""
PATELLA_MM = 56.0
"""How far the middle of the patella lies in front of the origin."""
RIM_MM = 41.0
"""Half width of femur and tibia at the joint line."""
PLATEAU_MM = 16.0
"""Height of the tibial plateau (bone surface) below the origin."""
FEMUR_CUTS_MM = (-11.0, 13.0)
TIBIA_CUTS_MM = (-9.0, 13.0)
TIBIA_ENDS_MM = (-30.0, 34.0)

OSTEOPHYTE_PLACES: dict[str, tuple[float, float, float]] = dict(
    zip(
        OSTEOPHYTE_SITES,
        (
            (-56, -42, 0), (-54, -4, 0), (-56, -23, -23), (-56, -23, 23),
            (-30, -43, -22), (2, -14, -RIM_MM), (34, -36, -24),
            (-30, -43, 22), (2, -14, RIM_MM), (34, -36, 24),
            (2, 26, -RIM_MM), (2, 26, RIM_MM),
        ),
        strict=True,
    )
)  # fmt: skip
"""Where a spur of each site is rooted, (a, s, l)."""

OSTEOPHYTE_MM = (0.0, 4.5, 8.0, 12.0)
"""Protrusion of a spur by grade; the zone of a site reaches as far as the largest."""
RIM_SPUR_MM = (0.0, 8.0, 10.0, 13.0)
"""Protrusion of a rim spur across slices by grade."""

EXTRUSION_MM = (0.0, 2.9, 4.9, 9.0)
"""Displacement of a meniscus segment by grade (MOAKS: under 2, 2-3, 3-5, over 5 mm)."""


@dataclass(frozen=True)
class Grid:
    """Knee coordinates of every voxel, broadcastable to [X, Y, S], and the voxel size in knee mm."""

    a: np.ndarray
    """[X, Y, 1]"""
    s: np.ndarray
    """[X, Y, 1]"""
    l: np.ndarray  # noqa: E741
    """[1, 1, S]"""
    pixel_mm: float
    slice_mm: float


@dataclass(frozen=True)
class Template:
    """The knee without lesions."""

    grid: Grid
    labels: np.ndarray
    """uint8 [X, Y, S]."""
    femur: np.ndarray
    tibia: np.ndarray
    patella: np.ndarray
    """Signed distances to the bone surface in mm, negative inside, float32 [X, Y, S]."""


def make_grid(knee: Knee, shape: tuple[int, int, int], fov_mm: tuple[float, float, float]) -> Grid:
    """Knee coordinates of the voxel centres of a file grid."""
    x, y, z = (
        ((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) * fov
        for n, fov in zip(shape, fov_mm, strict=True)
    )
    da, ds, dl = knee.translation_mm
    x, y = x[:, None, None] - da - MARGIN_MM, y[None, :, None] - ds
    angle = np.deg2rad(knee.rotation_deg)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    # Slices run towards the patient's right: lateral on a right knee, medial on a left one.
    z = (z if knee.side == "right" else z[::-1])[None, None, :] - dl
    k = np.float32(1 / knee.scale)
    pixel = max(fov_mm[0] / shape[0], fov_mm[1] / shape[1])
    slice_mm = fov_mm[2] / shape[2]
    return Grid(
        (x * cos + y * sin) * k, (y * cos - x * sin) * k, z * k, pixel / knee.scale, slice_mm / knee.scale
    )


def build_template(knee: Knee, grid: Grid) -> Template:
    """Bones, then the mask of every region in order of precedence (later ones win).

    Raises:
        ConfigError: a grid so coarse or small that a region has no voxel.
    """
    femur, tibia, patella = _femur(knee, grid), _tibia(grid), _patella(knee, grid)
    labels = np.zeros(femur.shape, np.uint8)
    template = Template(grid, labels, femur, tibia, patella)
    _label_soft_tissue(template, knee)
    _label_bones(template)
    _label_cartilage(template)
    _label_menisci(template, knee)
    present = np.bincount(labels.ravel(), minlength=256)
    missing = [name for name, label in LABELS.items() if not present[label]]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} vanish on a grid of {labels.shape} voxels: give phantom.shape more voxels "
            "(96, 96, 16 shows every region) or phantom.fov_mm the whole knee (140, 140, 104)"
        )
    return template


def ball(grid: Grid, centre: tuple[float, float, float], axes: tuple[float, float, float]) -> np.ndarray:
    """Signed distance (approximate, mm) to an ellipsoid with the given centre and semi-axes (a, s, l)."""
    r = np.sqrt(
        ((grid.a - centre[0]) / axes[0]) ** 2
        + ((grid.s - centre[1]) / axes[1]) ** 2
        + ((grid.l - centre[2]) / axes[2]) ** 2
    )
    return (r - 1) * np.float32(min(axes))


def band(grid: Grid, ends: tuple[tuple[float, float], tuple[float, float]], thickness: float) -> np.ndarray:
    """Signed in-plane distance [X, Y, 1] to a straight band between two points (a, s)."""
    (a0, s0), (a1, s1) = ends
    length = float(np.hypot(a1 - a0, s1 - s0))
    ua, us = (a1 - a0) / length, (s1 - s0) / length
    along = np.clip((grid.a - a0) * ua + (grid.s - s0) * us, 0, length)
    return np.hypot(grid.a - a0 - along * ua, grid.s - s0 - along * us) - np.float32(thickness / 2)


def _femur(knee: Knee, grid: Grid) -> np.ndarray:
    a, s, side = grid.a, grid.s, np.abs(grid.l)
    # Condyles: an ellipse in each sagittal slice, smaller towards the rim and at the trochlear groove.
    shrink = (
        8.0 * np.clip((side - 28) / 13, 0, None) ** 2
        + 4.0 * np.clip(1 - side / NOTCH_MM, 0, None)
        - knee.condyle_mm
    )
    condyle = (np.sqrt(((a - 2) / 34) ** 2 + ((s + 24) / 26) ** 2) - 1) * 29 + shrink
    # Shaft: a tapering cylinder upwards from the condyles.
    taper = np.clip((s + 62) / 30, 0, 1)
    half_a, half_l = 17 + 9 * taper, 17 + 20 * taper
    shaft = (np.sqrt(((a - 3) / half_a) ** 2 + (grid.l / half_l) ** 2) - 1) * 17
    shaft = np.maximum(shaft, s + 30)
    bone = np.minimum(np.maximum(condyle, 4 * (side - RIM_MM)), shaft)
    # Positive inside the notch: behind the trochlea, below its roof, between the condyles.
    notch = np.minimum(np.minimum(a + 11, s + 16), NOTCH_MM - side)
    return np.maximum(bone, notch).astype(np.float32)


def _tibia(grid: Grid) -> np.ndarray:
    a, s, side = grid.a, grid.s, np.abs(grid.l)
    narrow = np.clip((s - 30) / 35, 0, 1)
    half_a, half_l = 32 - 14 * narrow, RIM_MM - 20 * narrow
    # A superellipse section: nearly rectangular plateau with rounded corners.
    in_plane, across = np.square((a - 2 + 2 * narrow) / half_a), np.square(grid.l / half_l)
    column = (np.sqrt(np.sqrt(np.square(in_plane) + np.square(across * across * across))) - 1) * 28
    spine = 6.0 * np.clip(1 - side / NOTCH_MM, 0, None) * np.exp(-(((a - 2) / 12) ** 2))
    return np.maximum(column, PLATEAU_MM - spine - s).astype(np.float32)


def _patella(knee: Knee, grid: Grid) -> np.ndarray:
    shift = knee.patella_shift_mm
    r = (
        (np.abs(grid.a + PATELLA_MM) / 9) ** 2.5
        + (np.abs(grid.s + 23 - shift) / 19) ** 2.5
        + (np.abs(grid.l) / 23.5) ** 2.5
    )
    return ((r**0.4 - 1) * 10).astype(np.float32)


def _put(labels: np.ndarray, name: str, where: np.ndarray) -> None:
    labels[np.broadcast_to(where, labels.shape)] = LABELS[name]


def _label_soft_tissue(t: Template, knee: Knee) -> None:
    g, labels = t.grid, t.labels
    shift = knee.patella_shift_mm
    outside = (t.femur > 0) & (t.tibia > 0) & (t.patella > 0)
    for name, (centre, axes) in SOFT_REGIONS.items():
        _put(labels, name, (ball(g, centre, axes) < 0) & outside)
    _put(labels, "fibula", (ball(g, (24, 45, 40), (8, 26, 8)) < 0) & outside)
    _put(labels, "patellar tendon", (patellar_tendon(g, shift) < 0) & (np.abs(g.l) < 15) & outside)
    for site in OSTEOPHYTE_PLACES:
        _put(labels, f"{site} osteophyte", (spur(g, site, 3, shift) < 0) & outside)
    _put(labels, "ACL", (acl(g) < 0) & (g.l > 0) & (g.l < NOTCH_MM) & outside)
    _put(labels, "PCL", (pcl(g) < 0) & (g.l <= 0) & (g.l > -NOTCH_MM) & outside)


def place_of(site: str, patella_shift_mm: float) -> tuple[float, float, float]:
    """Root of a site's spur; patellar sites move with the patella."""
    a, s, lateral = OSTEOPHYTE_PLACES[site]
    return (a, s + patella_shift_mm, lateral) if site.startswith("patella") else (a, s, lateral)


def spur(grid: Grid, site: str, grade: int, patella_shift_mm: float) -> np.ndarray:
    """Signed distance (approximate, mm) to the spur of a site at a grade above 0.

    The protrusion shows in plane as a radius. Spurs of the medial and lateral rims also reach across slices, at
    least one slice beyond the bone; the others are 24 mm wide.
    """
    a, s, side = place_of(site, patella_shift_mm)
    reach = OSTEOPHYTE_MM[grade]
    width = RIM_SPUR_MM[grade] if abs(side) in (23, RIM_MM) else 12.0
    r = np.hypot(grid.a - a, grid.s - s) / reach
    return (np.sqrt(r**2 + ((grid.l - side) / width) ** 6) - 1) * np.float32(reach)


SOFT_REGIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "Hoffa fat pad": ((-42, 10, 0), (10, 16, 22)),
    "joint cavity": ((-42, -55, 0), (9, 13, 24)),
    "pes anserine bursa": ((-8, 44, -36), (11, 11, 8)),
    "iliotibial band": ((-20, -30, 47), (8, 15, 7)),
    "popliteal fossa": ((48, 4, -16), (10, 15, 11)),
    "infrapatellar bursa": ((-32, 36, 0), (8, 9, 14)),
    "prepatellar bursa": ((-68, -23, 0), (6, 14, 16)),
    "proximal tibiofibular recess": ((8, 48, 38), (9, 11, 8)),
    "posterior recess": ((43, -24, 12), (9, 11, 14)),
}
"""Ellipsoids (centre, semi-axes) of soft-tissue regions."""


def patellar_tendon(grid: Grid, shift: float) -> np.ndarray:
    """Signed in-plane distance to the patellar tendon."""
    return band(grid, ((-59, -6 + shift), (-36, 46)), 8.0)


def acl(grid: Grid) -> np.ndarray:
    """Signed in-plane distance to the anterior cruciate ligament."""
    return band(grid, ((22, -16), (-12, 10)), 9.0)


def pcl(grid: Grid) -> np.ndarray:
    """Signed in-plane distance to the posterior cruciate ligament, a bent band."""
    return np.minimum(band(grid, ((-4, -12), (18, -8)), 9.0), band(grid, ((18, -8), (34, 18)), 9.0))


_PARTS = (
    ("patella", ""),
    *(("femur", f" {part}") for part in ("trochlea", "central", "posterior")),
    *(("tibia", f" {part}") for part in ("anterior", "central", "posterior")),
)


def _put_by_side(t: Template, parts: tuple[np.ndarray, ...], suffix: str = "") -> None:
    """Label each of `_PARTS` as its medial and its lateral region."""
    medial = t.grid.l < 0
    for (bone, part), where in zip(_PARTS, parts, strict=True):
        _put(t.labels, f"{bone} medial{part}{suffix}", where & medial)
        _put(t.labels, f"{bone} lateral{part}{suffix}", where & ~medial)


def _label_bones(t: Template) -> None:
    g, labels = t.grid, t.labels
    side = np.abs(g.l)
    femur, tibia, patella = t.femur <= 0, t.tibia <= 0, t.patella <= 0
    _put(labels, "femur shaft", femur)
    _put(labels, "tibia shaft", tibia)
    low, high = FEMUR_CUTS_MM
    condyle = femur & (side >= NOTCH_MM)
    femur_parts = (
        femur & (g.a < low) & (g.s > -42) & (g.s < 0),
        condyle & (g.a >= low) & (g.a < high) & (g.s > -24),
        condyle & (g.a >= high) & (g.s > -38),
    )
    low, high = TIBIA_CUTS_MM
    plateau = tibia & (g.s < PLATEAU_MM + 23) & (side >= NOTCH_MM)
    tibia_parts = (plateau & (g.a < low), plateau & (g.a >= low) & (g.a < high), plateau & (g.a >= high))
    _put_by_side(t, (patella, *femur_parts, *tibia_parts))
    subspinous = tibia & (g.s < PLATEAU_MM + 23) & (side < NOTCH_MM) & (g.a > -14) & (g.a < 18)
    _put(labels, "tibia subspinous", subspinous)


def _label_cartilage(t: Template) -> None:
    g = t.grid
    side = np.abs(g.l)
    on_condyle = (side >= NOTCH_MM) & (side < RIM_MM - 1)
    shell = (t.femur > 0) & (t.femur <= CARTILAGE_MM) & (t.tibia > CARTILAGE_MM)
    low, high = FEMUR_CUTS_MM
    femur_parts = (
        shell & (g.a < low) & (g.s > -40) & (side < RIM_MM - 3),
        shell & (g.a >= low) & (g.a < high) & on_condyle & (g.s > -14),
        shell & (g.a >= high) & on_condyle & (g.s > -36),
    )
    shell = (t.tibia > 0) & (t.tibia <= CARTILAGE_MM) & (g.s < PLATEAU_MM) & on_condyle
    low, high = TIBIA_CUTS_MM
    front, back = TIBIA_ENDS_MM
    shell &= (g.a > front + 1) & (g.a < back - 1)
    tibia_parts = (shell & (g.a < low), shell & (g.a >= low) & (g.a < high), shell & (g.a >= high))
    patella_part = (
        (t.patella > 0) & (t.patella <= CARTILAGE_MM) & (g.a > 4 - PATELLA_MM) & (t.femur > 1) & (side < 22)
    )
    _put_by_side(t, (patella_part, *femur_parts, *tibia_parts), " cartilage")


def _label_menisci(t: Template, knee: Knee) -> None:
    for compartment, sign, ids in (("medial", -1.0, (44, 45, 56)), ("lateral", 1.0, (46, 47, 57))):
        anterior, body = (EXTRUSION_MM[knee.grades[i]["grade"]] for i in ids[:2])
        tall = bool(knee.grades[ids[2]]["presence"])
        segments = meniscus_segments(t, sign, anterior, body, tall)
        cruciates = np.isin(t.labels, (LABELS["ACL"], LABELS["PCL"]))
        for part, where in segments.items():
            _put(t.labels, f"{compartment} meniscus {part}", where & ~cruciates)


def meniscus_segments(
    t: Template, sign: float, anterior_mm: float, body_mm: float, tall: bool
) -> dict[str, np.ndarray]:
    """Masks of the segments of one meniscus, extruded by the given distances.

    The wedge is what lies between the femoral and the tibial cartilage; where a segment is extruded its outer edge
    moves by the full distance and its inner edge by half, except next to its neighbour.
    """
    a, s, side = t.grid.a, t.grid.s, t.grid.l * sign
    low, high = -12.0, 15.0
    wedge = (t.femur > CARTILAGE_MM) & (t.tibia > CARTILAGE_MM - 1) & (s < PLATEAU_MM - CARTILAGE_MM + 0.5)
    wedge &= s > (-15.0 if tall else -5.0)
    inner_a = np.where(side > 28, low, low - anterior_mm / 2)
    inner_l = np.where((a > low + 6) & (a < high - 6), 26 + body_mm / 2, 26)
    return {
        "anterior": wedge & (side > NOTCH_MM - 2) & (side < 37) & (a < inner_a) & (a > -32 - anterior_mm),
        "body": wedge & (side > inner_l) & (side < RIM_MM + body_mm) & (a >= low) & (a < high),
        "posterior": wedge & (side > 14) & (side < 37) & (a >= high) & (a < 37),
        "root": wedge & (side > 3) & (side <= 14) & (a >= high - 1) & (a < 37),
    }
