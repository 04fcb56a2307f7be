"""The knee without lesions as brightness, and what the scanner does to it.

Brightness is relative to fluid (1.0) as in fat-suppressed DESS: cortex and menisci dark, marrow and fat dark grey,
muscle grey, cartilage bright, fluid brightest.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from rl.data.phantom.anatomy import Knee
from rl.data.phantom.labels import LABELS
from rl.data.phantom.template import (
    EXTRUSION_MM,
    NOTCH_MM,
    PATELLA_MM,
    RIM_MM,
    SOFT_REGIONS,
    Grid,
    Template,
    band,
)

AIR, SKIN, FAT, MUSCLE, VESSEL, JOINT = 0.01, 0.5, 0.27, 0.4, 1.0, 0.45
MARROW, CORTEX, CARTILAGE, MENISCUS, LIGAMENT, HOFFA = 0.32, 0.06, 0.6, 0.06, 0.12, 0.26
BML, FLUID, BARE_BONE, OSTEOPHYTE = 0.63, 1.05, 0.03, 0.8


def healthy(t: Template, knee: Knee) -> np.ndarray:
    """Brightness of a knee without lesions, float32 [X, Y, S]."""
    table = np.full(256, MARROW, np.float32)
    for name, label in LABELS.items():
        if name.endswith("cartilage"):
            table[label] = CARTILAGE
        elif "meniscus" in name:
            table[label] = MENISCUS
        elif name in ("ACL", "PCL", "patellar tendon"):
            table[label] = LIGAMENT
        elif name == "Hoffa fat pad":
            table[label] = HOFFA
        elif name in SOFT_REGIONS or name.endswith("osteophyte"):
            table[label] = np.nan
    table[0] = np.nan
    image = table[t.labels]
    image = np.where(np.isnan(image), _surroundings(t, knee), image)
    for bone in (t.femur, t.tibia, t.patella):
        image[(bone <= 0) & (bone > -1.6)] = CORTEX
    _blend_rim(t, knee, image)
    return image


def _surroundings(t: Template, knee: Knee) -> np.ndarray:
    """Joint space, muscle, vessels, fat, skin and air, where no labelled tissue is."""
    g = t.grid
    leg = _leg(g)
    tissue = np.where(_muscle(g) < 0, MUSCLE + 0.06 * _septa(g), FAT + 0.03 * _septa(g)).astype(np.float32)
    tissue = np.where(leg > -6, FAT, tissue)
    joint = (t.femur < 9) & (t.tibia < 9)
    joint |= (t.femur < 8) & (t.patella < 8) & (g.a > -PATELLA_MM)
    # The coronary recess around the rim: an extruded meniscus shows dark against it.
    joint |= ((g.a - 2) / 22) ** 2 + ((g.s - 3) / 10) ** 2 + ((np.abs(g.l) - RIM_MM) / 13) ** 4 < 1
    tissue = np.where(joint, JOINT, tissue)
    tissue = np.where(_perimeniscal_fluid(g, knee), FLUID, tissue)
    quadriceps = band(g, ((-59, -40 + knee.patella_shift_mm), (-50, -80)), 7.0)
    tissue = np.where((quadriceps < 0) & (np.abs(g.l) < 16) & (t.patella > 0), LIGAMENT, tissue)
    # Vessels are as bright as fluid in every knee, which anchors the window whatever the lesions.
    for a, side, radius in ((46.0, 4.0, 4.5), (36.0, -46.0, 5.0)):
        vessel = np.hypot(g.a - a - 3 * np.sin(g.s / 30), g.l - side)
        tissue = np.where(vessel < radius, VESSEL, np.where(vessel < radius + 1.4, LIGAMENT, tissue))
    iliotibial = np.maximum(np.abs(g.l - 46.5) - 3.2, np.abs(g.a + 16 - g.s / 6) - 9)
    tissue = np.where((iliotibial < 0) & (g.s < 24), LIGAMENT, tissue)
    tissue = np.where(leg > -1.8, SKIN, tissue)
    return np.where(leg > 0, AIR, tissue).astype(np.float32)


def _perimeniscal_fluid(g: Grid, knee: Knee) -> np.ndarray:
    """Fluid outside an extruded segment, a layer as thick as two thirds of the extrusion."""
    level = (g.s > -5) & (g.s < 10)
    fluid = np.zeros(np.broadcast_shapes(g.a.shape, g.l.shape), bool)
    for sign, anterior, body in ((-1, 44, 45), (1, 46, 47)):
        side = g.l * sign
        for question_id in (anterior, body):
            extrusion = EXTRUSION_MM[knee.grades[question_id]["grade"]]
            if question_id == anterior:
                beyond, along = -32 - extrusion - g.a, (side > NOTCH_MM) & (side < 37)
            else:
                beyond, along = side - RIM_MM - extrusion, (g.a > -12) & (g.a < 15)
            fluid |= level & along & (beyond > -4) & (beyond < extrusion * 2 / 3)
    return fluid


def _leg(g: Grid) -> np.ndarray:
    """Signed distance (approximate, mm) to the skin: full at the patella, hollow at the back of the joint."""
    front = 60 + 9 * np.exp(-(((g.s + 22) / 26) ** 2)) - 0.06 * g.s
    back = 63 - 8 * np.exp(-(((g.s - 2) / 22) ** 2))
    half = np.where(g.a < 0, front, back)
    squares = (g.a / half) ** 4 + (g.l / 57) ** 4
    return ((np.sqrt(np.sqrt(squares)) - 1) * 55).astype(np.float32)


def _muscle(g: Grid) -> np.ndarray:
    """Negative inside muscle: quadriceps and hamstrings above the joint, gastrocnemius and deep calf below."""
    wave = 2.5 * np.sin(g.s / 9) + 2 * np.sin(g.l / 8)
    above = np.maximum(g.s + 44 + 0.25 * np.abs(g.a - 5) + wave, np.abs(g.l) - 45)
    hamstrings = np.maximum(40 + 0.5 * (g.s + 22) - g.a + wave, np.abs(np.abs(g.l) - 27) - 17)
    hamstrings = np.maximum(hamstrings, g.s + 6)
    calf = np.maximum(38 - 0.08 * (g.s - 10) - g.a + wave, np.abs(np.abs(g.l) - 21) - 19)
    calf = np.maximum(calf, -14 - g.s)
    deep = np.maximum(np.maximum(42 - g.s, -14 - g.a) + wave, np.abs(g.l) - 44)
    return np.minimum(np.minimum(above, hamstrings), np.minimum(calf, deep))


def _septa(g: Grid) -> np.ndarray:
    """Streaks of fat between muscle bundles, in [-1, 1]."""
    return np.sin(g.a / 2.6 + 2 * np.sin(g.s / 15) + g.l / 9) * np.sin(g.s / 11 - g.a / 6 + 1)


def _blend_rim(t: Template, knee: Knee, image: np.ndarray) -> None:
    """Partial volume of the meniscal bodies: a slice that the outer edge cuts shows the share it covers."""
    side, width = t.grid.l[0, 0], t.grid.slice_mm
    for name, sign, question_id in (("medial", -1, 45), ("lateral", 1, 47)):
        edge = RIM_MM + EXTRUSION_MM[knee.grades[question_id]["grade"]]
        body = t.labels == LABELS[f"{name} meniscus body"]
        inside = np.flatnonzero(body.any((0, 1)))
        outer = int(inside[np.argmax(np.abs(side[inside]))])
        nxt = outer + (1 if side[-1] * sign > 0 else -1)
        for k, profile in ((outer, body[:, :, outer]), (nxt, body[:, :, outer])):
            if 0 <= k < side.size:
                covered = np.clip((edge - (sign * side[k] - width / 2)) / width, 0, 1)
                image[profile, k] = covered * MENISCUS + (1 - covered) * JOINT


def acquire(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Point spread, trabecular texture, coil sensitivity and Rician noise; int16, fluid near 1000."""
    image = ndimage.gaussian_filter(image, (0.55, 0.55, 0.0), truncate=2.5)
    if rng is not None:
        shape = image.shape
        x, y, z = (
            np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if i == j else 1 for j in range(3)])
            for i, n in enumerate(shape)
        )
        b = rng.uniform(-0.08, 0.08, 5).astype(np.float32)
        bias = 1 + b[0] * x + b[1] * y + b[2] * z + b[3] * x * y - (0.08 + b[4]) * (x**2 + y**2) / 2
        texture = ndimage.gaussian_filter(
            rng.standard_normal(shape, dtype=np.float32), (1.2, 1.2, 0.0), truncate=2
        )
        image = image * bias * (1 + 0.2 * texture)
        noise = rng.standard_normal((2, *shape), dtype=np.float32) * np.float32(0.02)
        image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
    return np.clip(image * 1000, 0, 4000).astype(np.int16)
