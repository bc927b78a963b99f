"""Pinned inputs and the numbers that define the mini base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOUNS_FILE = Path(__file__).with_name("nouns.json")


@dataclass(frozen=True)
class IconSet:
    """One icon set as an npm package.

    Attributes:
        key: Short name used for folders and manifests.
        package: Package name.
        version: Exact version.
        integrity: The package manager's digest (``sha512-<base64>``) of the tarball.
        licence: SPDX identifier of the drawings.
        owner: Copyright holder.
        source: Where the drawings come from.
        styles: Words that name the set's look in captions; empty for the
            hold-out style, which never gets a caption.
    """

    key: str
    package: str
    version: str
    integrity: str
    licence: str
    owner: str
    source: str
    styles: tuple[str, ...] = ()


NOTO = IconSet(
    "noto",
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "Apache-2.0",
    "Google LLC",
    "googlefonts/noto-emoji",
    ("shaded",),
)
NOTO_V1 = IconSet(
    "noto-v1",
    "@iconify-json/noto-v1",
    "1.2.5",
    "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    "Apache-2.0",
    "Google LLC",
    "googlefonts/noto-emoji (first design)",
    ("cartoon",),
)
FLUENT = IconSet(
    "fluent",
    "@iconify-json/fluent-emoji",
    "1.2.7",
    "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    "MIT",
    "Microsoft Corporation",
    "microsoft/fluentui-emoji",
    ("glossy 3d",),
)
FLUENT_FLAT = IconSet(
    "fluent-flat",
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "MIT",
    "Microsoft Corporation",
    "microsoft/fluentui-emoji",
    ("flat",),
)
INK = IconSet(
    "ink",
    "@iconify-json/fluent-emoji-high-contrast",
    "1.2.6",
    "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    "MIT",
    "Microsoft Corporation",
    "microsoft/fluentui-emoji",
)

BASE_SETS = (NOTO, NOTO_V1, FLUENT, FLUENT_FLAT)
"""The sets the text encoder and the U-Net learn from."""

ALL_SETS = (*BASE_SETS, INK)
"""Every set that is fetched; ink is for the VAE and the sample data sets only."""

IMAGE_SIZE = 64
"""Side of the images the base draws, in pixels."""

VARIANTS = 6
"""Placings of each drawing that training draws from."""

RECOMMENDED = {
    "adapter.targets": "linear",
    "optimizer.learning_rate": 0.002,
    "training.batch_size": 8,
    "training.steps": 150,
    "sample.guidance": 4.0,
}
"""What the base recommends to those who train on it and draw with it (``sdlora.json``)."""
