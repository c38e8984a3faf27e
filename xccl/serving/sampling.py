"""Choice of the next token: greedy, temperature and top-p, with noise from a counter-based generator.

The Gumbel-max trick: ``argmax(logits / temperature + noise)`` is a sample of the softmax. The noise is a pure function
of (seed, request id, position of the token, vocabulary entry), so a text repeats on any number of ranks and in any
batch, and a speculative draft for a position uses the very noise that its verification will use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xccl.serving.arrays import FloatArray, IntArray

_Words = npt.NDArray[np.uint64]

# splitmix64 (Steele, Lea, Flood 2014): step of the counter and the two multipliers of the finaliser
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# entries among which the end of the nucleus is sought first; sorting a whole vocabulary costs several times more
_NUCLEUS_GUESS = 128


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of the rows of one step, each array [rows].

    ``keys`` come from :func:`request_keys`; ``positions`` are those of the tokens to be chosen.
    """

    temperature: FloatArray
    top_p: FloatArray
    keys: _Words
    positions: IntArray


def request_keys(seeds: IntArray, request_ids: IntArray) -> _Words:
    """Keys of the noise of requests, uint64 [requests]."""
    return _mix(_mix(seeds.astype(np.uint64)) + request_ids.astype(np.uint64) * _STEP)


def sample(logits: FloatArray, params: SamplingBatch) -> IntArray:
    """Token of each row of logits [rows, vocab]; rows of temperature 0 take the largest logit."""
    chosen: IntArray = np.empty(len(logits), np.int64)
    random = np.flatnonzero(params.temperature > 0)
    greedy = np.flatnonzero(params.temperature == 0)
    if len(greedy):
        chosen[greedy] = np.argmax(logits[greedy], axis=1)
    if len(random):
        scores = logits[random] / params.temperature[random, None]
        if np.any(params.top_p[random] < 1):
            _mask_outside_nucleus(scores, params.top_p[random])
        scores += gumbel_noise(params.keys[random], params.positions[random], logits.shape[1])
        chosen[random] = np.argmax(scores, axis=1)
    return chosen


def gumbel_noise(keys: _Words, positions: IntArray, vocab_size: int) -> FloatArray:
    """Standard Gumbel noise [rows, vocab_size] for keys and positions, both [rows]."""
    streams = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _STEP)
    counters = np.arange(1, (vocab_size + 1) // 2 + 1, dtype=np.uint64) * _STEP
    words = _mix(streams[:, None] + counters)
    # one 64-bit word serves two entries; 23 bits and a half are exact in float32 and never 0 or 1
    noise: FloatArray = (words.view(np.uint32)[:, :vocab_size] >> np.uint32(9)).astype(np.float32)
    noise += np.float32(0.5)
    noise *= np.float32(2.0**-23)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    return noise


def _mask_outside_nucleus(scores: FloatArray, top_p: FloatArray) -> None:
    """Set scores outside each row's nucleus to -inf; entries as probable as its last member stay in."""
    probability = np.exp(scores - np.maximum.reduce(scores, axis=1, keepdims=True))
    probability /= np.add.reduce(probability, axis=1, keepdims=True)
    last = _least_of_nucleus(probability, top_p, min(_NUCLEUS_GUESS, scores.shape[1]))
    scores[(probability < last[:, None]) & (top_p[:, None] < 1)] = -np.inf


def _least_of_nucleus(probability: FloatArray, top_p: FloatArray, guess: int) -> FloatArray:
    """Probability of the last member of each row's nucleus, found among the ``guess`` largest entries if it is there.

    The running sum over the largest entries is the beginning of the sum over all, so the guess changes no bit.
    """
    largest = np.partition(probability, -guess, axis=1)[:, -guess:]
    descending = np.sort(largest, axis=1)[:, ::-1]
    total = np.cumsum(descending, axis=1)
    size = np.minimum(np.add.reduce(total < top_p[:, None], axis=1) + 1, guess)
    least: FloatArray = np.take_along_axis(descending, size[:, None] - 1, axis=1)[:, 0]
    open_rows = np.flatnonzero(total[:, -1] < top_p)
    if guess < probability.shape[1] and len(open_rows):
        least[open_rows] = _least_of_nucleus(probability[open_rows], top_p[open_rows], probability.shape[1])
    return least


def _mix(words: _Words) -> _Words:
    """The finaliser of splitmix64."""
    words = words ^ (words >> np.uint64(30))
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
    return words
