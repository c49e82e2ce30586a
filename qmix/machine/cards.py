"""Common graphics cards: memory, memory bandwidth, half-precision products and PCIe, as their vendor publishes them.

Sources, all NVIDIA's own: the architecture whitepapers "Turing GPU Architecture" (RTX 20), "Ampere GA102 GPU
Architecture" V2 (RTX 30, RTX A, A40), "Ada GPU Architecture" V2 (RTX 40, L4, L40S) and "RTX Blackwell GPU
Architecture" (RTX 50); the data sheets of T4, A10, A100, L4, L40S, H100, H200 and the RTX A and RTX Ada cards; and the
product pages of the GeForce cards that no whitepaper lists. TFLOP/s are those of FP16 products on tensor cores with
sums in FP32, without sparsity. Where only FP32 TFLOP/s are published for a GeForce card they are 4 times these (Turing)
or twice these (later), the ratio that the whitepapers give for the cards of the same architecture.

Only NVIDIA's cards from Turing on run qmix: it needs CUDA and tensor cores. Loads no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qmix.errors import UsageError
from qmix.units import parse_bytes, quoted

GIB = 2**30
PCIE_LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}  # bytes/s of a lane in one direction (PCI-SIG), by generation
# What programs reach of these figures. An H100 read its memory at 0.73 of it, and its link copied at 0.87.
MEMORY_REACHED, MATMUL_REACHED, PCIE_REACHED = 0.8, 0.7, 0.85
DRIVER_SHARE = 0.02  # of the memory, which the driver keeps: torch counts 23.65 GiB on a card of 24
ECC_SHARE = 1 / 16  # of GDDR memory, where a card ships with error correction turned on

OTHERS = re.compile(r"\b(amd|radeon|rx|rx\d{3,4}|instinct|mi\d+x?|intel|arc|apple|m\d)(?:xtx|xt|gre)?\b")
NOISE = re.compile(r"\b(nvidia|geforce|tesla|quadro|graphics|gpu|card|generation|hbm2e?|hbm3e|tm|r)\b")
MEMORY = re.compile(r"\b(\d+)\s*(?:gb|gib|g)\b")
SIZE = re.compile(r"\s*[\d.]+\s*(?:[kmgt]?i?b?)?\s*", re.IGNORECASE)
FORMS = {"sxm4": "sxm", "sxm5": "sxm", "hbm3": "sxm"}  # as drivers name them: "H100 80GB HBM3", "A100-SXM4-80GB"


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card: memory in GiB, GB/s, TFLOP/s, and its PCIe link. `form` tells variants of a model apart."""

    model: str
    memory: int
    bandwidth: float
    tflops: float
    generation: int
    lanes: int = 16
    form: str = ""
    ecc: bool = False

    @property
    def name(self) -> str:
        """The model's name, with its form and its memory where others share it."""
        shared = {card.memory for card in CARDS if card.model == self.model}
        memory = f" {self.memory}GB" if len(shared) > 1 else ""
        return f"{self.model}{memory}{' ' * bool(self.form)}{self.form}"

    @property
    def budget(self) -> int:
        """The bytes that a program can take on it."""
        return int(self.memory * GIB * (1 - (ECC_SHARE if self.ecc else 0.0)) * (1 - DRIVER_SHARE))

    @property
    def rates(self) -> dict[str, float]:
        """The rates of `qmix.machine.rates.Rates` that programs reach on it."""
        return {
            "gpu_memory": self.bandwidth * 1e9 * MEMORY_REACHED,
            "gpu_matmul": self.tflops * 1e12 * MATMUL_REACHED,
            "pcie": PCIE_LANE[self.generation] * self.lanes * PCIE_REACHED,
        }


CARDS = (
    Card("RTX 2060", 6, 336, 25.8, 3),
    Card("RTX 2060", 12, 336, 28.7, 3),
    Card("RTX 2060 Super", 8, 448, 28.7, 3),
    Card("RTX 2070", 8, 448, 29.9, 3),
    Card("RTX 2070 Super", 8, 448, 36.3, 3),
    Card("RTX 2080", 8, 448, 40.3, 3),
    Card("RTX 2080 Super", 8, 496, 44.6, 3),
    Card("RTX 2080 Ti", 11, 616, 53.8, 3),
    Card("RTX 3050", 8, 224, 18.2, 4, 8),
    Card("RTX 3060", 8, 240, 25.5, 4),
    Card("RTX 3060", 12, 360, 25.5, 4),
    Card("RTX 3060 Ti", 8, 448, 32.4, 4),
    Card("RTX 3070", 8, 448, 40.6, 4),
    Card("RTX 3070 Ti", 8, 608, 43.5, 4),
    Card("RTX 3080", 10, 760, 59.5, 4),
    Card("RTX 3080", 12, 912, 61.3, 4),
    Card("RTX 3080 Ti", 12, 912, 68.2, 4),
    Card("RTX 3090", 24, 936, 71.0, 4),
    Card("RTX 3090 Ti", 24, 1008, 80.0, 4),
    Card("RTX 4060", 8, 272, 30.2, 4, 8),
    Card("RTX 4060 Ti", 8, 288, 44.1, 4, 8),
    Card("RTX 4060 Ti", 16, 288, 44.1, 4, 8),
    Card("RTX 4070", 12, 504, 58.3, 4),
    Card("RTX 4070 Super", 12, 504, 71.0, 4),
    Card("RTX 4070 Ti", 12, 504, 80.2, 4),
    Card("RTX 4070 Ti Super", 16, 672, 88.2, 4),
    Card("RTX 4080", 16, 717, 97.5, 4),
    Card("RTX 4080 Super", 16, 736, 104.4, 4),
    Card("RTX 4090", 24, 1008, 165.2, 4),
    Card("RTX 5050", 8, 320, 26.3, 5, 8),
    Card("RTX 5060", 8, 448, 38.4, 5, 8),
    Card("RTX 5060 Ti", 8, 448, 47.4, 5, 8),
    Card("RTX 5060 Ti", 16, 448, 47.4, 5, 8),
    Card("RTX 5070", 12, 672, 61.7, 5),
    Card("RTX 5070 Ti", 16, 896, 87.9, 5),
    Card("RTX 5080", 16, 960, 112.6, 5),
    Card("RTX 5090", 32, 1792, 209.5, 5),
    Card("RTX A4000", 16, 448, 76.7, 4),
    Card("RTX A4500", 20, 640, 94.6, 4),
    Card("RTX A5000", 24, 768, 111.1, 4),
    Card("RTX A5500", 24, 768, 136.4, 4),
    Card("RTX A6000", 48, 768, 154.8, 4),
    Card("RTX 6000 Ada", 48, 960, 364.2, 4),
    Card("T4", 16, 320, 65.0, 3, ecc=True),
    Card("A10", 24, 600, 125.0, 4, ecc=True),
    Card("A40", 48, 696, 149.7, 4, ecc=True),
    Card("L4", 24, 300, 121.0, 4, ecc=True),
    Card("L40S", 48, 864, 362.0, 4, ecc=True),
    Card("A100", 40, 1555, 312.0, 4),
    Card("A100", 80, 1935, 312.0, 4, form="PCIe"),
    Card("A100", 80, 2039, 312.0, 4, form="SXM"),
    Card("H100", 80, 2000, 756.0, 5, form="PCIe"),
    Card("H100", 80, 3350, 989.4, 5, form="SXM"),
    Card("H100", 94, 3900, 835.0, 5, form="NVL"),
    Card("H200", 141, 4800, 989.4, 5),
    Card("H200", 141, 4800, 835.0, 5, form="NVL"),
)


def card_named(text: str, memory: int | None = None) -> Card:
    """Return the card of a name as people or drivers write it: "4090", "rtx4090", "NVIDIA GeForce RTX 4090".

    `memory` (bytes) tells apart cards that share a name. Raises UsageError where no card or several match.
    """
    plain = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
    if OTHERS.search(plain):
        raise UsageError(
            f"{quoted(text)} cannot run qmix: it needs an NVIDIA GPU with CUDA; use `none` to run on the CPU"
        )
    found = _matching(plain)
    if len(found) > 1 and memory is not None:
        nearest = min(abs(card.budget - memory) for card in found)
        found = [card for card in found if abs(card.budget - memory) == nearest]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{quoted(text)} may be {_listed(found, 'or')}; give one of these names")
    names = {_squeezed(card.name): card for card in CARDS}
    asked = re.sub("laptop|mobile|maxq", "", _squeezed(NOISE.sub("", plain)))
    close = difflib.get_close_matches(asked, names, 3, 0.6)
    are = "is" if len(close) == 1 else "are"
    hint = f"; the nearest {are} {_listed((names[key] for key in close), 'and')}" if close else ""
    raise UsageError(f"{quoted(text)} is neither a size like 24GiB nor a known card{hint}; give its memory as a size")


def _matching(plain: str) -> list[Card]:
    """Return the cards that a name in plain letters may mean."""
    sizes = [int(size) for size in MEMORY.findall(plain)]
    words = [FORMS.get(word, word) for word in NOISE.sub(" ", MEMORY.sub(" ", plain)).split()]
    forms = [word for word in words if word in ("sxm", "pcie", "nvl")]
    key = _squeezed("".join(word for word in words if word not in forms))
    named = [card for card in CARDS if key and key == _squeezed(card.model)]
    fitting = [
        card
        for card in named
        if (not sizes or card.memory in sizes) and (not forms or card.form.lower() in (forms[0], ""))
    ]
    exact = [card for card in fitting if card.form.lower() == (forms[0] if forms else "")]
    return exact if exact and len({card.memory for card in fitting}) == 1 else fitting


def typical_card(nbytes: int) -> Card:
    """Return the card of median bandwidth among the RTX cards of the least memory that holds `nbytes`.

    What no RTX card holds is taken for a card of a data centre.
    """
    usual = [card for card in CARDS if card.model.startswith("RTX")]
    enough = [card for card in usual if card.memory * GIB >= nbytes]
    enough = enough or [card for card in CARDS if card.memory * GIB >= nbytes] or [CARDS[-1]]
    least = min(card.memory for card in enough)
    same = sorted((card for card in enough if card.memory == least), key=lambda card: card.bandwidth)
    return same[(len(same) - 1) // 2]


def gpu_budget(text: int | str) -> tuple[int, Card | None]:
    """Return a GPU's bytes, and its card where it was named; `text` is bytes, a size like "24GiB", or a card's name.

    Raises UsageError.
    """
    if isinstance(text, str) and (SIZE.fullmatch(text) is None or _matching(text.lower())):
        card = card_named(text)
        return card.budget, card
    return parse_bytes(text), None


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+|rtx", "", name.lower())


def _listed(cards: Iterable[Card], last: str) -> str:
    *first, end = (card.name for card in cards)
    return f"{', '.join(first)} {last} {end}" if first else end
