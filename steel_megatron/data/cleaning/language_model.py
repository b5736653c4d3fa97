"""A character n-gram language model with modified Kneser-Ney smoothing (Chen and Goodman 1998), in numpy.

It stands in for a KenLM model that would have to be downloaded: KenLM's Python package can query models but not train
them. A text is the sequence of its characters with BOS before it and EOS behind it. Characters that occur once in the
training texts are one symbol UNK, whose probability its kinds share, so that a rare character has a
probability instead of none.

Two models are trained, each on the half of the texts that the other did not see, and a text is scored by the one that
has not seen it (a hash of the text chooses its half): a text of the training set gets no better number for being in it.

An n-gram is known by a 64-bit hash of its characters. For 1e8 n-grams the chance that two of them share one is 3e-4.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steel_megatron.errors import DataError
from steel_megatron.files import disk_errors, write_atomically

FORMAT = "steel_megatron character n-grams 2"
ALL = "*"
"""Stands for all sources together."""
_BOS, _EOS, _UNK = 0, 1, 2
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def half_of(text: str) -> int:
    """Which half of the texts (0 or 1) a text belongs to."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] & 1


def _codes(text: str) -> np.ndarray:
    """The code points of a text, [characters] uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _hashes(ids: np.ndarray, order: int) -> list[np.ndarray]:
    """For each length n from 1 to ``order``, the hash of the n ids that end at each position, [positions] uint64.

    Positions before the nth hold the hash of an n-gram that reaches over the begin, which wraps around: not to be used.
    """
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    hashes = [mixed]
    for distance in range(1, order):
        longer = hashes[-1] * np.uint64(0x2545F4914F6CDD1D) + np.roll(mixed, distance)
        longer ^= longer >> np.uint64(31)
        hashes.append(longer * _MULTIPLIER)
    return hashes


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length."""

    grams: np.ndarray
    """[kinds] uint64, sorted."""
    probabilities: np.ndarray
    """[kinds] float32: (count - discount) / count of the context, the n-1 ids before."""
    weights: np.ndarray
    """[kinds] float32: what the n-gram, as a context of n + 1, leaves for the next shorter context."""


@dataclass(frozen=True)
class HalfModel:
    """One of the two models."""

    alphabet: np.ndarray
    """[characters] uint32: code points with an id of their own, sorted; the id of the first is 3."""
    unknown_kinds: int
    """How many different characters UNK stood for."""
    empty_weight: float
    """What the empty context leaves for the uniform distribution."""
    orders: tuple[_Order, ...]
    """n-grams of one, two, ... ids."""

    def log_probabilities(self, text: str) -> np.ndarray:
        """The natural logarithms of the probabilities of a text's characters and of its end, [characters + 1]."""
        before = len(self.orders) - 1
        ids = _ids(text, self.alphabet, before)
        probability = np.full(len(ids) - before, 1.0 / (len(self.alphabet) + 2))  # each id but BOS
        left: np.ndarray | float = self.empty_weight
        for order, hashed in zip(self.orders, _hashes(ids, len(self.orders)), strict=True):
            places = np.minimum(np.searchsorted(order.grams, hashed), len(order.grams) - 1)
            known = order.grams[places] == hashed
            probability = np.where(known, order.probabilities[places], 0.0)[before:] + left * probability
            left = np.where(known, order.weights[places], 1.0)[before - 1 : -1]
        return np.log(probability) - np.where(ids[before:] == _UNK, np.log(self.unknown_kinds), 0.0)

    @classmethod
    def train(cls, texts: list[str], order: int) -> HalfModel:
        """Train on one half of the texts; arguments as for :meth:`LanguageModel.train`."""
        codes, counts = np.unique(_codes("".join(texts)), return_counts=True)
        alphabet = codes[counts > 1] if (counts > 1).any() else codes
        ids = np.concatenate([_ids(text, alphabet, order - 1) for text in texts])
        return cls(alphabet, max(int((counts == 1).sum()), 1), *_estimate(ids, order))


def _ids(text: str, alphabet: np.ndarray, before: int) -> np.ndarray:
    """The ids of a text behind ``before`` times BOS, and EOS."""
    codes = _codes(text)
    places = np.minimum(np.searchsorted(alphabet, codes), len(alphabet) - 1)
    inner = np.where(alphabet[places] == codes, places + 3, _UNK)
    return np.concatenate([np.full(before, _BOS), inner, [_EOS]])


def _estimate(ids: np.ndarray, order: int) -> tuple[float, tuple[_Order, ...]]:
    """The weight of the empty context, and the n-grams of texts that each begin in ``order`` - 1 BOS and end in EOS."""
    hashes = _hashes(ids, order)
    places = np.flatnonzero(ids != _BOS)
    orders: list[_Order] = []
    contexts = np.empty(0, dtype=np.uint64)  # those of the next longer n-grams, and their weights
    weights = np.empty(0)
    # Kneser-Ney: the longest n-grams by their occurrences, shorter ones by how many different ids stood before them.
    for n in range(order, 0, -1):
        grams, first, counts = np.unique(hashes[n - 1][places], return_index=True, return_counts=True)
        places = places[first]
        before = hashes[n - 2][places - 1] if n > 1 else np.zeros(len(places), dtype=np.uint64)
        probabilities, next_contexts, next_weights = _discounted(counts, before)
        if n < order:  # the begin of a text is a context, but is never predicted
            begin = hashes[n - 1][order - 2]
            place = np.searchsorted(grams, begin)
            grams, probabilities = np.insert(grams, place, begin), np.insert(probabilities, place, 0.0)
        of_gram = np.ones(len(grams))
        of_gram[np.searchsorted(grams, contexts)] = weights
        orders.insert(0, _Order(grams, probabilities.astype(np.float32), of_gram.astype(np.float32)))
        contexts, weights = next_contexts, next_weights
    return float(weights[0]), tuple(orders)


def _discounted(counts: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The discounted probability of each n-gram in its context; the contexts, sorted; the weights they leave."""
    kinds = [max(int((counts == count).sum()), 1) for count in range(1, 5)]
    y = kinds[0] / (kinds[0] + 2 * kinds[1])
    discounts = [min(max(c - (c + 1) * y * kinds[c] / kinds[c - 1], 0.1), c - 0.1) for c in (1, 2, 3)]
    discount = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    contexts, of_gram = np.unique(before, return_inverse=True)
    totals = np.bincount(of_gram, weights=counts)
    weights = np.bincount(of_gram, weights=discount) / totals
    return (counts - discount) / totals[of_gram], contexts, weights


@dataclass(frozen=True)
class LanguageModel:
    """Two models of characters, each trained on half of the texts; see the module's docstring."""

    halves: tuple[HalfModel, HalfModel]
    quantiles: dict[str, np.ndarray]
    """For each source, and for ALL, [101] perplexities per character below which 0%, 1%, ..., 100% of its training
    texts stay, unseen."""

    def perplexity(self, text: str) -> float:
        """exp(-log p(text) / characters), by the model that was not trained on it; the text's end is a character."""
        return float(np.exp(-self.halves[1 - half_of(text)].log_probabilities(text).mean()))

    def quantile(self, share: float, source: str | None = None) -> float:
        """The perplexity below which a share of a source's training texts stays; of all, if it had none."""
        quantiles = self.quantiles.get(source or ALL, self.quantiles[ALL])
        return float(np.interp(share * 100, np.arange(101), quantiles))

    @classmethod
    def train(cls, texts: Iterable[tuple[str, str]], order: int = 3) -> LanguageModel:
        """Train on texts.

        Args:
            texts: the source and the text of clean documents; they are held in memory, with some hundred bytes for
                each of their characters.
            order: the length of the longest n-grams, in characters.

        Raises:
            DataError: the texts are too few to make two halves.
        """
        parts: tuple[list[str], list[str]] = ([], [])
        of_source: dict[str, list[str]] = {}
        for source, text in texts:
            parts[half_of(text)].append(text)
            of_source.setdefault(source, []).append(text)
        if not all(parts):
            raise DataError(
                f"there are {len(parts[0]) + len(parts[1])} texts to train the language model of perplexity_filter on, "
                "too few to make two halves; give it a model (model: FOLDER) or leave it out (model: none)"
            )
        model = cls((HalfModel.train(parts[0], order), HalfModel.train(parts[1], order)), {})
        unseen = {source: [model.perplexity(text) for text in some] for source, some in of_source.items()}
        unseen[ALL] = [perplexity for some in unseen.values() for perplexity in some]
        shares = np.linspace(0, 1, 101)
        return cls(model.halves, {source: np.quantile(found, shares) for source, found in unseen.items()})

    def save(self, folder: Path) -> None:
        """Write the model as .npy files and a model.json, which is written last.

        Raises:
            DataError: the folder cannot be written.
        """
        with disk_errors("write", folder, DataError):
            folder.mkdir(parents=True, exist_ok=True)
            for number, half in enumerate(self.halves):
                np.save(folder / f"{number}_alphabet.npy", half.alphabet)
                for n, order in enumerate(half.orders, start=1):
                    for field, values in vars(order).items():
                        np.save(folder / f"{number}_{n}_{field}.npy", values)
        about = {
            "format": FORMAT,
            "order": len(self.halves[0].orders),
            "unknown_kinds": [half.unknown_kinds for half in self.halves],
            "empty_weight": [half.empty_weight for half in self.halves],
            "quantiles": {source: found.tolist() for source, found in self.quantiles.items()},
        }
        write_atomically(folder / "model.json", json.dumps(about).encode(), DataError)

    @classmethod
    def load(cls, folder: Path) -> LanguageModel:
        """Open a saved model; its arrays are mapped, so that processes of one machine share them.

        Raises:
            DataError: there is none, or it is damaged.
        """
        try:
            about = json.loads((folder / "model.json").read_bytes())
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}; this version reads {FORMAT!r}")

            def half(number: int) -> HalfModel:
                def array(name: str) -> np.ndarray:
                    return np.load(folder / f"{number}_{name}.npy", mmap_mode="r", allow_pickle=False)

                fields = ("grams", "probabilities", "weights")
                orders = [_Order(*(array(f"{n}_{field}") for field in fields)) for n in range(1, about["order"] + 1)]
                return HalfModel(
                    array("alphabet"), about["unknown_kinds"][number], about["empty_weight"][number], tuple(orders)
                )

            quantiles = {name: np.array(found, dtype=np.float64) for name, found in about["quantiles"].items()}
            if quantiles[ALL].shape != (101,):
                raise ValueError("its quantiles are not 101 numbers")
            return cls((half(0), half(1)), quantiles)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
            raise DataError(f"{folder} holds no language model that can be read: {error}") from error
